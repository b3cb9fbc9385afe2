"""Our Qwen-Image 2.1 against diffusers': transformer and autoencoder at random tiny weights, and whole pictures."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

import inkstream
from inkstream import Request
from inkstream.families.qwenimage.autoencoder import AUTOENCODER, Autoencoder, infer_autoencoder
from inkstream.families.qwenimage.keys import DIFFUSERS
from inkstream.families.qwenimage.model import QwenImageTransformer
from inkstream.families.qwenimage.specs import BASE, QwenImageConfig, QwenImageVAEConfig
from inkstream.nn.config import read_config
from inkstream.nn.flux import patchify, unpatchify
from inkstream.nn.forward import Sample
from inkstream.weights.keymap import translate
from rounding import agree, pictures_agree, roundings

SMALL = {
    "in_channels": 8, "out_channels": 8, "num_layers": 3, "attention_head_dim": 32, "num_attention_heads": 2,
    "context_in_dim": 24, "axes_dims_rope": [4, 14, 14],
}  # fmt: skip


def shake(model: torch.nn.Module, std: float) -> None:
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(
            weight, mean=1.0 if name.endswith(("norm_q.weight", "norm_k.weight", "gamma")) else 0.0, std=std
        )


def listed(config) -> dict:
    """A config as its file holds it."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(config).items()}


def test_the_full_model_has_the_references_keys_and_shapes():
    with torch.device("meta"):
        theirs = QwenImage21Transformer2DModel(**vars(BASE.transformer)).state_dict()
        ours = QwenImageTransformer(BASE.transformer)
    translated = translate(DIFFUSERS, ours.state_dict(), back=True)
    assert {key: t.shape for key, t in translated.items()} == {key: t.shape for key, t in theirs.items()}


@pytest.mark.parametrize("std", [0.1, 0.01])
def test_it_equals_the_reference_on_mixed_prompts_and_sizes(std):
    torch.manual_seed(0)
    theirs = QwenImage21Transformer2DModel(**SMALL).eval().requires_grad_(False)
    shake(theirs, std)
    ours = QwenImageTransformer(read_config(QwenImageConfig, theirs.config)).eval().requires_grad_(False)
    ours.load_state_dict(translate(DIFFUSERS, theirs.state_dict()))
    shapes, lengths, times = [(4, 6), (8, 2), (2, 2), (4, 6)], [5, 40, 1, 5], [1.0, 0.713, 0.25, 0.02]
    xs, texts = [torch.randn(8, *shape) for shape in shapes], [torch.randn(n, 24) for n in lengths]
    prepared = [ours.prepare([text], *shape)[0] for text, shape in zip(texts, shapes)]
    samples = [Sample(*each) for each in zip(xs, times, prepared)]
    got = ours(samples)
    assert max(float(y.abs().max()) for y in got) > 5 * std
    for x, text, t, sample, y in zip(xs, texts, times, samples, got):
        h, w = x.shape[1:]
        mask = torch.tensor([[False] * len(text) + [True] * (h * w // 4)])
        out = theirs(
            hidden_states=patchify(x, 1)[None], encoder_hidden_states=text[None], timestep=torch.tensor([t]),
            img_shapes=[[(1, h, w)]], img_mask=mask, return_dict=False,
        )[0]  # fmt: skip
        expected = unpatchify(out[0, -h * w :], h, w, 1)
        agree(y, expected, roundings(theirs))
        assert (y - expected).abs().max() <= 1e-4 * max(1, expected.abs().max())
        agree(ours([sample])[0], y, roundings(theirs))


@pytest.fixture(scope="module")
def autoencoders():
    torch.manual_seed(0)
    theirs = AutoencoderKLQwenImage21(**listed(BASE.tiny.vae)).eval().requires_grad_(False)
    shake(theirs, 0.1)
    config = read_config(QwenImageVAEConfig, theirs.config)
    assert config == BASE.tiny.vae
    ours = Autoencoder(config).eval().requires_grad_(False)
    unread = tuple(AUTOENCODER.unread(config))
    ours.load_state_dict({k: w for k, w in theirs.state_dict().items() if not k.startswith(unread)})
    return theirs, ours


def test_the_autoencoder_is_the_references_both_ways(autoencoders):
    theirs, ours = autoencoders
    pixels, latents = torch.rand(2, 4, 64, 96) * 2 - 1, torch.randn(2, 8, 4, 6)
    mean, std = (
        torch.tensor(getattr(BASE.tiny.vae, name)).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std")
    )
    expected = (theirs.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0] - mean) / std
    agree(ours.encode(pixels), expected, roundings(theirs))
    drawn = theirs.decode((latents * std + mean)[:, :, None]).sample[:, :, 0]
    agree(ours.decode(latents).clamp(-1, 1), drawn, roundings(theirs))


def test_layers_for_later_frames_are_left_out_and_written_as_zeros_and_sizes_are_inferred(autoencoders):
    theirs, ours = autoencoders
    config, shapes = BASE.tiny.vae, {key: w.shape for key, w in theirs.state_dict().items()}
    written = ours.state_dict() | AUTOENCODER.neutral(config)
    assert {key: w.shape for key, w in written.items()} == shapes
    inferred = infer_autoencoder({key: tuple(shape) for key, shape in shapes.items()})
    assert {**vars(inferred), "latents_mean": 0, "latents_std": 0} == {
        **vars(config),
        "latents_mean": 0,
        "latents_std": 0,
    }
    with torch.device("meta"):
        full = AutoencoderKLQwenImage21(**listed(BASE.vae)).state_dict()
    assert infer_autoencoder({key: tuple(w.shape) for key, w in full.items()}) == BASE.vae


# Pictures -------------------------------------------------------------------------------------------------------------


class Processor:
    """As much of the processor as the pipeline calls, for text."""

    def __init__(self, file: str):
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, pad_token="<|endoftext|>", padding_side="left")

    def apply_chat_template(self, messages, **_):
        (turn,) = messages
        text = f"<|im_start|>{turn['role']}\n{turn['content'][0]['text']}<|im_end|>\n"
        return [self.tokenizer(text).input_ids]

    def __call__(self, text, **options):
        return self.tokenizer(text, return_tensors="pt", padding=True)


@pytest.fixture(scope="module")
def both(tmp_path_factory, make_folder):
    folder = make_folder(tmp_path_factory.mktemp("qwenimage") / "tiny", BASE.tiny, seed=3)
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    eyes = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    encoder = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=config["text_config"], vision_config={**eyes, "deepstack_visual_indexes": [0]})
    )
    encoder.model.language_model.load_state_dict(load_file(folder / "text_encoder" / "model.safetensors"))
    vae = AutoencoderKLQwenImage21(**listed(BASE.tiny.vae))
    vae.load_state_dict(
        load_file(folder / "vae" / "diffusion_pytorch_model.safetensors") | AUTOENCODER.neutral(BASE.tiny.vae)
    )
    theirs = QwenImage21Pipeline(
        FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        vae.eval(),
        encoder.eval(),
        Processor(str(folder / "tokenizer" / "tokenizer.json")),
        QwenImage21Transformer2DModel.from_pretrained(folder / "transformer").eval(),
    )
    theirs.set_progress_bar_config(disable=True)
    return SimpleNamespace(theirs=theirs, ours=inkstream.load(folder, inkstream.Machine("cpu", "fp32")))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("prompt", ["a red cat on the wall", ""])
def test_the_same_noise_gives_the_same_picture_with_its_transparency(both, prompt, guidance):
    noise = torch.randn(1, 8, 6, 4, generator=torch.Generator().manual_seed(1))
    expected = both.theirs(
        prompt, negative_prompt="grey", true_cfg_scale=guidance, width=64, height=96, num_inference_steps=4,
        latents=noise.flatten(2).mT, output_type="pt",
    ).images  # fmt: skip
    request = Request(prompt=prompt, negative_prompt="grey", guidance=guidance, width=64, height=96, steps=4, seed=0)
    own = both.ours.decode(both.ours.sample(request, both.ours.encode(request), noise))
    assert own.shape == (1, 4, 96, 64)
    pictures_agree(own, expected, both.theirs, guidance)
    assert (own - expected).abs().max() <= 1 / 255
