"""From a prompt to pixels, ours against diffusers' FLUX.1 pipelines: same folder, same noise, pixels within 1/255."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxControlPipeline,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from PIL import Image
from tokenizers import pre_tokenizers

import inkstream
from inkstream import Request
from inkstream.families.flux1 import kontext
from inkstream.families.flux1.documents import documents
from inkstream.families.flux1.specs import CANNY, DEV, FILL, KONTEXT, SCHNELL
from rounding import pictures_agree

PROMPTS = ["a red cat on the wall", "", "a very long tail of words " * 40]
PIPELINES = {
    "flux1-schnell": (SCHNELL, FluxPipeline),
    "flux1-dev": (DEV, FluxPipeline),
    "flux1-kontext-dev": (KONTEXT, FluxKontextPipeline),
    "flux1-fill-dev": (FILL, FluxFillPipeline),
    "flux1-canny-dev": (CANNY, FluxControlPipeline),
}


def randomised(module):
    for name, weight in module.named_parameters():
        torch.nn.init.normal_(weight, mean=1.0 if "norm" in name and weight.ndim == 1 else 0.0, std=0.1)
    return module.eval()


def tokenizers():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = [*alphabet, *(f"{letter}</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    clip = transformers.CLIPTokenizer(
        vocab={token: i for i, token in enumerate(letters)}, merges=[], model_max_length=77
    )
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    pieces += [(chr(i), -2.0) for i in range(33, 127)]
    return clip, transformers.T5Tokenizer(vocab=pieces, extra_ids=0)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """Name of the model -> the reference pipeline, as it saved itself to the folder."""
    root = tmp_path_factory.mktemp("flux1")
    torch.manual_seed(0)
    clip_tokenizer, t5_tokenizer = tokenizers()
    made = {}
    for name, (spec, kind) in PIPELINES.items():
        tiny = spec.tiny
        files = documents(tiny)
        pipeline = kind(
            scheduler=FlowMatchEulerDiscreteScheduler.from_config(files["scheduler/scheduler_config.json"]),
            vae=randomised(AutoencoderKL.from_config(files["vae/config.json"])),
            text_encoder=randomised(transformers.CLIPTextModel(transformers.CLIPTextConfig(**vars(tiny.text_encoder)))),
            tokenizer=clip_tokenizer,
            text_encoder_2=randomised(
                transformers.T5EncoderModel(transformers.T5Config(**vars(tiny.text_encoder_2), use_cache=False))
            ),
            tokenizer_2=t5_tokenizer,
            transformer=randomised(FluxTransformer2DModel.from_config(files["transformer/config.json"])),
        )
        pipeline.set_progress_bar_config(disable=True)
        pipeline.save_pretrained(root / name)
        made[name] = (pipeline, root / name)
    return made


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def packed(noise: torch.Tensor) -> torch.Tensor:
    return FluxPipeline._pack_latents(noise, *noise.shape)


@pytest.mark.parametrize("name", ["flux1-schnell", "flux1-dev"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=["short", "empty", "long"])
def test_text_to_image_draws_the_same_picture(pipelines, name, prompt):
    pipeline, folder = pipelines[name]
    ours = inkstream.load(folder, inkstream.Machine("cpu", "fp32"))
    noise = torch.randn(1, 16, 10, 8, generator=torch.Generator().manual_seed(1))
    length = 256 if name == "flux1-schnell" else 512
    theirs = pipeline(
        prompt, height=80, width=64, num_inference_steps=4, guidance_scale=3.5, latents=packed(noise),
        max_sequence_length=length, output_type="pt",
    ).images  # fmt: skip
    request = Request(prompt=prompt, width=64, height=80, steps=4, guidance=3.5, seed=0)
    pictures_agree(ours.decode(ours.sample(request, ours.encode(request), noise)), theirs, pipeline)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_diffusers_draws_the_same_picture_with_an_adapter_that_we_write(pipelines, save_lora, dora):
    pipeline, folder = pipelines["flux1-dev"]
    ours = inkstream.load(folder, inkstream.Machine("cpu", "fp32"))
    path = save_lora(ours.spec, dora)
    noise = torch.randn(1, 16, 10, 8, generator=torch.Generator().manual_seed(1))
    asked = {"height": 80, "width": 64, "num_inference_steps": 4, "guidance_scale": 3.5, "output_type": "pt"}
    pipeline.load_lora_weights(str(path.parent), weight_name=path.name)
    try:
        theirs = pipeline("a red cat", latents=packed(noise), **asked).images
    finally:
        pipeline.unload_lora_weights()
    without = pipeline("a red cat", latents=packed(noise), **asked).images
    request = Request(prompt="a red cat", width=64, height=80, steps=4, guidance=3.5, seed=0, loras=(str(path),))
    pictures_agree(ours.decode(ours.sample(request, ours.encode(request), noise)), theirs, pipeline)
    assert (theirs - without).abs().max() > 0.1


SCHEDULERS = [
    {"shift": 3.0, "use_dynamic_shifting": False},
    {"shift": 1.0},
    {},
    {"use_dynamic_shifting": True},
    {"use_dynamic_shifting": True, "base_shift": 0.7, "max_shift": 2.5, "time_shift_type": "exponential"},
    {"use_dynamic_shifting": True, "shift": 3.0, "base_image_seq_len": 16, "max_image_seq_len": 64, "max_shift": 3.0},
    {"shift": 2.5, "time_shift_type": "linear", "shift_terminal": None, "use_karras_sigmas": False},
]


@pytest.mark.parametrize("entries", SCHEDULERS, ids=str)
@pytest.mark.parametrize("name", ["flux1-schnell", "flux1-dev"])
def test_the_scheduler_of_the_folder_is_honoured(pipelines, reschedule, name, entries):
    pipeline, folder = pipelines[name]
    ours = inkstream.load(reschedule(pipeline, folder, **entries), inkstream.Machine("cpu", "fp32"))
    noise = torch.randn(1, 16, 10, 8, generator=torch.Generator().manual_seed(1))
    dynamic = entries.get("use_dynamic_shifting", False)
    theirs = pipeline(
        "a red cat", height=80, width=64, num_inference_steps=4, guidance_scale=3.5, latents=packed(noise),
        max_sequence_length=256 if name == "flux1-schnell" and not dynamic else 512, output_type="pt",
    ).images  # fmt: skip
    guidance = 3.5 if name == "flux1-dev" else 1.0
    request = Request(prompt="a red cat", width=64, height=80, steps=4, guidance=guidance, seed=0)
    pictures_agree(ours.decode(ours.sample(request, ours.encode(request), noise)), theirs, pipeline)


def test_a_model_without_guidance_input_whose_scheduler_shifts_dynamically_is_guided_by_two_prompts(
    pipelines, reschedule
):
    pipeline, folder = pipelines["flux1-schnell"]
    folder = reschedule(pipeline, folder, use_dynamic_shifting=True)
    ours = inkstream.load(folder, inkstream.Machine("cpu", "fp32"))
    assert (ours.spec.guides, ours.spec.steps, ours.spec.guidance) == ("twice", 28, 3.5)
    noise = torch.randn(1, 16, 10, 8, generator=torch.Generator().manual_seed(1))
    theirs = pipeline(
        "a red cat", negative_prompt="a bird", true_cfg_scale=3.5, height=80, width=64, num_inference_steps=4,
        latents=packed(noise), output_type="pt",
    ).images  # fmt: skip
    request = Request(prompt="a red cat", negative_prompt="a bird", width=64, height=80, steps=4, seed=0)
    pictures_agree(ours.decode(ours.sample(request, ours.encode(request), noise)), theirs, pipeline, 3.5)


@pytest.mark.parametrize("size", [(120, 96), (95, 63), (49, 79), (250, 33)], ids=str)
def test_kontext_sees_the_reference_as_the_pipeline_shows_it(pipelines, monkeypatch, size):
    small = tuple((width // 16 * 2 // 2, height // 16) for width, height in kontext.SIZES)
    small = tuple((max(w // 16 * 16, 16), max(h // 16 * 16, 16)) for w, h in small)
    monkeypatch.setattr(kontext, "SIZES", small)
    monkeypatch.setattr("diffusers.pipelines.flux.pipeline_flux_kontext.PREFERRED_KONTEXT_RESOLUTIONS", small)
    pipeline, folder = pipelines["flux1-kontext-dev"]
    ours = inkstream.load(folder, inkstream.Machine("cpu", "fp32"))
    assert "references" in ours.spec.abilities
    noise = torch.randn(1, 16, 10, 8, generator=torch.Generator().manual_seed(2))
    shown = picture(*size)
    theirs = pipeline(
        image=shown, prompt="make it blue", height=80, width=64, num_inference_steps=3, guidance_scale=2.5,
        latents=packed(noise), output_type="pt", max_area=80 * 64,
    ).images  # fmt: skip
    request = Request(prompt="make it blue", width=64, height=80, steps=3, guidance=2.5, seed=0, reference=(shown,))
    pictures_agree(ours.decode(ours.sample(request, ours.encode(request), noise)), theirs, pipeline)


def test_kontext_takes_the_size_that_the_pipeline_takes_for_sides_of_any_length():
    sides = [16, 17, 100, 333, 512, 575, 777, 1000, 1023, 1024, 1439, 2999]
    for width, height in itertools.product(sides, sides):
        ratio = (width // 16 * 16) / (height // 16 * 16)  # of the sides that its image processor rounds down
        _, *nearest = min((abs(ratio - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        assert kontext.kontext_size(width, height) == tuple(nearest)


def test_fill_sees_the_picture_and_the_mask(pipelines):
    pipeline, folder = pipelines["flux1-fill-dev"]
    ours = inkstream.load(folder, inkstream.Machine("cpu", "fp32"))
    noise = torch.randn(1, 16, 10, 8, generator=torch.Generator().manual_seed(3))
    shown, mask = picture(64, 80), np.zeros((80, 64), np.uint8)
    mask[20:50, 10:40] = 255
    with mode_only(pipeline.vae):
        theirs = pipeline(
            prompt="a hole", image=shown, mask_image=Image.fromarray(mask), height=80, width=64,
            num_inference_steps=3, guidance_scale=30.0, latents=packed(noise), output_type="pt",
        ).images  # fmt: skip
    request = Request(
        prompt="a hole", image=shown, mask=Image.fromarray(mask), width=64, height=80, steps=3, guidance=30, seed=0
    )
    pictures_agree(ours.decode(ours.sample(request, ours.encode(request), noise)), theirs, pipeline)


def test_a_map_is_followed(pipelines):
    pipeline, folder = pipelines["flux1-canny-dev"]
    ours = inkstream.load(folder, inkstream.Machine("cpu", "fp32"))
    noise = torch.randn(1, 16, 10, 8, generator=torch.Generator().manual_seed(4))
    edges = picture(64, 80)
    with mode_only(pipeline.vae):
        theirs = pipeline(
            prompt="a house", control_image=edges, height=80, width=64, num_inference_steps=3, guidance_scale=30.0,
            latents=packed(noise), output_type="pt",
        ).images  # fmt: skip
    request = Request(prompt="a house", width=64, height=80, steps=3, guidance=30, seed=0, reference=(edges,))
    pictures_agree(ours.decode(ours.sample(request, ours.encode(request), noise)), theirs, pipeline)


class mode_only:
    """For the length of a with-block a diffusers autoencoder gives the mode of its posterior."""

    def __init__(self, vae):
        self.vae, self.encode = vae, vae.encode

    def __enter__(self):
        def encode(x, *args, **kwargs):
            out = self.encode(x, *args, **kwargs)
            out.latent_dist.sample = lambda generator=None: out.latent_dist.mode()
            return out

        self.vae.encode = encode

    def __exit__(self, *error):
        self.vae.encode = self.encode
