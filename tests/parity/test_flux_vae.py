"""FLUX.2's autoencoder and reference pictures against diffusers', its pipeline's norm of the latents included."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image
from safetensors.torch import save_file

from inkstream.families.flux_autoencoder import AUTOENCODER
from inkstream.families.references import SEVERAL_AREA, join_references, prepare_references
from inkstream.nn.config import Flux2VAEConfig, read_config
from inkstream.nn.vae import Flux2Autoencoder
from inkstream.weights.keymap import translate
from rounding import agree, roundings

FULL = {"block_out_channels": (8, 16, 16, 16), "layers_per_block": 2, "norm_num_groups": 4, "latent_channels": 8}
SMALL = {**FULL, "decoder_block_out_channels": (4, 12, 12, 12)}
BARE = {**FULL, "use_quant_conv": False, "use_post_quant_conv": False, "mid_block_add_attention": False}
CASES = pytest.mark.parametrize("sizes", [FULL, SMALL, BARE], ids=["full", "small decoder", "bare"])


def reference(sizes: dict) -> AutoencoderKLFlux2:
    torch.manual_seed(0)
    model = AutoencoderKLFlux2(**sizes).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.normal_(mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.15)
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.001, 3.5)  # low ones show the epsilon
    return model


def ours_of(theirs: AutoencoderKLFlux2, state: dict[str, torch.Tensor]) -> Flux2Autoencoder:
    ours = Flux2Autoencoder(read_config(Flux2VAEConfig, theirs.config)).eval().requires_grad_(False)
    ours.load_state_dict(state)
    return ours


def pipeline_of(vae: AutoencoderKLFlux2) -> Flux2KleinPipeline:
    return Flux2KleinPipeline(scheduler=None, vae=vae, text_encoder=None, tokenizer=None, transformer=None)


@CASES
@pytest.mark.parametrize("cells", [(2, 3), (5, 1)], ids=str)
@torch.no_grad()
def test_pictures_and_latents_equal_the_pipelines(sizes, cells):
    theirs = reference(sizes)
    pipeline = pipeline_of(theirs)
    ours = ours_of(theirs, translate(AUTOENCODER.layouts["diffusers"], theirs.state_dict()))
    pixels = torch.rand(2, 3, cells[0] * 16, cells[1] * 16) * 2 - 1
    posterior = theirs.encode(pixels).latent_dist
    mean, log_variance = ours.encode_moments(pixels)
    agree(mean, posterior.mean, roundings(theirs.encoder))
    agree(log_variance, posterior.logvar, roundings(theirs.encoder))
    latents = pipeline._encode_vae_image(pixels, generator=None)
    agree(ours.encode(pixels), latents, roundings(theirs.encoder))

    latents = torch.randn(2, 4 * sizes["latent_channels"], *cells)
    deviation = (theirs.bn.running_var + theirs.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
    raw = pipeline._unpatchify_latents(latents * deviation + theirs.bn.running_mean.view(1, -1, 1, 1))
    expected = theirs.decode(raw).sample
    assert expected.std() > 0.1
    agree(ours.decode(latents), expected, roundings(theirs.decoder))
    agree(ours.decode(latents, tile=1), expected, roundings(theirs.decoder))


def test_the_full_model_has_the_references_parameters_and_shapes():
    with torch.device("meta"):
        for widths in (None, (96, 192, 384, 384)):
            theirs = AutoencoderKLFlux2(decoder_block_out_channels=widths)
            ours = Flux2Autoencoder(Flux2VAEConfig(decoder_block_out_channels=widths))
            shapes = {name: weight.shape for name, weight in theirs.state_dict().items()}
            assert shapes.pop("bn.num_batches_tracked") == ()
            assert shapes == {name: weight.shape for name, weight in ours.state_dict().items()}
            assert read_config(Flux2VAEConfig, theirs.config) == ours.config


@CASES
@torch.no_grad()
def test_the_single_file_we_write_is_named_as_diffusers_reads_it(sizes):
    theirs, rules = reference(sizes), AUTOENCODER.layouts["ldm"]
    state = {key: tensor for key, tensor in theirs.state_dict().items() if key != "bn.num_batches_tracked"}
    written = translate(rules, state, back=True)
    assert translate(rules, written).keys() == state.keys()
    outside = {"encoder.quant_conv": "quant_conv", "decoder.post_quant_conv": "post_quant_conv"}
    plain = {}
    for key, tensor in written.items():
        stem, _, end = key.rpartition(".")
        plain[f"{outside.get(stem, stem)}.{end}"] = tensor
    read = convert_ldm_vae_checkpoint(plain, theirs.config)
    read |= {key: plain[key] for key in ("bn.running_mean", "bn.running_var")}  # its converter is FLUX.1's
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], weight) for name, weight in state.items())


@torch.no_grad()
def test_the_folder_we_write_is_read_by_diffusers(tmp_path):
    theirs = reference(SMALL)
    ours = ours_of(theirs, translate(AUTOENCODER.layouts["diffusers"], theirs.state_dict()))
    theirs.save_config(tmp_path)
    state = translate(AUTOENCODER.layouts["diffusers"], ours.state_dict(), back=True)
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    read = AutoencoderKLFlux2.from_pretrained(tmp_path).eval()
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    expected = pipeline_of(theirs)._encode_vae_image(pixels, generator=None)
    assert torch.equal(pipeline_of(read)._encode_vae_image(pixels, generator=None), expected)


@pytest.mark.parametrize("size", [(64, 64), (130, 77), (1200, 1111), (2050, 300)], ids=str)
def test_references_are_cut_as_the_pipelines_are(size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    processor = Flux2ImageProcessor(vae_scale_factor=16)
    capped = processor._resize_if_exceeds_area(processor.check_image_input(image), SEVERAL_AREA)
    width, height = (side // 16 * 16 for side in capped.size)
    expected = processor.preprocess(capped, height=height, width=width, resize_mode="crop")[0]
    (got,) = prepare_references([image], SEVERAL_AREA)
    pixels = torch.from_numpy(np.asarray(got, np.float32).transpose(2, 0, 1) / 255) * 2 - 1
    agree(pixels, expected, 2)  # a division and a product


def test_several_references_are_shown_side_by_side_as_the_pipelines_are():
    images = [Image.new("RGB", size, colour) for size, colour in (((20, 31), "red"), ((40, 10), "blue"))]
    assert np.array_equal(join_references(images), Flux2ImageProcessor.concatenate_images(images))
