"""From a prompt to pixels, ours against diffusers' FLUX.2 dev pipeline: one folder, one noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
from PIL import Image
from transformers import PreTrainedTokenizerFast

import inkstream
from inkstream import Request
from inkstream.families.flux2.documents import documents
from inkstream.families.flux2.specs import DEV
from rounding import pictures_agree

PROMPTS = ["a red cat on the wall", "", "写着“春”字的红色海报, with a very long tail of words " * 12]
TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}{%- set text = message.content[0].text %}"
    "{%- if message.role == 'system' %}{{- '[SYSTEM_PROMPT]' + text + '[/SYSTEM_PROMPT]' }}"
    "{%- else %}{{- '[INST]' + text + '[/INST]' }}{%- endif %}{%- endfor %}"
)
"""What the published template does with what it is given here."""
VISION = {
    "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "head_dim": 8, "image_size": 32, "patch_size": 8,
}  # fmt: skip


def randomised(module):
    for name, weight in (*module.named_parameters(), *module.named_buffers()):
        if weight.is_floating_point() and "inv_freq" not in name:
            is_norm = "running_var" in name or ("norm" in name and weight.ndim == 1 and name.endswith("weight"))
            torch.nn.init.normal_(weight, mean=1.0 if is_norm else 0.0, std=0.1)
    return module.eval()


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, make_folder):
    """The reference pipeline, and the folder it saved itself to."""
    torch.manual_seed(0)
    tiny, files = DEV.tiny, documents(DEV.tiny)
    language = files["text_encoder/config.json"]["text_config"]
    tokenizer = make_folder(tmp_path_factory.mktemp("words"), tiny) / "tokenizer" / "tokenizer.json"
    plain = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer), bos_token="<s>", pad_token="<pad>", padding_side="left", chat_template=TEMPLATE
    )  # fmt: skip
    made = Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler.from_config(files["scheduler/scheduler_config.json"]),
        vae=randomised(AutoencoderKLFlux2.from_config(files["vae/config.json"])),
        text_encoder=randomised(
            transformers.Mistral3ForConditionalGeneration(
                transformers.Mistral3Config(text_config={**language, "pad_token_id": None}, vision_config=VISION)
            )
        ),
        tokenizer=plain,
        transformer=randomised(Flux2Transformer2DModel.from_config(files["transformer/config.json"])),
    )
    assert tiny.text_encoder.num_hidden_layers == 4
    made.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("flux2-dev") / "dev"
    made.save_pretrained(folder)
    return made, folder


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def packed(noise: torch.Tensor) -> torch.Tensor:
    return noise.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(("references", "guidance"), [(0, 4.0), (0, 1.5), (1, 4.0), (3, 4.0)])
def test_the_same_noise_and_references_give_the_same_picture(pipeline, references, guidance):
    theirs, folder = pipeline
    ours = inkstream.load(folder, inkstream.Machine("cpu", "fp32"))
    assert (ours.spec.guides, ours.spec.shift_rule) == ("read", "empirical")
    pictures = [picture(96 + 32 * i, 80, seed=i) for i in range(references)]
    for prompt in PROMPTS:
        noise = torch.randn(1, 16, 5, 4, generator=torch.Generator().manual_seed(1))
        expected = theirs(
            image=pictures or None, prompt=prompt, width=64, height=80, num_inference_steps=4, latents=noise.clone(),
            output_type="pt", text_encoder_out_layers=(1, 2, 3), guidance_scale=guidance,
        ).images  # fmt: skip
        request = Request(
            prompt=prompt, width=64, height=80, steps=4, guidance=guidance, reference=tuple(pictures), seed=0
        )
        own = ours.decode(ours.sample(request, ours.encode(request), noise))
        pictures_agree(own, expected, theirs)


def test_the_guidance_changes_the_picture(pipeline):
    """Else the comparison above would not see a guidance that is not read."""
    theirs, _ = pipeline
    noise = torch.randn(1, 16, 5, 4, generator=torch.Generator().manual_seed(1))
    one, other = (
        theirs(
            prompt="a cat", width=64, height=80, num_inference_steps=2, latents=noise.clone(), output_type="pt",
            text_encoder_out_layers=(1, 2, 3), guidance_scale=scale,
        ).images
        for scale in (4.0, 1.5)
    )  # fmt: skip
    assert (one - other).abs().max() * 255 > 2
