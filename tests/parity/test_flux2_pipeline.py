"""From a prompt to pixels, ours against diffusers' FLUX.2 pipelines: same folder, same noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinInpaintPipeline, Flux2KleinKVPipeline, Flux2KleinPipeline
from PIL import Image
from transformers import PreTrainedTokenizerFast

import inkstream
from inkstream import Request
from inkstream.families.flux2.specs import KLEIN_4B, KLEIN_9B_KV, KLEIN_BASE_4B
from rounding import pictures_agree

PROMPTS = ["a red cat on the wall", "写着“春”字的红色海报, with a very long tail of words " * 4, ""]
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
"""The part of Qwen3's template that one user turn goes through."""


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def folder_of(spec, path, make_folder):
    folder = make_folder(path / spec.name, spec.tiny, seed=3)
    file = str(folder / "tokenizer" / "tokenizer.json")
    return folder, PreTrainedTokenizerFast(
        tokenizer_file=file, pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE, padding_side="right"
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory, make_folder):
    root = tmp_path_factory.mktemp("flux2")
    return {spec.name: folder_of(spec, root, make_folder) for spec in (KLEIN_4B, KLEIN_BASE_4B, KLEIN_9B_KV)}


def theirs_of(kind, folder, tokenizer):
    pipeline = kind.from_pretrained(folder, tokenizer=tokenizer, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def packed(noise: torch.Tensor) -> torch.Tensor:
    return noise.flatten(2).transpose(1, 2)


@pytest.mark.parametrize("references", [0, 1, 3])
@pytest.mark.parametrize(
    ("name", "kind", "guidance"),
    [
        ("flux2-klein-4b", Flux2KleinPipeline, None),
        ("flux2-klein-base-4b", Flux2KleinPipeline, 4.0),
        ("flux2-klein-9b-kv", Flux2KleinKVPipeline, None),
    ],
)
def test_the_same_noise_and_references_give_the_same_picture(folders, name, kind, guidance, references):
    folder, tokenizer = folders[name]
    theirs = theirs_of(kind, folder, tokenizer)
    ours = inkstream.load(folder, inkstream.Machine("cpu", "fp32"))
    assert ours.spec.guides == ("twice" if guidance else "none")
    pictures = [picture(96 + 32 * i, 80, seed=i) for i in range(references)]
    for prompt in PROMPTS:
        noise = torch.randn(1, 16, 5, 4, generator=torch.Generator().manual_seed(1))
        extra = {} if guidance is None else {"guidance_scale": guidance}
        expected = theirs(
            image=pictures or None, prompt=prompt, width=64, height=80, num_inference_steps=4, latents=noise.clone(),
            output_type="pt", text_encoder_out_layers=(1, 2, 3), **extra,
        ).images  # fmt: skip
        request = Request(
            prompt=prompt, width=64, height=80, steps=4, guidance=guidance, reference=tuple(pictures), seed=0
        )
        own = ours.decode(ours.sample(request, ours.encode(request), noise))
        pictures_agree(own, expected, theirs, guidance or 1)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_diffusers_draws_the_same_picture_with_an_adapter_that_we_write(folders, save_lora, dora):
    folder, tokenizer = folders["flux2-klein-4b"]
    theirs = theirs_of(Flux2KleinPipeline, folder, tokenizer)
    ours = inkstream.load(folder, inkstream.Machine("cpu", "fp32"))
    path = save_lora(ours.spec, dora)
    noise = torch.randn(1, 16, 5, 4, generator=torch.Generator().manual_seed(1))
    asked = {"prompt": "a fish", "width": 64, "height": 80, "num_inference_steps": 4, "output_type": "pt"}
    asked["text_encoder_out_layers"] = (1, 2, 3)
    without = theirs(latents=noise.clone(), **asked).images
    theirs.load_lora_weights(str(path.parent), weight_name=path.name)
    expected = theirs(latents=noise.clone(), **asked).images
    request = Request(prompt="a fish", width=64, height=80, steps=4, seed=0, loras=(str(path),))
    pictures_agree(ours.decode(ours.sample(request, ours.encode(request), noise)), expected, theirs)
    assert (expected - without).abs().max() > 0.1


SCHEDULERS = [
    {"shift": 3.0, "use_dynamic_shifting": False},
    {},
    {"use_dynamic_shifting": True},
    {"use_dynamic_shifting": True, "base_shift": 0.7, "max_shift": 2.5, "shift": 2.0},
]


@pytest.mark.parametrize("entries", SCHEDULERS, ids=str)
def test_the_scheduler_of_the_folder_is_honoured(folders, reschedule, entries):
    folder, tokenizer = folders["flux2-klein-4b"]
    theirs = theirs_of(Flux2KleinPipeline, folder, tokenizer)
    ours = inkstream.load(reschedule(theirs, folder, **entries), inkstream.Machine("cpu", "fp32"))
    noise = torch.randn(1, 16, 5, 4, generator=torch.Generator().manual_seed(1))
    expected = theirs(
        prompt="a fish", width=64, height=80, num_inference_steps=5, latents=noise.clone(), output_type="pt",
        text_encoder_out_layers=(1, 2, 3),
    ).images  # fmt: skip
    request = Request(prompt="a fish", width=64, height=80, steps=5, seed=0)
    pictures_agree(ours.decode(ours.sample(request, ours.encode(request), noise)), expected, theirs)


@pytest.mark.parametrize("references", [0, 1])
@pytest.mark.parametrize(
    ("box", "strength"),
    [
        ((20, 70, 10, 50), 1.0),
        ((20, 70, 10, 50), 0.6),
        ((24, 72, 8, 40), 0.8),
    ],  # the edges of the last are grey in cells
    ids=["whole", "part", "grey"],
)
@pytest.mark.parametrize(("name", "guidance"), [("flux2-klein-4b", None), ("flux2-klein-base-4b", 4.0)])
def test_inpainting_shows_the_start_picture_as_the_first_reference(
    folders, monkeypatch, name, guidance, box, strength, references
):
    folder, tokenizer = folders[name]
    theirs = theirs_of(Flux2KleinInpaintPipeline, folder, tokenizer)
    ours = inkstream.load(folder, inkstream.Machine("cpu", "fp32"))
    shown, others, mask = picture(64, 96, seed=8), [picture(112, 80, seed=9)][:references], np.zeros((96, 64), np.uint8)
    mask[box[0] : box[1], box[2] : box[3]] = 255
    noise = torch.randn(1, 16, 6, 4, generator=torch.Generator().manual_seed(4))
    module = "diffusers.pipelines.flux2.pipeline_flux2_klein_inpaint"
    monkeypatch.setattr(f"{module}.randn_tensor", lambda shape, **_: noise.clone().reshape(shape))
    expected = theirs(
        prompt="a lake", image=shown, mask_image=Image.fromarray(mask), image_reference=others or None,
        strength=strength, num_inference_steps=5, guidance_scale=guidance or 1.0, output_type="pt",
        text_encoder_out_layers=(1, 2, 3),
    ).images  # fmt: skip
    request = Request(
        prompt="a lake", image=shown, mask=Image.fromarray(mask), reference=tuple(others), strength=strength, steps=5,
        guidance=guidance, seed=0,
    )  # fmt: skip
    own = ours.decode(ours.sample(request, ours.encode(request), noise))
    pictures_agree(own, expected, theirs, guidance or 1)
