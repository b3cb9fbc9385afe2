"""The sizes of the FLUX.1 transformers, as data. Sources: the published repositories' config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Flux1Config:
    """Sizes of the transformer; names as in its published config.json."""

    in_channels: int = 64  # of a patch of 2 x 2 latent cells, with what is set beside it
    out_channels: int | None = None  # None: as many as in_channels
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = True
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)  # of a head's width: which picture, row, column

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


_DEV = Flux1Config()
_CONTROL = replace(_DEV, in_channels=128, out_channels=64)  # beside the noise, the latents of the map

TRANSFORMERS: dict[str, Flux1Config] = {
    "flux.1-schnell": replace(_DEV, guidance_embeds=False),
    "flux.1-dev": _DEV,
    "flux.1-krea-dev": _DEV,
    "flux.1-kontext-dev": _DEV,
    "flux.1-fill-dev": replace(_DEV, in_channels=384, out_channels=64),  # the masked picture's latents, and the mask
    "flux.1-canny-dev": _CONTROL,
    "flux.1-depth-dev": _CONTROL,
}
"""Sizes by the model's name."""


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> Flux1Config:
    """Sizes of a transformer from its weights' shapes. KeyError where they are not FLUX.1's.

    The head's width is shared out over the axes as in the published models: an eighth, and two equal rests.
    """
    in_channels = shapes["img_in.weight"][1]
    dim = shapes["double_blocks.0.img_mod.lin.weight"][1]  # FLUX.2's blocks have none
    head = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
    out_channels = shapes["final_layer.linear.weight"][0]
    layers, single = ({k.split(".")[1] for k in shapes if k.startswith(f"{b}_blocks.")} for b in ("double", "single"))
    return Flux1Config(
        in_channels=in_channels,
        out_channels=None if out_channels == in_channels else out_channels,
        num_layers=len(layers),
        num_single_layers=len(single),
        attention_head_dim=head,
        num_attention_heads=dim // head,
        joint_attention_dim=shapes["txt_in.weight"][1],
        pooled_projection_dim=shapes["vector_in.in_layer.weight"][1],
        guidance_embeds="guidance_in.in_layer.weight" in shapes,
        axes_dims_rope=(head // 8, head * 7 // 16, head * 7 // 16),
    )
