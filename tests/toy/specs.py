"""The toy models, as data."""

from __future__ import annotations

from dataclasses import dataclass, replace

from inkstream.nn.config import Qwen3Config, VAEConfig
from inkstream.types import Spec


@dataclass(frozen=True)
class ToyConfig:
    """Sizes of the transformer; names as in its published config.json."""

    in_channels: int = 16
    dim: int = 1024
    n_layers: int = 12
    n_heads: int = 16
    text_dim: int = 2560
    axes_dims: tuple[int, ...] = (16, 24, 24)  # of a head's width: place in the text, row, column


TOY = Spec(
    name="toy",
    title="Toy: the smallest transformer that draws (its weights are not published)",
    family="toy",
    transformer=ToyConfig(),
    text_encoder=Qwen3Config(),
    vae=VAEConfig(),
    steps=12,
    guidance=3.0,
    shift=3.0,
    abilities=frozenset({"guidance", "image", "mask"}),
    licence="apache-2.0",
    commercial=True,
    tiny=Spec(
        name="tiny-toy",
        title="Toy at 2 blocks of width 64 (random weights, for tests)",
        family="toy",
        transformer=ToyConfig(dim=64, n_layers=2, n_heads=2, text_dim=32, axes_dims=(8, 12, 12)),
        text_encoder=Qwen3Config(
            vocab_size=512,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            intermediate_size=64,
        ),
        vae=VAEConfig(block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4),
        steps=12,
        guidance=3.0,
        shift=3.0,
        size=(64, 64),
        abilities=frozenset({"guidance", "image", "mask"}),
        licence="apache-2.0",
        commercial=True,
    ),
)

FAST = replace(TOY, name="toy-fast", title="Toy Fast: distilled to 4 steps, no guidance", steps=4, guidance=1.0)

SPECS = (TOY, FAST)
