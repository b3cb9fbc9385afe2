"""Our FLUX.3 transformer and text encoder against the reference's, on random tiny weights, through our key tables."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import Flux3Transformer2DModel
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from inkstream.families.flux3.keys import DIFFUSERS
from inkstream.families.flux3.model import Flux3Transformer
from inkstream.families.flux3.specs import KLEIN, KLEIN_BASE, Flux3Config, Flux3TextConfig
from inkstream.families.qwen3_vl import text_encoder
from inkstream.nn.config import read_config
from inkstream.nn.flux import patchify, unpatchify
from inkstream.nn.forward import Sample
from inkstream.weights.keymap import translate
from rounding import agree, roundings

SMALL = {
    "in_channels": 128, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 32, "num_attention_heads": 2,
    "joint_attention_dim": 24, "axes_dims_rope": [8, 8, 8, 8],
}  # fmt: skip
NARROW = {**SMALL, "num_layers": 3, "num_single_layers": 1, "num_attention_heads": 3, "mlp_ratio": 2.0}
CASES = [(SMALL, 0.1), (NARROW, 0.1), (SMALL, 0.01)]  # faint weights make the norms' epsilon seen


def pair(sizes: dict, std: float, flow_map: bool) -> tuple[Flux3Transformer2DModel, Flux3Transformer]:
    torch.manual_seed(0)
    theirs = Flux3Transformer2DModel(**sizes, flow_map=flow_map).eval().requires_grad_(False)
    for name, weight in theirs.named_parameters():
        torch.nn.init.normal_(weight, mean=1.0 if "norm_q" in name or "norm_k" in name else 0.0, std=std)
    ours = Flux3Transformer(read_config(Flux3Config, theirs.config)).eval().requires_grad_(False)
    ours.load_state_dict(translate(DIFFUSERS, theirs.state_dict()))
    return theirs, ours


def ids(height: int, width: int, place: int) -> torch.Tensor:
    """Position ids of a picture's tokens, counted one by one."""
    places = [[0, 0.5 * row, 0.5 * column, place] for row in range(height) for column in range(width)]
    return torch.tensor(places, dtype=torch.float32)


def ask(theirs, x, text, t, to, references=()) -> torch.Tensor:
    """The reference's answer for one sample. -> (128, h, w)"""
    seen = {}
    if references:
        seen["image_cond_hidden_states"] = torch.cat([patchify(r, 1) for r in references])[None]
        seen["image_cond_ids"] = torch.cat([ids(*r.shape[1:], -1 - i) for i, r in enumerate(references)])
    out = theirs(
        hidden_states=patchify(x, 1)[None],
        encoder_hidden_states=text[None],
        timestep=torch.tensor([t]),
        target_timestep=None if to is None else torch.tensor([to]),
        img_ids=ids(*x.shape[1:], 0),
        txt_ids=torch.tensor([[0, 0, 0, i] for i in range(len(text))], dtype=torch.float32),
        return_dict=False,
        **seen,
    )[0]
    return unpatchify(out[0], *x.shape[1:], 1)


@pytest.mark.parametrize("spec", [KLEIN, KLEIN_BASE], ids=lambda spec: spec.name)
def test_full_models_have_the_references_keys_and_shapes(spec):
    with torch.device("meta"):
        theirs = Flux3Transformer2DModel(**vars(spec.transformer)).state_dict()
        ours = Flux3Transformer(spec.transformer)
    translated = translate(DIFFUSERS, ours.state_dict(), back=True)
    assert {key: t.shape for key, t in translated.items()} == {key: t.shape for key, t in theirs.items()}


@pytest.mark.parametrize("flow_map", [False, True], ids=["base", "flow map"])
@pytest.mark.parametrize(("sizes", "std"), CASES, ids=["small", "narrow", "faint"])
def test_it_equals_the_reference_on_mixed_prompts_sizes_and_references(sizes, std, flow_map):
    theirs, ours = pair(sizes, std, flow_map)
    shapes, lengths, times = [(4, 6), (8, 2), (1, 1), (4, 6)], [5, 40, 1, 5], [1.0, 0.713, 0.25, 0.02]
    jumps = [0.5, 0.7, 0.0, 0.0] if flow_map else [None] * 4
    xs, texts = [torch.randn(128, *shape) for shape in shapes], [torch.randn(n, 24) for n in lengths]
    sizes_seen = [[], [(3, 5)], [(4, 4), (2, 6), (1, 3)], []]
    references = [[torch.randn(128, *shape) for shape in each] for each in sizes_seen]
    prepared = [
        ours.prepare([text], *shape, references=given)[0] for text, shape, given in zip(texts, shapes, references)
    ]
    asked = [Sample(x, t, replace(s, to=to)) for x, t, s, to in zip(xs, times, prepared, jumps)]
    got = ours(asked)
    assert max(float(y.abs().max()) for y in got) > 5 * std
    for x, text, t, to, given, sample, y in zip(xs, texts, times, jumps, references, asked, got):
        expected = ask(theirs, x, text, t, to, given)
        agree(y, expected, roundings(theirs))
        assert (y - expected).abs().max() <= 1e-4 * max(1, expected.abs().max())
        agree(ours([sample])[0], y, roundings(theirs))


# Text -----------------------------------------------------------------------------------------------------------------

WORDS = {
    "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 9, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 64,
}  # fmt: skip


def test_padded_prompts_have_the_states_of_qwen3_vl_with_all_padding_at_position_1():
    torch.manual_seed(0)
    theirs = text_reference().eval().requires_grad_(False)
    config = Flux3TextConfig(**WORDS)
    part = text_encoder(Flux3TextConfig)
    ours = part.build(config).eval()
    state = translate(part.layouts["transformers"], theirs.state_dict())
    unread = (*part.unread(config), "lm_head")
    ours.load_state_dict({key: w for key, w in state.items() if not key.startswith(tuple(unread))})
    lengths, texts = [24, 16, 8], [13, 16, 1]
    prompts = [torch.randint(0, 500, (n,)) for n in lengths]
    got = ours(torch.cat(prompts), lengths, texts).split(lengths)
    for ids, length, text, y in zip(prompts, lengths, texts, got):
        mask = (torch.arange(length) < text).long()
        places = torch.arange(length).masked_fill(mask == 0, 1)
        states = theirs(
            input_ids=ids[None], attention_mask=mask[None], position_ids=places[None], output_hidden_states=True
        ).hidden_states
        agree(y, torch.cat([states[k][0] for k in config.depths], dim=-1), roundings(theirs))


def text_reference() -> Qwen3VLForConditionalGeneration:
    """A tiny Qwen3-VL with weights far from their start."""
    rope = {"rope_type": "default", "rope_theta": 5_000_000.0, "mrope_interleaved": True, "mrope_section": [4, 2, 2]}
    eyes = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    config = Qwen3VLConfig(
        text_config={**WORDS, "rope_parameters": rope}, vision_config={**eyes, "deepstack_visual_indexes": [0]},
        tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3VLForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, mean=1.0 if "norm" in name and weight.ndim == 1 else 0.0, std=0.1)
    return model
