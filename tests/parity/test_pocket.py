"""The weights that ship, in the reference implementation: every key is taken, and the same picture comes out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Model

import inkstream
from inkstream import Request
from rounding import pictures_agree

FOLDER = Path(inkstream.__file__).parent / "pocket" / "weights"
PROMPTS = ("a large red circle in the center, on a white background", '一个蓝色的方形, the word "GO"')


@pytest.mark.parametrize(
    ("kind", "part"),
    [(ZImageTransformer2DModel, "transformer"), (Qwen3Model, "text_encoder"), (AutoencoderKL, "vae")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_no_key_is_missing_unexpected_or_of_another_shape(kind, part):
    _, told = kind.from_pretrained(FOLDER / part, output_loading_info=True)
    assert {name: list(found) for name, found in told.items() if found} == {}


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_same_noise_gives_the_same_picture(guidance):
    theirs = ZImagePipeline.from_pretrained(FOLDER, dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    ours = inkstream.load("pocket", inkstream.Machine("cpu", "fp32"))
    noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(5))
    for prompt in PROMPTS:
        picture = theirs(
            prompt, height=128, width=128, num_inference_steps=16, guidance_scale=guidance - 1, negative_prompt="",
            latents=noise.clone(), output_type="pt",
        ).images  # fmt: skip
        request = Request(upsample=False, prompt=prompt, guidance=guidance)
        assert request.model == "pocket"
        own = ours.decode(ours.sample(request, ours.encode(request), noise))
        pictures_agree(own, picture, theirs, guidance)
