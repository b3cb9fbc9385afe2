"""The Qwen-Image 2.1 models as data. Sources: diffusers 0.42.1, and what is published about the repositories."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from inkstream.nn.config import Qwen3VLConfig
from inkstream.types import Spec

LICENCE = "Qwen Research"
ABLE = frozenset({"image", "mask"})


@dataclass(frozen=True)
class QwenImageConfig:
    """Sizes of the transformer. Names are those of its published config.json."""

    in_channels: int = 64
    out_channels: int | None = 64
    num_layers: int = 32
    attention_head_dim: int = 128
    num_attention_heads: int = 32
    context_in_dim: int = 4096
    mlp_ratio: int = 3
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)  # features of a head for: place in the text, row, column

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def joint_attention_dim(self) -> int:
        """The width of the text's states, under the name that other models have for it."""
        return self.context_in_dim


@dataclass(frozen=True)
class QwenImageTextConfig(Qwen3VLConfig):
    """The text encoder, Qwen3-VL-8B. Its last state is read, without the final norm."""

    hidden_size: int = 4096
    intermediate_size: int = 12_288

    @property
    def depths(self) -> tuple[int, ...]:
        return (self.num_hidden_layers,)


@dataclass(frozen=True)
class QwenImageVAEConfig:
    """The autoencoder, of pictures with transparency. Names are those of its published config.json."""

    base_dim: int = 96
    decoder_base_dim: int | None = 144  # None: the encoder's
    z_dim: int = 64
    dim_mult: tuple[int, ...] = (1, 2, 4, 8, 8)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True, True)  # levels that halve the frames of a video too
    in_channels: int = 4
    out_channels: int = 4
    latents_mean: tuple[float, ...] = (
        0.5126, 0.7721, -0.0631, 1.3506, -0.7855, -2.1025, -0.3458, 1.3722, 1.8873, -1.7177, -0.651, 0.2732, 0.7562,
        -0.6163, -1.0277, 3.8363, 2.021, 0.0472, 0.932, 2.0087, 2.4954, -0.1391, -1.4249, 1.8464, -0.5236, 1.2826,
        3.7046, -1.3035, 2.7286, -1.4518, -1.9036, -1.9955, -0.0342, -1.0265, -0.7636, 3.0555, 0.0746, -3.0751,
        -0.1076, 1.7376, -1.0914, -1.9435, -0.2784, -1.368, 0.4809, -0.4433, 0.3764, 0.5729, -2.0595, 1.096, -1.326,
        -2.0211, -5.0179, 0.5275, 4.0162, 1.8505, 0.3026, 1.9373, 1.4937, 0.2632, 0.5547, -1.7121, -0.1562, 0.0304,
    )  # fmt: skip
    latents_std: tuple[float, ...] = (
        3.2001, 3.2936, 3.4321, 3.0091, 3.1061, 4.0379, 4.0705, 3.791, 3.0785, 3.65, 3.9308, 3.0904, 2.8778, 3.7675,
        3.732, 5.0756, 3.2864, 4.0397, 3.1317, 4.0443, 2.9249, 3.9454, 3.0988, 4.2489, 3.4896, 3.8513, 3.9323, 3.4719,
        3.7498, 4.283, 3.5694, 4.2467, 3.9037, 3.2947, 5.077, 3.5075, 3.27, 3.4767, 2.8063, 5.1125, 3.5327, 4.7833,
        3.1286, 4.1819, 3.8527, 3.8312, 3.5605, 4.3875, 3.9624, 4.0168, 3.5643, 4.055, 5.5614, 4.2963, 4.408, 3.4959,
        3.8747, 3.7608, 3.5735, 3.149, 3.7662, 3.6746, 3.4563, 3.8161,
    )  # fmt: skip

    @property
    def downscale(self) -> int:
        """Pixels per latent cell along one side."""
        return 2 ** (len(self.dim_mult) - 1)


_TINY = Spec(
    name="tiny-qwen-image-2.1",
    title="Qwen-Image 2.1 at 2 blocks of width 64 (random weights, for tests)",
    family="qwenimage",
    transformer=QwenImageConfig(
        in_channels=8, out_channels=8, num_layers=2, attention_head_dim=32, num_attention_heads=2, context_in_dim=32,
        axes_dims_rope=(4, 14, 14),
    ),
    text_encoder=QwenImageTextConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=64,
    ),
    vae=QwenImageVAEConfig(
        base_dim=8, decoder_base_dim=12, z_dim=8, dim_mult=(1, 2, 2, 2, 2), num_res_blocks=1,
        latents_mean=(0.5, -0.3, 0.1, 0.0, 1.0, -1.0, 0.2, 0.4), latents_std=(1.5, 2.0, 1.0, 0.8, 1.2, 1.1, 0.9, 1.3),
    ),
    steps=40,
    guidance=1.0,
    shift=1.0,
    shift_rule="dynamic",
    size=(64, 64),
    abilities=ABLE,
    licence=LICENCE,
)  # fmt: skip

BASE = Spec(
    name="qwen-image-2.1",
    title="Qwen-Image 2.1, 7B: pictures with transparency, meant for no guidance",
    family="qwenimage",
    transformer=QwenImageConfig(),
    text_encoder=QwenImageTextConfig(),
    vae=QwenImageVAEConfig(),
    steps=40,
    guidance=1.0,
    shift=1.0,
    shift_rule="dynamic",
    abilities=ABLE,
    repo="Qwen/Qwen-Image-2.1",
    download_bytes=33_000_000_000,
    licence=LICENCE,
    tiny=_TINY,
)

TURBO_TIMES = (1.0, 0.978453, 0.95418, 0.926626, 0.89508, 0.845148, 0.704534, 0.414568, 0.0)
TURBO = replace(
    BASE,
    name="qwen-image-2.1-turbo",
    title="Qwen-Image 2.1 Turbo: distilled to 8 steps, pictures with transparency",
    steps=8,
    guides="none",
    shift_rule="fixed",
    times=TURBO_TIMES,
    repo="Qwen/Qwen-Image-2.1-Turbo",
    tiny=replace(
        _TINY, name="tiny-qwen-image-2.1-turbo", steps=8, guides="none", shift_rule="fixed", times=TURBO_TIMES
    ),
)

SPECS: dict[str, Spec] = {spec.name: spec for spec in (TURBO, BASE)}


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> QwenImageConfig:
    """Sizes of a transformer from its weights' shapes. Raises KeyError where they are not Qwen-Image 2.1's.

    The rotary axes share a head's features as in the published model.
    """
    _ = shapes["txt_in.text_norm.weight"]
    dim, in_channels = shapes["img_in.weight"]
    (head,) = shapes["transformer_blocks.0.attn.norm_q.weight"]
    return QwenImageConfig(
        in_channels=in_channels,
        out_channels=shapes["proj_out.weight"][0],
        num_layers=len({name.split(".")[1] for name in shapes if name.startswith("transformer_blocks.")}),
        attention_head_dim=head,
        num_attention_heads=dim // head,
        context_in_dim=shapes["txt_in.in_layer.weight"][1],
        mlp_ratio=shapes["transformer_blocks.0.img_mlp.proj.weight"][0] // dim,
        axes_dims_rope=(head // 8, head * 7 // 16, head * 7 // 16),
    )
