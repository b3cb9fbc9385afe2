"""From a prompt to pixels, ours against diffusers' modular FLUX.3 pipelines: same folder, same noise."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLFlux2,
    ClassifierFreeGuidance,
    Flux3AutoBlocks,
    Flux3DistilledAutoBlocks,
    Flux3Transformer2DModel,
)
from PIL import Image
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

import inkstream
from inkstream import Request
from inkstream.families.flux3.family import canvas_of
from inkstream.families.flux3.specs import KLEIN, KLEIN_BASE
from rounding import pictures_agree

PROMPTS = ["a red cat on the wall", "写着“春”字的红色海报, with a very long tail of words " * 4, ""]
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
"""The part of Qwen3-VL's template that one user turn of text goes through."""
DEPTHS = tuple(range(1, 9))


class Processor:
    """As much of the processor as the pipeline calls."""

    def __init__(self, file: str):
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_file=file, pad_token="<|endoftext|>", chat_template=CHAT_TEMPLATE, padding_side="right"
        )
        self.apply_chat_template = self.tokenizer.apply_chat_template


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, make_folder):
    root = tmp_path_factory.mktemp("flux3")
    return {spec.name: pair(make_folder(root / spec.name, spec.tiny, seed=3), spec) for spec in (KLEIN, KLEIN_BASE)}


def pair(folder, spec):
    """Their pipeline and our model, from one folder."""
    blocks = Flux3DistilledAutoBlocks() if spec.transformer.flow_map else Flux3AutoBlocks()
    blocks.sub_blocks.pop("prompt_upsampler")  # another language model
    theirs = blocks.init_pipeline()
    encoder = text_encoder_of(folder)
    parts = {
        "transformer": Flux3Transformer2DModel.from_pretrained(folder / "transformer"),
        "vae": AutoencoderKLFlux2.from_pretrained(folder / "vae"),
        "text_encoder": encoder,
        "tokenizer": Processor(str(folder / "tokenizer" / "tokenizer.json")),
    }
    theirs.register_components(**parts)
    theirs.set_progress_bar_config(disable=True)
    ours = inkstream.load(folder, inkstream.Machine("cpu", "fp32"))
    return SimpleNamespace(theirs=theirs, ours=ours, modules=SimpleNamespace(**parts))


def text_encoder_of(folder) -> Qwen3VLForConditionalGeneration:
    """The folder's text encoder in transformers, with a vision tower that nothing looks through."""
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    eyes = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    model = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=config["text_config"], vision_config={**eyes, "deepstack_visual_indexes": [0]})
    )
    model.model.language_model.load_state_dict(load_file(folder / "text_encoder" / "model.safetensors"))
    return model.eval()


@pytest.mark.parametrize("references", [0, 1, 3])
@pytest.mark.parametrize(("name", "guidance"), [("flux3-klein", None), ("flux3-klein-base", 3.5)])
def test_the_same_noise_and_references_give_the_same_picture(pairs, name, guidance, references):
    both = pairs[name]
    assert both.ours.spec.guides == ("twice" if guidance else "none")
    if guidance:
        both.theirs.update_components(guider=ClassifierFreeGuidance(guidance_scale=guidance))
    pictures = [picture(96 + 32 * i, 80, seed=i) for i in range(references)]
    for prompt in PROMPTS[: 3 if references == 0 else 1]:
        noise = torch.randn(1, 16, 5, 4, generator=torch.Generator().manual_seed(1))
        expected = both.theirs(
            prompt=prompt, width=64, height=80, num_inference_steps=4, latents=noise.clone(), output_type="pt",
            text_encoder_out_layers=DEPTHS, output="images", **({"image": pictures} if pictures else {}),
        )  # fmt: skip
        request = Request(
            prompt=prompt, width=64, height=80, steps=4, guidance=guidance, reference=tuple(pictures), seed=0
        )
        own = both.ours.decode(both.ours.sample(request, both.ours.encode(request), noise))
        pictures_agree(own, expected, both.modules, guidance or 1)
        assert (own - expected).abs().max() <= 1 / 255


@pytest.mark.parametrize("size", [(75, 53), (200, 130), (20, 12), (3000, 1700)])
def test_a_single_reference_is_kept_whole_and_sets_the_size(pairs, size):
    both, seen = pairs["flux3-klein"], picture(*size)
    shrunk, canvas = canvas_of(size)
    theirs, more = both.theirs.image_processor.preprocess(seen, resize_mode="fill")
    assert theirs.shape[:1:-1] == canvas
    left, top, right, bottom = more["reference_crop"]
    assert (right - left, bottom - top) == shrunk
    assert both.ours.family.size_for(both.ours.spec, size) == canvas


def test_what_is_seen_of_a_single_reference_is_the_same(pairs):
    from inkstream.families.flux3.family import on_canvas
    from inkstream.families.parts import to_pixels

    for size in ((75, 53), (20, 12), (130, 10)):
        theirs, _ = pairs["flux3-klein"].theirs.image_processor.preprocess(picture(*size), resize_mode="fill")
        assert (2 * to_pixels(on_canvas(picture(*size))) - 1 - theirs[0]).abs().max() < 1e-6
