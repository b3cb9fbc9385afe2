"""Configs shared by families, as frozen data importable without torch. Names are those of the published configs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

C = TypeVar("C")


@dataclass(frozen=True)
class Qwen3Config:
    """The Qwen3 text encoder. Defaults: Qwen3-4B, which Z-Image uses."""

    vocab_size: int = 151_936
    hidden_size: int = 2560
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 9728
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6

    @property
    def joined_size(self) -> int:
        """The width of three hidden states concatenated, which is FLUX.2's text input."""
        return 3 * self.hidden_size


@dataclass(frozen=True)
class Qwen3VLConfig(Qwen3Config):
    """The language model of Qwen3-VL. Defaults: Qwen3-VL-4B. For text alone it is Qwen3 with another rotary base."""

    rope_theta: float = 5_000_000.0


@dataclass(frozen=True)
class VAEConfig:
    """The convolutional autoencoder (AutoencoderKL). Defaults: FLUX.1's, which Z-Image uses too."""

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
        """Pixels per latent cell along one side."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def patch_channels(self) -> int:
        """Numbers in a FLUX.1 patch, which is 2 x 2 latent cells."""
        return 4 * self.latent_channels


@dataclass(frozen=True)
class Flux2VAEConfig:
    """FLUX.2's autoencoder (AutoencoderKLFlux2). Its small decoder differs only in `decoder_block_out_channels`."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 32
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_block_out_channels: tuple[int, ...] | None = None  # None: the encoder's
    layers_per_block: int = 2
    norm_num_groups: int = 32
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    batch_norm_eps: float = 1e-4

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one side. A cell packs 2 x 2 cells of the convolutions."""
        return 2 ** len(self.block_out_channels)

    @property
    def packed_channels(self) -> int:
        """Channels of the packed latents, which are the transformer's input."""
        return 4 * self.latent_channels


@dataclass(frozen=True)
class MistralConfig:
    """Mistral's language model. Defaults: Mistral-Small-3.2-24B, FLUX.2 dev's text encoder."""

    vocab_size: int = 131_072
    hidden_size: int = 5120
    num_hidden_layers: int = 40
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 32_768
    rope_theta: float = 1_000_000_000.0
    rms_norm_eps: float = 1e-5

    @property
    def joined_size(self) -> int:
        """The width of three hidden states concatenated, which is FLUX.2's text input."""
        return 3 * self.hidden_size


@dataclass(frozen=True)
class CLIPTextConfig:
    """CLIP's text model. Defaults: CLIP ViT-L/14, which FLUX.1 uses."""

    vocab_size: int = 49_408
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 2  # 2 marks files older than transformers' fix: the pooled state is at the largest token id


@dataclass(frozen=True)
class T5Config:
    """T5 1.1's encoder. Defaults: T5-v1.1-XXL, which FLUX.1 uses."""

    vocab_size: int = 32_128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10_240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"


def read_config(kind: type[C], data: Mapping[str, Any]) -> C:
    """Reads a config from a published config.json: takes known names, ignores others, turns lists into tuples."""
    for inner in ("text_config", "rope_parameters"):  # nested by vision-language models; by transformers 5
        if isinstance(data.get(inner), Mapping):
            data = {**data[inner], **data}
    names = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    taken = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items() if k in names}
    return kind(**taken)
