"""The Z-Image models as data. Sources: config.json and scheduler_config.json of the published repositories."""

from __future__ import annotations

from dataclasses import dataclass, replace

from inkstream.nn.config import Qwen3Config, VAEConfig
from inkstream.types import Spec


@dataclass(frozen=True)
class ZImageConfig:
    """Sizes of the transformer. Names are those of its published config.json."""

    in_channels: int = 16
    dim: int = 3840
    n_layers: int = 30
    n_refiner_layers: int = 2
    n_heads: int = 30
    norm_eps: float = 1e-5
    cap_feat_dim: int = 2560
    siglip_feat_dim: int | None = None  # set for Omni, which sees reference pictures through SigLIP2
    rope_theta: float = 256.0
    t_scale: float = 1000.0
    axes_dims: tuple[int, ...] = (32, 48, 48)  # features of a head for: sequence, row, column
    axes_lens: tuple[int, ...] = (1536, 512, 512)
    patch_size: int = 2


_TINY = Spec(
    name="tiny-z-image-turbo",
    title="Z-Image Turbo at 2 blocks of width 64 (random weights, for tests)",
    family="zimage",
    transformer=ZImageConfig(dim=64, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=32, axes_dims=(8, 12, 12)),
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
    steps=8,
    guidance=1.0,
    shift=3.0,
    size=(64, 64),
    abilities=frozenset({"image", "mask", "regions", "control"}),
    licence="apache-2.0",
    commercial=True,
)

TURBO = Spec(
    name="z-image-turbo",
    title="Z-Image Turbo: distilled to 8 steps, no guidance",
    family="zimage",
    transformer=ZImageConfig(),
    text_encoder=Qwen3Config(),
    vae=VAEConfig(),
    steps=8,
    guidance=1.0,
    shift=3.0,
    abilities=frozenset({"image", "mask", "regions", "control"}),
    repo="Tongyi-MAI/Z-Image-Turbo",
    download_bytes=32_900_000_000,
    licence="apache-2.0",
    commercial=True,
    tiny=_TINY,
)

BASE = replace(
    TURBO,
    name="z-image",
    title="Z-Image: undistilled, guidance and negative prompts",
    steps=50,
    guidance=5.0,
    shift=6.0,
    abilities=frozenset({"image", "mask", "regions", "control", "guidance"}),
    repo="Tongyi-MAI/Z-Image",
    download_bytes=20_700_000_000,
    tiny=replace(
        _TINY,
        name="tiny-z-image",
        steps=50,
        shift=6.0,
        guidance=5.0,
        abilities=frozenset({"image", "mask", "regions", "control", "guidance"}),
    ),
)

OMNI = replace(
    BASE,
    name="z-image-omni",
    title="Z-Image Omni: several pictures in, one out (its weights are not published)",
    transformer=ZImageConfig(siglip_feat_dim=1152),
    abilities=BASE.abilities - {"control"},
    repo=None,
    download_bytes=None,
    tiny=replace(
        _TINY,
        name="tiny-z-image-omni",
        transformer=replace(_TINY.transformer, siglip_feat_dim=24),
        steps=50,
        guidance=5.0,
        abilities=BASE.abilities - {"control"},
    ),
)

POCKET = replace(
    BASE,
    name="pocket",
    title="Pocket: a small Z-Image that ships with inkstream; it draws flat shapes, emoji and short words",
    transformer=ZImageConfig(
        dim=192, n_layers=16, n_refiner_layers=1, n_heads=3, cap_feat_dim=192, axes_dims=(16, 24, 24)
    ),
    text_encoder=Qwen3Config(
        vocab_size=2048,
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=3,
        head_dim=64,
        intermediate_size=512,
    ),
    vae=VAEConfig(
        block_out_channels=(16, 16, 32, 96),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.4117,
        shift_factor=-0.1196,
    ),
    steps=16,
    guidance=4.0,
    shift=4.0,
    size=(128, 128),
    abilities=BASE.abilities - {"control"} | {"upsample"},
    writer="scenes",
    repo=None,
    folder="pocket/weights",
    download_bytes=None,
)

SPECS = (POCKET, TURBO, BASE, OMNI)
