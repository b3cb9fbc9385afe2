"""The FLUX.1 models as data. Sources: config.json and model cards of the published repositories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from inkstream.nn.config import CLIPTextConfig, T5Config, VAEConfig
from inkstream.types import Spec

NON_COMMERCIAL = "FLUX non-commercial"
REDUX_REPO = "black-forest-labs/FLUX.1-Redux-dev"
REDUX_BYTES = 1_010_000_000


@dataclass(frozen=True)
class Flux1Config:
    """Sizes of the transformer. Names are those of its published config.json."""

    in_channels: int = 64  # of a patch of 2 x 2 latent cells, with the channels appended to it
    out_channels: int | None = None  # None: the same as in_channels
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = True
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)  # features of a head for: picture, row, column

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def patch_channels(self) -> int:
        """The channels of a patch without the appended ones."""
        return self.out_channels or self.in_channels


@dataclass(frozen=True)
class SiglipConfig:
    """Sizes of Redux's image encoder, SigLIP so400m at 384 pixels. Names are those of its published config.json."""

    image_size: int = 384
    patch_size: int = 14
    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"

    @property
    def patches(self) -> int:
        """The number of patches of a picture: 729 at the default sizes."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class ReduxConfig:
    """Sizes of Redux's image embedder. Names are those of its published config.json."""

    redux_dim: int = 1152
    txt_in_features: int = 4096


_DEV = Flux1Config()

_TINY = Spec(
    name="tiny-flux1-schnell",
    title="FLUX.1 schnell at 2 + 2 blocks of width 64 (random weights, for tests)",
    family="flux1",
    transformer=Flux1Config(
        num_layers=2, num_single_layers=2, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=32,
        pooled_projection_dim=64, guidance_embeds=False, axes_dims_rope=(4, 14, 14),
    ),
    text_encoder=CLIPTextConfig(
        vocab_size=1000, hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=128
    ),
    text_encoder_2=T5Config(vocab_size=1000, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
    vae=VAEConfig(block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4),
    steps=4,
    guidance=1.0,
    shift=1.0,
    guides="none",
    size=(64, 64),
    abilities=frozenset({"image", "mask", "regions", "control"}),
    licence="apache-2.0",
    commercial=True,
)  # fmt: skip

SCHNELL = Spec(
    name="flux1-schnell",
    title="FLUX.1 schnell: distilled to 4 steps",
    family="flux1",
    transformer=replace(_DEV, guidance_embeds=False),
    text_encoder=CLIPTextConfig(),
    text_encoder_2=T5Config(),
    vae=VAEConfig(),
    steps=4,
    guidance=1.0,
    shift=1.0,
    guides="none",
    abilities=frozenset({"image", "mask", "regions", "control"}),
    repo="black-forest-labs/FLUX.1-schnell",
    download_bytes=33_700_000_000,
    licence="apache-2.0",
    commercial=True,
    tiny=_TINY,
)

_TINY_DEV = replace(
    _TINY,
    name="tiny-flux1-dev",
    transformer=replace(_TINY.transformer, guidance_embeds=True),
    steps=50,
    guidance=3.5,
    guides="read",
    shift_rule="dynamic",
    table=10_000,
    abilities=frozenset({"image", "mask", "regions", "control", "guidance"}),
)
DEV = replace(
    SCHNELL,
    name="flux1-dev",
    title="FLUX.1 dev: reads its guidance",
    transformer=_DEV,
    steps=50,
    guidance=3.5,
    guides="read",
    shift_rule="dynamic",
    table=10_000,
    abilities=frozenset({"image", "mask", "regions", "control", "guidance"}),
    repo="black-forest-labs/FLUX.1-dev",
    licence=NON_COMMERCIAL,
    commercial=False,
    tiny=_TINY_DEV,
)
UNDISTILLED = replace(
    DEV,
    name="flux1-undistilled",
    title="FLUX.1 undistilled, such as OpenFLUX.1: guidance and negative prompts",
    transformer=SCHNELL.transformer,
    steps=28,
    guides="twice",
    repo=None,
    tiny=replace(_TINY_DEV, name="tiny-flux1-undistilled", transformer=_TINY.transformer, steps=28, guides="twice"),
)
"""Its steps are the default of diffusers' FluxPipeline, its guidance is the one that such models recommend. It is not
in SPECS: local folders and files are recognised as it."""
KREA = replace(
    DEV, name="flux1-krea-dev", title="FLUX.1 Krea dev: photographs that look less drawn",
    repo="black-forest-labs/FLUX.1-Krea-dev",
)  # fmt: skip
KONTEXT = replace(
    DEV,
    name="flux1-kontext-dev",
    title="FLUX.1 Kontext dev: changes a picture as it is told",
    steps=30,
    guidance=2.5,
    abilities=DEV.abilities | {"references"},
    repo="black-forest-labs/FLUX.1-Kontext-dev",
    tiny=replace(_TINY_DEV, name="tiny-flux1-kontext-dev", abilities=_TINY_DEV.abilities | {"references"}),
)
FILL = replace(
    DEV,
    name="flux1-fill-dev",
    title="FLUX.1 Fill dev: repaints what is masked, seeing the rest",
    transformer=replace(_DEV, in_channels=384, out_channels=64),  # appended: the masked picture's latents, the mask
    guidance=30.0,
    abilities=DEV.abilities | {"fill"},
    repo="black-forest-labs/FLUX.1-Fill-dev",
    tiny=replace(
        _TINY_DEV,
        name="tiny-flux1-fill-dev",
        transformer=replace(_TINY_DEV.transformer, in_channels=384, out_channels=64),
        guidance=30.0,
        abilities=_TINY_DEV.abilities | {"fill"},
    ),
)
CANNY = replace(
    DEV,
    name="flux1-canny-dev",
    title="FLUX.1 Canny dev: follows a map of edges, given as reference",
    transformer=replace(_DEV, in_channels=128, out_channels=64),  # appended: the latents of the map
    guidance=30.0,
    abilities=DEV.abilities | {"map"},
    repo="black-forest-labs/FLUX.1-Canny-dev",
    tiny=replace(
        _TINY_DEV,
        name="tiny-flux1-canny-dev",
        transformer=replace(_TINY_DEV.transformer, in_channels=128, out_channels=64),
        guidance=30.0,
        abilities=_TINY_DEV.abilities | {"map"},
    ),
)
DEPTH = replace(
    CANNY, name="flux1-depth-dev", title="FLUX.1 Depth dev: follows a map of depths, given as reference",
    guidance=10.0, repo="black-forest-labs/FLUX.1-Depth-dev",
)  # fmt: skip


def with_redux(spec: Spec, image_encoder: SiglipConfig, image_embedder: ReduxConfig) -> Spec:
    """The Spec of a model with Redux attached, which makes it take references."""
    return replace(
        spec,
        image_encoder=image_encoder,
        image_embedder=image_embedder,
        abilities=spec.abilities | {"references"},
        licence=NON_COMMERCIAL,
        commercial=False,
    )


def _redux(spec: Spec, tiny: Spec, name: str) -> Spec:
    sizes = replace(SiglipConfig(), image_size=56, hidden_size=24, intermediate_size=32, num_hidden_layers=2,
                    num_attention_heads=2)  # fmt: skip
    return replace(
        with_redux(spec, SiglipConfig(), ReduxConfig()),
        name=name,
        title=f"{spec.title.partition(':')[0]} with Redux: draws what resembles a reference",
        download_bytes=spec.download_bytes + REDUX_BYTES,  # type: ignore[operator]
        tiny=replace(
            with_redux(tiny, sizes, ReduxConfig(24, tiny.transformer.joint_attention_dim)), name=f"tiny-{name}"
        ),
    )


REDUX_DEV = replace(_redux(DEV, _TINY_DEV, "flux1-redux-dev"), guidance=2.5)
REDUX_SCHNELL = _redux(SCHNELL, _TINY, "flux1-redux-schnell")

SPECS: dict[str, Spec] = {
    spec.name: spec for spec in (SCHNELL, DEV, KREA, KONTEXT, FILL, CANNY, DEPTH, REDUX_DEV, REDUX_SCHNELL)
}


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> Flux1Config:
    """Sizes of a transformer from its weights' shapes. Raises KeyError where they are not FLUX.1's.

    The rotary axes take 1/8, 7/16 and 7/16 of a head's features, as in the published models.
    """
    in_channels = shapes["img_in.weight"][1]
    dim = shapes["double_blocks.0.img_mod.lin.weight"][1]  # FLUX.2's blocks have no modulation weights
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
