"""The sizes of the FLUX.2 transformers, as data. Sources: the published repositories' config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Flux2Config:
    """Sizes of the transformer; names as in its published config.json."""

    in_channels: int = 128
    out_channels: int | None = None  # None: as many as in_channels
    num_layers: int = 8
    num_single_layers: int = 48
    attention_head_dim: int = 128
    num_attention_heads: int = 48
    joint_attention_dim: int = 15_360
    mlp_ratio: float = 3.0
    guidance_embeds: bool = True
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)  # of a head's width: which picture, row, column, text token
    rope_theta: float = 2000.0

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


_DEV = Flux2Config()
_KLEIN_4B = replace(
    _DEV, num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
)
_KLEIN_9B = replace(_KLEIN_4B, num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12_288)

TRANSFORMERS: dict[str, Flux2Config] = {
    "flux.2-dev": _DEV,
    "flux.2-klein-4b": _KLEIN_4B,
    "flux.2-klein-base-4b": _KLEIN_4B,
    "flux.2-klein-9b": _KLEIN_9B,
    "flux.2-klein-base-9b": _KLEIN_9B,
    "flux.2-klein-9b-kv": _KLEIN_9B,  # no tensor tells it from klein 9B; it was trained to read references once
}
"""Sizes by the model's name."""


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> Flux2Config:
    """Sizes of a transformer from its weights' shapes. KeyError where they are not FLUX.2's.

    The head's width is shared out evenly over the axes, as in the published models.
    """
    dim = shapes["double_stream_modulation_img.lin.weight"][1]
    in_channels = shapes["img_in.weight"][1]
    out_channels = shapes["final_layer.linear.weight"][0]
    head = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
    layers, single = ({k.split(".")[1] for k in shapes if k.startswith(f"{b}_blocks.")} for b in ("double", "single"))
    return Flux2Config(
        in_channels=in_channels,
        out_channels=None if out_channels == in_channels else out_channels,
        num_layers=len(layers),
        num_single_layers=len(single),
        attention_head_dim=head,
        num_attention_heads=dim // head,
        joint_attention_dim=shapes["txt_in.weight"][1],
        mlp_ratio=shapes["double_blocks.0.img_mlp.2.weight"][1] / dim,
        guidance_embeds="guidance_in.in_layer.weight" in shapes,
        axes_dims_rope=(head // 4,) * 4,
    )
