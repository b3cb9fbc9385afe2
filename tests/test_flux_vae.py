"""Facts of FLUX.2's autoencoder that need no reference: counts, keys, the order of packing, the norm, tiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from inkstream.families import parts
from inkstream.families.flux_autoencoder import AUTOENCODER, infer_autoencoder
from inkstream.nn.config import Flux2VAEConfig, VAEConfig
from inkstream.nn.vae import TILE, Flux2Autoencoder, LatentNorm, tile_area, tile_for
from inkstream.types import InputError
from inkstream.weights.keymap import translate

TINY = Flux2VAEConfig(
    latent_channels=4, block_out_channels=(8, 16, 16, 16), layers_per_block=1, norm_num_groups=4
)  # fmt: skip
SMALL = replace(TINY, decoder_block_out_channels=(4, 8, 8, 8))
BARE = replace(TINY, use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False)
CONFIGS = pytest.mark.parametrize("config", [TINY, SMALL, BARE], ids=["full", "small decoder", "bare"])
PUBLISHED = Flux2VAEConfig()
PUBLISHED_SMALL = replace(PUBLISHED, decoder_block_out_channels=(96, 192, 384, 384))
LDM = AUTOENCODER.layouts["ldm"]


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def autoencoder(config: Flux2VAEConfig, seed: int = 0) -> Flux2Autoencoder:
    """Random weights and statistics, large enough that what comes out is far from flat."""
    model = Flux2Autoencoder(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        is_scale = "norm" in name and name.endswith("weight")
        weight.normal_(mean=1.0 if is_scale else 0.0, std=0.2, generator=generator)
    model.bn.running_mean.normal_(generator=generator)
    model.bn.running_var.uniform_(2.9, 3.5, generator=generator)
    return model


def smooth(batch: int, height: int, width: int) -> Tensor:
    coarse = torch.rand(batch, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return F.interpolate(coarse, size=(height, width), mode="bicubic")


def apart(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


def on_meta(config: Flux2VAEConfig) -> Flux2Autoencoder:
    with torch.device("meta"):
        return Flux2Autoencoder(config)


# Sizes and keys -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "count", "of_decoder"), [(PUBLISHED, 84_046_115, 49_619_203), (PUBLISHED_SMALL, 62_373_091, 27_946_179)]
)
def test_the_full_models_have_the_published_numbers_of_parameters(config, count, of_decoder):
    model = on_meta(config)
    assert sum(p.numel() for p in model.parameters()) == count
    assert sum(p.numel() for p in model.decoder.parameters()) == of_decoder


def test_the_published_single_file_keeps_the_quantising_convolutions_inside_and_the_statistics_outside():
    theirs = translate(LDM, on_meta(PUBLISHED_SMALL).state_dict(), back=True)
    assert theirs["encoder.quant_conv.weight"].shape == (64, 64, 1, 1)
    assert theirs["decoder.post_quant_conv.bias"].shape == (32,)
    assert theirs["bn.running_mean"].shape == theirs["bn.running_var"].shape == (128,)
    assert theirs["decoder.up.0.block.0.conv1.bias"].shape == (96,)
    assert theirs["encoder.down.0.block.0.conv1.bias"].shape == (128,)
    assert theirs["decoder.mid.attn_1.q.weight"].shape == (384, 384, 1, 1)


@CONFIGS
@pytest.mark.parametrize("layout", AUTOENCODER.layouts)
def test_each_layout_round_trips_to_the_identity(layout, config):
    state, rules = autoencoder(config).state_dict(), AUTOENCODER.layouts[layout]
    theirs = {**translate(rules, state, back=True), "bn.num_batches_tracked": torch.tensor(7)}
    back = translate(rules, theirs)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_a_single_file_whose_quantising_convolutions_lie_outside_is_read_too():
    state = autoencoder(TINY).state_dict()
    theirs = translate(LDM, state, back=True)
    inside = [key for key in theirs if "quant_conv" in key]
    outside = {key.split(".", 1)[1] if key in inside else key: tensor for key, tensor in theirs.items()}
    assert {"quant_conv.weight", "post_quant_conv.weight"} <= outside.keys()
    assert translate(LDM, outside).keys() == state.keys()


@pytest.mark.parametrize(
    "config",
    [PUBLISHED, PUBLISHED_SMALL, replace(PUBLISHED, use_quant_conv=False), replace(PUBLISHED, latent_channels=8)],
    ids=["published", "small decoder", "without a convolution", "other channels"],
)
def test_sizes_are_told_from_the_shapes(config):
    assert infer_autoencoder({name: tuple(w.shape) for name, w in on_meta(config).state_dict().items()}) == config


def test_neither_generations_file_is_taken_for_the_others():
    with torch.device("meta"):
        first = parts.AUTOENCODER.build(VAEConfig()).state_dict()
    with pytest.raises(KeyError, match=r"bn\.running_mean"):
        infer_autoencoder({name: tuple(weight.shape) for name, weight in first.items()})
    second = on_meta(PUBLISHED).state_dict()
    config = parts.infer_autoencoder({name: tuple(weight.shape) for name, weight in second.items()})
    with torch.device("meta"):
        expected = parts.AUTOENCODER.build(config).state_dict()
    assert {"quant_conv.weight", "bn.running_var"} <= second.keys() - expected.keys()


# Latents --------------------------------------------------------------------------------------------------------------


@CONFIGS
def test_a_picture_becomes_latents_of_a_sixteenth_and_a_picture_of_its_size_again(config):
    model = autoencoder(config)
    assert (config.downscale, config.packed_channels) == (16, 16)
    pixels = smooth(2, 32, 48)
    latents = model.encode(pixels)
    assert latents.shape == (2, 16, 2, 3)
    drawn = model.decode(latents)
    assert drawn.shape == pixels.shape
    assert drawn.is_contiguous()
    assert drawn.std() > 0.05


def test_four_cells_become_one_channel_by_channel_then_row_by_row():
    model = Flux2Autoencoder(TINY)
    raw = torch.randn(1, 4, 6, 4)
    packed = model.normalize(raw) * (1 + 1e-4) ** 0.5
    assert packed.shape == (1, 16, 3, 2)
    for channel in range(4):
        for row in range(2):
            for column in range(2):
                got, expected = packed[0, channel * 4 + row * 2 + column], raw[0, channel, row::2, column::2]
                assert apart(got, expected) <= 1e-6


def test_latents_are_centred_and_scaled_by_the_files_statistics_with_their_own_epsilon():
    norm = LatentNorm(3, eps=1e-4)
    norm.running_mean.copy_(torch.tensor([1.0, -2.0, 0.0]))
    norm.running_var.copy_(torch.tensor([4.0, 0.25, 0.0]))
    x = torch.ones(1, 3, 1, 1)
    expected = torch.tensor([0.0, 3 / 0.2501**0.5, 100.0]).view(1, 3, 1, 1)
    assert apart(norm(x), expected) <= 1e-4
    assert apart(norm.undo(norm(x)), x) <= 1e-6


def test_training_leaves_the_statistics_as_they_are():
    model = autoencoder(TINY).train()
    before = model.bn.running_mean.clone(), model.bn.running_var.clone(), model.eval().encode(smooth(1, 16, 16))
    model.train()
    assert torch.equal(model.encode(smooth(1, 16, 16)), before[2])
    assert torch.equal(model.bn.running_mean, before[0])
    assert torch.equal(model.bn.running_var, before[1])


def test_what_is_decoded_was_brought_back_to_the_raw_latents_first():
    model = autoencoder(TINY).double()
    raw, _ = model.encode_moments(smooth(1, 32, 32).double())
    expected = model.decoder(model.post_quant_conv(raw), None)
    assert apart(model.decode(model.normalize(raw)), expected) <= 1e-9
    assert apart(model.encode(smooth(1, 32, 32).double()), model.normalize(raw)) == 0


@pytest.mark.parametrize(
    ("height", "width", "said"), [(40, 32, "32 by 32"), (16, 24, "16 by 16"), (17, 49, "48 by 16"), (8, 16, "16 by 16")]
)
def test_sides_that_do_not_fit_are_named_with_the_nearest_that_do(height, width, said):
    with pytest.raises(InputError, match=f"{width} by {height} pixels are not multiples of 16.*{said}"):
        autoencoder(TINY).encode(torch.zeros(1, 3, height, width))


# Tiles ----------------------------------------------------------------------------------------------------------------


@CONFIGS
@pytest.mark.parametrize("tile", [1, 2, 100])
def test_tiles_leave_no_seam(config, tile):
    model, pixels = autoencoder(config), smooth(2, 80, 48)
    whole = model.encode(pixels)
    assert apart(model.encode(pixels, tile), whole) <= 1e-4
    assert apart(model.decode(whole, tile), model.decode(whole)) <= 1e-4


def test_tiles_begin_at_the_same_pixels_whatever_a_cell_is():
    assert tile_for(1, 64, 64, cell=16) is None
    assert tile_for(1, 64, 65, cell=16) == TILE // 2
    assert tile_area(tile_for(1, 64, 65, cell=16), 16) == tile_area(tile_for(1, 128, 130), 8) == (TILE * 8) ** 2
