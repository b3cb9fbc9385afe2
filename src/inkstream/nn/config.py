"""Sizes of the parts that families share, as frozen data importable without torch. Names are the published configs'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

C = TypeVar("C")


@dataclass(frozen=True)
class Qwen3Config:
    """The Qwen3 text encoder; defaults are Qwen3-4B, Z-Image's."""

    vocab_size: int = 151_936
    hidden_size: int = 2560
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 9728
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6


@dataclass(frozen=True)
class VAEConfig:
    """The convolutional autoencoder (AutoencoderKL); defaults are FLUX.1's, which Z-Image uses."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159

    @property
    def downscale(self) -> int:
        """Pixels per latent cell, along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


def read_config(kind: type[C], data: Mapping[str, Any]) -> C:
    """A config from a published config.json: known names are taken, others ignored, lists become tuples."""
    data = {**data.get("rope_parameters", {}), **data} if isinstance(data.get("rope_parameters"), Mapping) else data
    names = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    taken = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in names}
    return kind(**taken)
