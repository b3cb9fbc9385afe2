"""The FLUX.3 models as data. Sources: diffusers 0.42.1, and the model cards of the published repositories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from inkstream.nn.config import Flux2VAEConfig, Qwen3VLConfig
from inkstream.types import Spec

MOST_REFERENCES = 10
LICENCE = "FLUX Kommunity v1.0 (pictures for business only below US$ 5 million of revenue a year)"
SHIFT = 6.93
ABLE = frozenset({"image", "mask", "regions", "source", "references"})
"""Abilities of all FLUX.3 models."""


@dataclass(frozen=True)
class Flux3Config:
    """Sizes of the transformer. Names are those of its published config.json."""

    in_channels: int = 128
    cond_in_channels: int = 128  # of reference pictures
    num_layers: int = 5  # blocks of each mode
    num_single_layers: int = 28  # blocks of all tokens together
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 20_480
    mlp_ratio: float = 3.0
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)  # features of a head for: time, row, column, text or picture
    rope_theta: float = 10_000.0
    flow_map: bool = False  # the model is told which time a step goes to

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True)
class Flux3TextConfig(Qwen3VLConfig):
    """The text encoder, Qwen3-VL-4B, of which eight states are read."""

    @property
    def depths(self) -> tuple[int, ...]:
        """The states to read: after 4, 8, ... 32 of 36 layers."""
        return tuple(self.num_hidden_layers * k // 9 for k in range(1, 9))

    @property
    def joined_size(self) -> int:
        """The width of the states concatenated, which is the transformer's text input."""
        return len(self.depths) * self.hidden_size


_TINY = Spec(
    name="tiny-flux3-klein-base",
    title="FLUX.3 klein base at 2 + 2 blocks of width 64 (random weights, for tests)",
    family="flux3",
    transformer=Flux3Config(
        in_channels=16, cond_in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=32,
        num_attention_heads=2, joint_attention_dim=256, axes_dims_rope=(8, 8, 8, 8),
    ),
    text_encoder=Flux3TextConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=9, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=64,
    ),
    vae=Flux2VAEConfig(latent_channels=4, block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4),
    steps=50,
    guidance=3.5,
    shift=SHIFT,
    size=(64, 64),
    abilities=ABLE | {"guidance"},
    licence=LICENCE,
)  # fmt: skip

KLEIN_BASE = Spec(
    name="flux3-klein-base",
    title="FLUX.3 klein, undistilled: guidance and negative prompts, sees references",
    family="flux3",
    transformer=Flux3Config(),
    text_encoder=Flux3TextConfig(),
    vae=Flux2VAEConfig(),
    steps=50,
    guidance=3.5,
    shift=SHIFT,
    abilities=ABLE | {"guidance"},
    repo="black-forest-labs/flux-3-image-klein-base",
    download_bytes=20_000_000_000,
    licence=LICENCE,
    tiny=_TINY,
)

KLEIN = replace(
    KLEIN_BASE,
    name="flux3-klein",
    title="FLUX.3 klein: distilled to a flow map for any number of steps, sees references",
    transformer=Flux3Config(flow_map=True),
    steps=16,
    guidance=1.0,
    guides="none",
    abilities=ABLE,
    repo="black-forest-labs/flux-3-image-klein",
    tiny=replace(
        _TINY, name="tiny-flux3-klein", transformer=replace(_TINY.transformer, flow_map=True), steps=16, guidance=1.0,
        guides="none", abilities=ABLE,
    ),
)  # fmt: skip

SPECS: dict[str, Spec] = {spec.name: spec for spec in (KLEIN, KLEIN_BASE)}


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> Flux3Config:
    """Sizes of a transformer from its weights' shapes. Raises KeyError where they are not FLUX.3's.

    The rotary axes share a head's features equally, as in the published models.
    """
    dim, in_channels = shapes["emb_in.image.weight"]
    head = shapes["single_blocks.0.norm.query_norm.scale"][0]
    layers, single = ({k.split(".")[1] for k in shapes if k.startswith(stack)} for stack in ("txt_mode_", "single_bl"))
    return Flux3Config(
        in_channels=in_channels,
        cond_in_channels=shapes["emb_in.image_cond.weight"][1],
        num_layers=len(layers),
        num_single_layers=len(single),
        attention_head_dim=head,
        num_attention_heads=dim // head,
        joint_attention_dim=shapes["txt_in.weight"][1],
        mlp_ratio=shapes["single_blocks.0.mlp_out.weight"][1] / dim,
        axes_dims_rope=(head // 4,) * 4,
        flow_map="ref_time_in.in_layer.weight" in shapes,
    )
