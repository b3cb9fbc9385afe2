"""The FLUX.2 models as data. Sources: config.json and model cards of the published repositories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from inkstream.nn.config import Flux2VAEConfig, MistralConfig, Qwen3Config
from inkstream.types import Spec

MOST_REFERENCES = 10
NON_COMMERCIAL = "FLUX non-commercial"
ABLE = frozenset({"image", "mask", "regions", "source", "references", "json", "upsample"})
"""Abilities of all FLUX.2 models."""


@dataclass(frozen=True)
class Flux2Config:
    """Sizes of the transformer. Names are those of its published config.json."""

    in_channels: int = 128
    out_channels: int | None = None  # None: the same as in_channels
    num_layers: int = 8
    num_single_layers: int = 48
    attention_head_dim: int = 128
    num_attention_heads: int = 48
    joint_attention_dim: int = 15_360
    mlp_ratio: float = 3.0
    guidance_embeds: bool = True
    axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)  # features of a head for: picture, row, column, text token
    rope_theta: float = 2000.0

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


_DEV = Flux2Config()
_KLEIN_4B = replace(
    _DEV, num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
)
_KLEIN_9B = replace(_KLEIN_4B, num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12_288)
_QWEN3_8B = Qwen3Config(hidden_size=4096, intermediate_size=12_288)

_TINY_VAE = Flux2VAEConfig(latent_channels=4, block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4)
_TINY = Spec(
    name="tiny-flux2-klein",
    title="FLUX.2 klein at 2 + 2 blocks of width 64 (random weights, for tests)",
    family="flux2",
    transformer=Flux2Config(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=96, guidance_embeds=False, axes_dims_rope=(8, 8, 8, 8),
    ),
    text_encoder=Qwen3Config(
        vocab_size=512, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=64,
    ),
    vae=_TINY_VAE,
    steps=4,
    guidance=1.0,
    shift=1.0,
    guides="none",
    shift_rule="empirical",
    table=10_000,
    size=(64, 64),
    abilities=ABLE,
    licence="apache-2.0",
    commercial=True,
)  # fmt: skip

KLEIN_4B = Spec(
    name="flux2-klein-4b",
    title="FLUX.2 klein 4B: distilled to 4 steps, sees references",
    family="flux2",
    transformer=_KLEIN_4B,
    text_encoder=Qwen3Config(),
    vae=Flux2VAEConfig(),
    steps=4,
    guidance=1.0,
    shift=1.0,
    guides="none",
    shift_rule="empirical",
    table=10_000,
    abilities=ABLE,
    repo="black-forest-labs/FLUX.2-klein-4B",
    download_bytes=16_000_000_000,
    licence="apache-2.0",
    commercial=True,
    tiny=_TINY,
)

KLEIN_BASE_4B = replace(
    KLEIN_4B,
    name="flux2-klein-base-4b",
    title="FLUX.2 klein 4B, undistilled: guidance and negative prompts, sees references",
    steps=50,
    guidance=4.0,
    guides="twice",
    abilities=ABLE | {"guidance"},
    repo="black-forest-labs/FLUX.2-klein-base-4B",
    tiny=replace(
        _TINY, name="tiny-flux2-klein-base", steps=50, guides="twice", guidance=4.0, abilities=ABLE | {"guidance"}
    ),
)

_9B = {
    "transformer": _KLEIN_9B,
    "text_encoder": _QWEN3_8B,
    "download_bytes": 35_000_000_000,
    "licence": NON_COMMERCIAL,
    "commercial": False,
}
KLEIN_9B = replace(
    KLEIN_4B,
    name="flux2-klein-9b",
    title="FLUX.2 klein 9B: distilled to 4 steps, sees references",
    repo="black-forest-labs/FLUX.2-klein-9B",
    **_9B,
)
KLEIN_BASE_9B = replace(
    KLEIN_BASE_4B,
    name="flux2-klein-base-9b",
    title="FLUX.2 klein 9B, undistilled: guidance and negative prompts, sees references",
    repo="black-forest-labs/FLUX.2-klein-base-9B",
    **_9B,
)
KLEIN_9B_KV = replace(
    KLEIN_9B,
    name="flux2-klein-9b-kv",
    title="FLUX.2 klein 9B KV: reads references once, not at every step",
    abilities=KLEIN_9B.abilities | {"references_once"},
    repo="black-forest-labs/FLUX.2-klein-9b-kv",
    tiny=replace(_TINY, name="tiny-flux2-klein-kv", abilities=_TINY.abilities | {"references_once"}),
)

DEV = replace(
    KLEIN_4B,
    name="flux2-dev",
    title="FLUX.2 dev, 32B: reads its guidance, sees references",
    transformer=_DEV,
    text_encoder=MistralConfig(),
    steps=50,
    guidance=4.0,
    guides="read",
    abilities=ABLE | {"control", "guidance", "upsample_references"},
    repo="black-forest-labs/FLUX.2-dev",
    download_bytes=112_000_000_000,
    licence=NON_COMMERCIAL,
    commercial=False,
    tiny=replace(
        _TINY,
        name="tiny-flux2-dev",
        transformer=replace(_TINY.transformer, guidance_embeds=True),
        text_encoder=MistralConfig(
            vocab_size=512, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, intermediate_size=64,
        ),
        steps=50,
        guides="read",
        guidance=4.0,
        abilities=ABLE | {"control", "guidance", "upsample_references"},
    ),
)  # fmt: skip

SPECS: dict[str, Spec] = {
    spec.name: spec for spec in (KLEIN_4B, KLEIN_BASE_4B, KLEIN_9B, KLEIN_BASE_9B, KLEIN_9B_KV, DEV)
}


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> Flux2Config:
    """Sizes of a transformer from its weights' shapes. Raises KeyError where they are not FLUX.2's.

    The rotary axes share a head's features equally, as in the published models.
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
