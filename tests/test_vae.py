"""Facts of the autoencoder that need no reference: counts, keys, scale, and tiles that change nothing but memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inkstream.families.parts import AUTOENCODER, infer_autoencoder
from inkstream.families.zimage.family import ZImage
from inkstream.families.zimage.specs import TURBO
from inkstream.nn.config import VAEConfig
from inkstream.nn.vae import TILE, WHOLE, Autoencoder, GroupNorm, band_rows, in_bands, tile_for
from inkstream.types import InputError
from inkstream.weights.keymap import translate

TINY = TURBO.tiny.vae
DEEP = VAEConfig(block_out_channels=(8, 16), layers_per_block=2, norm_num_groups=4, latent_channels=4)
PLAIN = replace(TINY, mid_block_add_attention=False)
CONFIGS = pytest.mark.parametrize("config", [TINY, DEEP, PLAIN], ids=["tiny", "deep", "plain"])
LDM = AUTOENCODER.layouts["ldm"]
STEP = 2 / 255
"""One of 255 steps of a picture in [-1, 1]."""


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def autoencoder(config: VAEConfig, seed: int = 0) -> Autoencoder:
    """Random weights, large enough that what comes out is far from flat."""
    model = Autoencoder(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        is_scale = "norm" in name and name.endswith("weight")
        weight.normal_(mean=1.0 if is_scale else 0.0, std=0.2, generator=generator)
    return model


def smooth(batch: int, height: int, width: int, channels: int = 3) -> Tensor:
    """A gradient that curves, of another slope in each picture and channel."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(batch, channels, 4, 4, generator=generator) * 2 - 1
    return F.interpolate(coarse, size=(height, width), mode="bicubic")


def apart(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    return float((a - b).abs().max())


# Sizes, keys, scale ---------------------------------------------------------------------------------------------------


def test_the_full_model_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = Autoencoder(VAEConfig())
    assert sum(p.numel() for p in model.parameters()) == 83_819_683


def test_the_published_single_file_has_244_keys_and_its_decoder_counts_from_the_pixels():
    with torch.device("meta"):
        state = Autoencoder(VAEConfig()).state_dict()
    theirs = translate(LDM, state, back=True)
    assert len(state) == len(theirs) == 244
    assert theirs["decoder.up.0.block.0.nin_shortcut.weight"].shape == (128, 256, 1, 1)
    assert theirs["decoder.up.3.upsample.conv.weight"].shape == (512, 512, 3, 3)
    assert theirs["encoder.down.2.downsample.conv.bias"].shape == (512,)
    assert theirs["decoder.mid.attn_1.proj_out.weight"].shape == (512, 512, 1, 1)
    assert theirs["encoder.mid.block_2.norm1.weight"].shape == (512,)
    assert theirs["decoder.norm_out.bias"].shape == (128,)
    assert not any(word in key for key in theirs for word in ("blocks", "resnets", "attentions", "conv_norm_out"))


@pytest.mark.parametrize("config", [TINY, PLAIN, VAEConfig(layers_per_block=3)], ids=["tiny", "plain", "full width"])
@pytest.mark.parametrize("layout", AUTOENCODER.layouts)
def test_each_layout_round_trips_to_the_identity(layout, config):
    with torch.device("meta" if config.block_out_channels[0] > 100 else "cpu"):
        state = Autoencoder(config).state_dict()
    back = translate(AUTOENCODER.layouts[layout], translate(AUTOENCODER.layouts[layout], state, back=True))
    assert back.keys() == state.keys()
    assert all(back[key].shape == state[key].shape for key in state)
    assert all(back[key].is_meta or torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize(
    "config",
    [VAEConfig(), VAEConfig(layers_per_block=3, latent_channels=4), VAEConfig(mid_block_add_attention=False)],
    ids=["published", "other", "plain"],
)
def test_sizes_are_told_from_the_shapes(config):
    with torch.device("meta"):
        shapes = {name: tuple(weight.shape) for name, weight in Autoencoder(config).state_dict().items()}
    assert infer_autoencoder(shapes) == config


@CONFIGS
def test_a_picture_becomes_latents_and_a_picture_of_its_size_again(config):
    model, down = autoencoder(config), config.downscale
    pixels = smooth(2, 3 * down, 5 * down)
    latents = model.encode(pixels)
    assert latents.shape == (2, config.latent_channels, 3, 5)
    drawn = model.decode(latents)
    assert drawn.shape == pixels.shape
    assert drawn.is_contiguous()
    assert drawn.std() > 0.05


def test_latents_are_shifted_then_scaled_and_back():
    config = replace(DEEP, shift_factor=0.5, scaling_factor=4.0)
    ours, raw = autoencoder(config), autoencoder(replace(config, shift_factor=0.0, scaling_factor=1.0))
    pixels = smooth(1, 8, 8)
    mean, log_variance = ours.encode_moments(pixels)
    assert mean.shape == log_variance.shape
    assert torch.equal(mean, raw.encode(pixels))
    assert torch.equal(ours.encode(pixels), (mean - 0.5) * 4)
    assert apart(ours.decode(ours.encode(pixels)), raw.decode(mean)) <= 1e-5


def test_the_log_variance_stays_where_its_exponential_is_finite():
    model = autoencoder(DEEP)
    model.encoder.conv_out.bias[: DEEP.latent_channels] = 1000
    for bias, bound in ((1000, 20), (-1000, -30)):
        model.encoder.conv_out.bias[DEEP.latent_channels :] = bias
        mean, log_variance = model.encode_moments(smooth(1, 8, 8))
        assert log_variance.unique().tolist() == [bound]
        assert mean.min() > 900  # only the variance is bounded


@pytest.mark.parametrize("tile", [None, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_dtype_is_kept(dtype, tile):
    model = autoencoder(DEEP).to(dtype)
    latents = model.encode(smooth(1, 16, 12).to(dtype), tile)
    assert latents.dtype == dtype
    assert model.decode(latents, tile).dtype == dtype


@pytest.mark.parametrize(
    ("height", "width", "said"), [(20, 16, "16 by 16"), (16, 31, "24 by 16"), (7, 8, "8 by 8"), (17, 9, "8 by 16")]
)
def test_sides_that_do_not_fit_are_named_with_the_nearest_that_do(height, width, said):
    with pytest.raises(InputError, match=f"{width} by {height} pixels.*multiples of 8.*{said}") as caught:
        autoencoder(TINY).encode(torch.zeros(1, 3, height, width))
    assert "\n" not in str(caught.value)


def test_gradients_flow_through_the_whole_way_in_and_out():
    model = autoencoder(DEEP)
    pixels = smooth(1, 8, 8).requires_grad_()
    with torch.enable_grad():
        model.decode(model.encode(pixels)).square().sum().backward()
    assert pixels.grad is not None
    assert (pixels.grad != 0).float().mean() > 0.9


# Tiles ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, DEEP], ids=["tiny", "deep"])
@pytest.mark.parametrize("tile", [1, 3, 100])
@pytest.mark.parametrize("cells", [(1, 1), (3, 2), (9, 5), (11, 13), (31, 1)], ids=str)
def test_tiles_leave_no_seam(config, tile, cells):
    model = autoencoder(config)
    pixels = smooth(2, *(side * config.downscale for side in cells))
    whole = model.encode(pixels)
    assert apart(model.encode(pixels, tile), whole) <= 1e-4 < 1 / 255
    assert apart(model.decode(whole, tile), model.decode(whole)) <= 1e-4 < STEP


def test_tiles_leave_no_seam_at_the_published_depth_and_a_smooth_picture_of_full_contrast():
    config = VAEConfig(block_out_channels=(32, 32, 64, 64), norm_num_groups=32)
    model = autoencoder(config)
    pixels = smooth(1, 200, 136)
    pixels = pixels / pixels.abs().max()
    latents = model.encode(pixels)
    assert apart(model.encode(pixels, 4), latents) <= 1 / 255
    tiled, whole = model.decode(latents, 4), model.decode(latents)
    assert whole.std() > 0.2
    assert apart(tiled, whole) <= STEP
    for border in (slice(0, 8), slice(-8, None)):
        assert apart(tiled[:, :, border], whole[:, :, border]) <= STEP
        assert apart(tiled[..., border], whole[..., border]) <= STEP


@pytest.mark.parametrize("tile", [None, 2])
def test_what_is_given_is_not_written_over(tile):
    model = autoencoder(DEEP)
    for layout in (torch.contiguous_format, torch.channels_last):
        pixels = smooth(2, 16, 12).contiguous(memory_format=layout)
        latents = model.encode(pixels).contiguous(memory_format=layout)
        before = pixels.clone(), latents.clone()
        model.encode(pixels, tile)
        model.decode(latents, tile)
        assert torch.equal(pixels, before[0])
        assert torch.equal(latents, before[1])


@pytest.mark.parametrize("which", ["encoder", "decoder"])
def test_with_tiles_no_convolution_meets_more_than_a_tile_and_its_rim(which):
    model, tile, side = autoencoder(TINY), 3, 16 * 8
    sizes: list[int] = []
    for module in getattr(model, which).modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda conv, args, out: sizes.append(out[0, 0].numel()))
    run = {"encoder": lambda tile: model.encode(smooth(1, side, side), tile),
           "decoder": lambda tile: model.decode(smooth(1, 16, 16, 16), tile)}[which]  # fmt: skip
    run(None)
    whole = max(sizes)
    sizes.clear()
    run(tile)
    assert whole >= side**2
    assert max(sizes) <= (tile * 8) ** 2 + 6 * side  # up to two rows on either side, twice as many after upsampling


@pytest.mark.parametrize("height", [2, 7, 8, 64])
@pytest.mark.parametrize("area", [1, 12, 40, 10_000])
@pytest.mark.parametrize("scale", [1, 2])
def test_bands_cover_every_row_once_and_in_order(height, area, scale):
    x = torch.arange(float(height)).view(1, 1, -1, 1).expand(1, 1, height, 4)
    met = []

    def layer(band: Tensor) -> Tensor:
        met.append(band.shape[2])
        return band.repeat_interleave(scale, dim=2)

    assert torch.equal(in_bands(layer, x, area, scale=scale), x.repeat_interleave(scale, dim=2))
    rows = band_rows(x, area)
    assert rows % 2 == 0
    assert len(met) == -(-height // rows)
    assert max(met) <= rows + 2


def test_a_picture_of_1024_pixels_a_side_is_worked_on_whole_and_more_in_tiles():
    with torch.no_grad():
        assert tile_for(1, 128, 128) is None
        assert tile_for(1, 128, 130) == TILE
        assert tile_for(4, 64, 64) is None
        assert tile_for(5, 64, 64) == TILE
        assert tile_for(2, 128, 128) == TILE
    assert TILE**2 < WHOLE


def test_where_gradients_are_recorded_nothing_is_written_over():
    with torch.enable_grad():
        assert tile_for(9, 512, 512) is None


def test_the_family_takes_tiles_for_a_large_picture_alone():
    config = replace(PLAIN, block_out_channels=(2, 2, 2, 2), norm_num_groups=1, latent_channels=2)
    model = autoencoder(config)
    modules = {"transformer": nn.Identity(), "text_encoder": nn.Identity(), "vae": model}
    family = ZImage(replace(TURBO.tiny, vae=config), modules, {"tokenizer": None})
    calls: list[int] = []
    for conv in (model.encoder.conv_in, model.decoder.conv_out):
        conv.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    for height, width, several in ((64, 64, False), (1024, 1040, True)):
        pixels = smooth(1, height, width) / 2 + 0.5
        calls.clear()
        latents = family.encode_image(pixels)
        assert (len(calls) > 1) == several
        assert latents.shape == (1, 2, height // 8, width // 8)
        assert apart(latents, model.encode(pixels * 2 - 1)) <= 1e-4
        calls.clear()
        drawn = family.decode(latents)
        assert (len(calls) > 1) == several
        assert apart(drawn, (model.decode(latents) / 2 + 0.5).clamp(0, 1)) <= 1e-4


# Norms ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("area", [None, 6, 40])
@pytest.mark.parametrize("offset", [0.0, 20.0, 500.0])
def test_the_group_norm_is_exact_in_channels_last_and_from_bands(area, offset):
    norm = GroupNorm(4, 8).requires_grad_(False)
    norm.weight.copy_(torch.linspace(0.5, 2, 8))
    norm.bias.copy_(torch.linspace(-1, 1, 8))
    x = torch.randn(2, 8, 9, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + offset
    expected = F.group_norm(x, 4, norm.weight.double(), norm.bias.double(), eps=1e-6)
    single = x.float().contiguous(memory_format=torch.channels_last)
    scale, shift = norm.scale_and_shift(single, area)
    # A float32 of 500 is itself good to 3e-5.
    assert apart(torch.addcmul(shift, single, scale).double(), expected) <= 2e-6 * max(offset, 1)
    assert apart(norm(single).double(), expected) <= 2e-6 * max(offset, 1)


def test_the_group_norm_that_is_trained_has_the_same_value_and_gradient():
    norm = GroupNorm(4, 8)
    x = torch.randn(2, 8, 9, 5, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last)
    plain = x.double().requires_grad_()
    with torch.enable_grad():
        x.requires_grad_()
        (norm(x) ** 3).sum().backward()
        (F.group_norm(plain, 4, eps=1e-6) ** 3).sum().backward()
        trained = norm(x).detach()
    assert apart(trained, norm(x)) <= 1e-5
    assert apart(x.grad.double(), plain.grad) <= 1e-4
