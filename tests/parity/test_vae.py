"""Our autoencoder against diffusers' on its own random tiny weights, loaded through our key tables."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from inkstream.families.parts import AUTOENCODER, infer_autoencoder
from inkstream.nn.config import VAEConfig, read_config
from inkstream.nn.vae import Autoencoder
from inkstream.weights.keymap import translate
from rounding import agree, roundings

FLUX = {"block_out_channels": (8, 16, 16, 16), "layers_per_block": 2, "norm_num_groups": 4, "latent_channels": 16}
WIDE = {"block_out_channels": (32, 64, 96, 96), "layers_per_block": 1, "norm_num_groups": 32, "latent_channels": 4}
SHALLOW = {"block_out_channels": (8, 24), "layers_per_block": 3, "norm_num_groups": 4, "latent_channels": 2}
CASES = pytest.mark.parametrize(
    ("sizes", "attention", "std"),
    [(FLUX, True, 0.15), (FLUX, False, 0.15), (WIDE, True, 0.15), (SHALLOW, True, 0.15), (FLUX, True, 0.01)],
    ids=["flux", "without attention", "wide", "shallow", "faint"],
)


def reference(sizes: dict, attention: bool, std: float = 0.15) -> AutoencoderKL:
    torch.manual_seed(0)
    levels = len(sizes["block_out_channels"])
    model = AutoencoderKL(
        **sizes, down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=attention, scaling_factor=0.3611,
        shift_factor=0.1159,
    ).eval().requires_grad_(False)  # fmt: skip
    for name, weight in model.named_parameters():
        weight.normal_(mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=std)
    return model


def ours_of(theirs: AutoencoderKL, state: dict[str, torch.Tensor]) -> Autoencoder:
    ours = Autoencoder(read_config(VAEConfig, theirs.config)).eval().requires_grad_(False)
    ours.load_state_dict(state)
    return ours


@CASES
@pytest.mark.parametrize("cells", [(4, 6), (7, 3), (1, 1)], ids=str)
@torch.no_grad()
def test_pictures_and_latents_equal_the_references(sizes, attention, std, cells):
    """Faint weights make activations so small that the norms' epsilon is seen."""
    theirs = reference(sizes, attention, std)
    ours = ours_of(theirs, translate(AUTOENCODER.layouts["diffusers"], theirs.state_dict()))
    down = ours.config.downscale
    pixels = torch.rand(2, 3, cells[0] * down, cells[1] * down) * 2 - 1
    posterior = theirs.encode(pixels).latent_dist
    mean, log_variance = ours.encode_moments(pixels)
    agree(mean, posterior.mean, roundings(theirs.encoder))
    agree(log_variance, posterior.logvar, roundings(theirs.encoder))
    latents = (posterior.mode() - theirs.config.shift_factor) * theirs.config.scaling_factor
    agree(ours.encode(pixels), latents, roundings(theirs.encoder))

    latents = torch.randn(2, sizes["latent_channels"], *cells)
    expected = theirs.decode(latents / theirs.config.scaling_factor + theirs.config.shift_factor).sample
    assert expected.std() > std / 2
    agree(ours.decode(latents), expected, roundings(theirs.decoder))
    agree(ours.decode(latents, tile=2), expected, roundings(theirs.decoder))


@pytest.mark.parametrize("attention", [True, False])
@torch.no_grad()
def test_the_single_file_we_write_is_read_by_diffusers_and_by_us(attention):
    theirs = reference(FLUX, attention)
    state, rules = theirs.state_dict(), AUTOENCODER.layouts["ldm"]
    written = translate(rules, state, back=True)
    assert not written.keys() & {name for name in state if "conv_in" not in name and "coder.conv_out" not in name}
    for read in (convert_ldm_vae_checkpoint(written, theirs.config), translate(rules, written)):
        assert read.keys() == state.keys()
        assert all(torch.equal(read[name], weight) for name, weight in state.items())
    ours, latents = ours_of(theirs, translate(rules, written)), torch.randn(1, 16, 3, 2)
    expected = theirs.decode(latents / theirs.config.scaling_factor + theirs.config.shift_factor).sample
    agree(ours.decode(latents), expected, roundings(theirs.decoder))


def test_the_published_sizes_are_told_from_the_references_shapes():
    with torch.device("meta"):
        theirs = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=16, use_quant_conv=False,
            use_post_quant_conv=False,
        )  # fmt: skip
        ours = Autoencoder(VAEConfig())
    shapes = {name: tuple(weight.shape) for name, weight in theirs.state_dict().items()}
    assert shapes == {name: tuple(weight.shape) for name, weight in ours.state_dict().items()}
    assert infer_autoencoder(shapes) == VAEConfig()
