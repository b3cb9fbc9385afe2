"""Our IP-Adapters against diffusers', and CLIP's vision model against transformers', on their own random weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.embeddings import apply_rotary_emb
from PIL import Image
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from inkstream.families.flux1.clip_vision import pixels_of
from inkstream.families.flux1.ip_adapter import IP_ADAPTER
from inkstream.families.flux1.ip_adapter_instantx import IP_ADAPTER_INSTANTX, InstantXConfig
from inkstream.families.flux1.keys import DIFFUSERS
from inkstream.families.flux1.model import Flux1Transformer
from inkstream.families.flux1.redux import Siglip
from inkstream.families.flux1.specs import Flux1Config, SiglipConfig
from inkstream.nn.around import Around
from inkstream.nn.config import read_config
from inkstream.nn.flux import patchify, plane, unpatchify
from inkstream.nn.forward import Sample
from inkstream.types import Conditioning, ControlUse
from inkstream.weights.keymap import translate
from rounding import agree, roundings

FLUX1 = {
    "in_channels": 64, "num_layers": 3, "num_single_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2,
    "joint_attention_dim": 32, "pooled_projection_dim": 64, "guidance_embeds": True, "axes_dims_rope": (4, 14, 14),
}  # fmt: skip
WIDTH, VECTOR = FLUX1["joint_attention_dim"], 24
VISION = {
    "hidden_size": 128, "intermediate_size": 96, "projection_dim": VECTOR, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
}  # fmt: skip


class Alone:
    """As much of a family as an adapter reads."""

    def __init__(self, transformer: Any):
        self.transformer = transformer


def fill_in(module: nn.Module) -> None:
    """Weights far from their neutral start."""
    for name, weight in module.named_parameters():
        nn.init.normal_(weight, mean=1.0 if "norm" in name and weight.ndim == 1 else 0.0, std=0.1)


def loaded(state: dict[str, torch.Tensor]) -> Any:
    """Our adapter of a published state dict."""
    ours = translate(IP_ADAPTER.layouts["xlabs"], state)
    adapter = IP_ADAPTER.build(IP_ADAPTER.infer({name: tuple(weight.shape) for name, weight in ours.items()}))
    adapter.load_state_dict(ours)
    return adapter.eval().requires_grad_(False)


def adapter_state(seed: int, tokens: int = 4) -> dict[str, torch.Tensor]:
    """A file of XLabs', with the names that it has."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, mean: float = 0.0) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.2 + mean

    state = {
        "ip_adapter_proj_model.proj.weight": normal(tokens * WIDTH, VECTOR),
        "ip_adapter_proj_model.proj.bias": normal(tokens * WIDTH),
        "ip_adapter_proj_model.norm.weight": normal(WIDTH, mean=1.0),
        "ip_adapter_proj_model.norm.bias": normal(WIDTH),
    }
    for block in range(FLUX1["num_layers"]):
        for x in "kv":
            name = f"double_blocks.{block}.processor.ip_adapter_double_stream_{x}_proj"
            state |= {f"{name}.weight": normal(64, WIDTH), f"{name}.bias": normal(64)}
    return state


def in_diffusers_names(state: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """What diffusers' loader makes of such a file."""
    projection = {name.removeprefix("ip_adapter_proj_model."): w for name, w in state.items() if "proj_model" in name}
    blocks = {
        f"{name.split('.')[1]}.to_{'k' if '_k_proj' in name else 'v'}_ip.{name.rpartition('.')[2]}": weight
        for name, weight in state.items()
        if name.startswith("double_blocks")
    }
    return {"image_proj": projection, "ip_adapter": blocks}


def vision() -> CLIPVisionModelWithProjection:
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)).eval().requires_grad_(False)
    fill_in(model)
    return model


@torch.no_grad()
def test_the_vision_model_equals_the_reference():
    torch.manual_seed(0)
    theirs = vision()
    own = loaded(adapter_state(0) | theirs.state_dict())
    pixels = torch.randn(2, 3, 28, 28)
    agree(own.encoder(pixels), theirs(pixels).image_embeds, 2 * roundings(theirs))


@pytest.mark.parametrize("size", [(60, 40), (33, 90), (28, 28), (300, 200)])
def test_pictures_are_prepared_as_the_reference_s_processor_does(size):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    picture = Image.fromarray(noise)
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    expected = processor(picture, return_tensors="pt").pixel_values
    assert float((pixels_of([picture], 28) - expected).abs().max()) < 0.05  # they round the resized picture otherwise


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2])
def test_adapters_equal_the_reference(count):
    torch.manual_seed(0)
    theirs = FluxTransformer2DModel(**FLUX1).eval().requires_grad_(False)
    fill_in(theirs)
    ours = Flux1Transformer(read_config(Flux1Config, theirs.config)).eval().requires_grad_(False)
    ours.load_state_dict(translate(DIFFUSERS, theirs.state_dict()))
    states, scales = [adapter_state(seed) for seed in range(count)], [0.7, 0.4][:count]
    theirs._load_ip_adapter_weights([in_diffusers_names(state) for state in states], low_cpu_mem_usage=False)
    for processor in theirs.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = scales
    x, lengths, t, guidance = torch.randn(16, 12, 8), (5, 9), 0.7, 3.0
    texts, pooled, vectors = [torch.randn(n, 32) for n in lengths], torch.randn(2, 64), torch.randn(count, 2, VECTOR)
    cond = Conditioning(torch.cat(texts), lengths, pooled, guidance)
    around = Around()
    for state, scale, seen in zip(states, scales, vectors):
        own = loaded(state)
        more = own.follow(Alone(ours), seen, ControlUse("net", scale), cond, [t], around)
        around = Around(None, (*around.adapters, *more.adapters), (*around.residuals, *more.residuals))
    prepared = ours.prepare(texts, pooled.unbind(), 12, 8, guidance, (), around=around)
    got = ours([Sample(x, t, one, around, i) for i, one in enumerate(prepared)])
    for i, (y, text, vector) in enumerate(zip(got, texts, pooled)):
        (expected,) = theirs(
            hidden_states=patchify(x, 2)[None],
            encoder_hidden_states=text[None],
            timestep=torch.tensor([t]),
            pooled_projections=vector[None],
            guidance=torch.tensor([guidance]),
            txt_ids=torch.zeros(len(text), 3),
            img_ids=plane(0, 6, 4, 3).float(),
            return_dict=False,
            joint_attention_kwargs={"ip_adapter_image_embeds": [seen[i][None, None] for seen in vectors]},
        )
        agree(y, unpatchify(expected[0], 6, 4, 2), 4 * roundings(theirs))


class Original:
    """InstantX's formula: queries before their rotation also attend to the tokens; the result is projected with the
    attention's own."""

    def __init__(self, k: torch.Tensor, v: torch.Tensor, scale: float):
        self.k, self.v, self.scale = k, v, scale

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (attn.heads, -1))

        q, k, v = (heads(layer(hidden_states)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        key = self.tokens @ self.k.T
        key = heads(key) / (heads(key).square().mean(-1, keepdim=True) + 1e-5).sqrt()
        more = self.scale * self.attend(q, key, heads(self.tokens @ self.v.T))
        if encoder_hidden_states is None:
            q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (q, k))
            return self.attend(q, k, v) + more
        layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        text_q, text_k, text_v = (heads(layer(encoder_hidden_states)) for layer in layers)
        q = torch.cat((attn.norm_added_q(text_q), q), 1)
        k = torch.cat((attn.norm_added_k(text_k), k), 1)
        q, k = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (q, k))
        seen = self.attend(q, k, torch.cat((text_v, v), 1))
        text, picture = seen.split([text_q.shape[1], hidden_states.shape[1]], 1)
        return attn.to_out[0](picture + more), attn.to_add_out(text)

    @staticmethod
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2).flatten(2)


@torch.no_grad()
def test_an_instantx_adapter_equals_the_original_formula():
    torch.manual_seed(0)
    theirs = FluxTransformer2DModel(**FLUX1).eval().requires_grad_(False)
    fill_in(theirs)
    ours = Flux1Transformer(read_config(Flux1Config, theirs.config)).eval().requires_grad_(False)
    ours.load_state_dict(translate(DIFFUSERS, theirs.state_dict()))
    config = InstantXConfig(dim=64, num_blocks=5, tokens=6, token_width=WIDTH, vector_width=VECTOR)
    own = IP_ADAPTER_INSTANTX.build(config).eval().requires_grad_(False)
    fill_in(own)
    state = translate(IP_ADAPTER_INSTANTX.layouts["instantx"], own.state_dict(), back=True)
    names = [f"ip_adapter.{block}.to_{x}_ip.weight" for block in range(5) for x in "kv"]
    assert set(names) < state.keys()
    blocks = [Original(state[k], state[v], 0.7) for k, v in zip(names[::2], names[1::2])]
    theirs.set_attn_processor(dict(zip(theirs.attn_processors, blocks)))
    x, lengths, t, guidance = torch.randn(16, 12, 8), (5, 9), 0.7, 3.0
    texts, pooled, vectors = [torch.randn(n, 32) for n in lengths], torch.randn(2, 64), torch.randn(2, VECTOR)
    cond = Conditioning(torch.cat(texts), lengths, pooled, guidance)
    around = own.follow(Alone(ours), vectors, ControlUse("net", 0.7), cond, [t], Around())
    prepared = ours.prepare(texts, pooled.unbind(), 12, 8, guidance, (), around=around)
    got = ours([Sample(x, t, one, around, i) for i, one in enumerate(prepared)])
    for y, text, vector, seen in zip(got, texts, pooled, vectors):
        hidden = nn.functional.gelu(seen @ state["image_proj.proj.0.weight"].T + state["image_proj.proj.0.bias"])
        hidden = hidden @ state["image_proj.proj.2.weight"].T + state["image_proj.proj.2.bias"]
        norm = state["image_proj.norm.weight"], state["image_proj.norm.bias"]
        for block in blocks:
            block.tokens = nn.functional.layer_norm(hidden.unflatten(-1, (6, WIDTH)), (WIDTH,), *norm)[None]
        (expected,) = theirs(
            hidden_states=patchify(x, 2)[None],
            encoder_hidden_states=text[None],
            timestep=torch.tensor([t]),
            pooled_projections=vector[None],
            guidance=torch.tensor([guidance]),
            txt_ids=torch.zeros(len(text), 3),
            img_ids=plane(0, 6, 4, 3).float(),
            return_dict=False,
        )
        agree(y, unpatchify(expected[0], 6, 4, 2), 4 * roundings(theirs))


@torch.no_grad()
def test_siglip_s_vector_equals_the_reference():
    torch.manual_seed(0)
    config = SiglipConfig(28, 14, 72, 96, 2, 1)
    theirs = SiglipVisionModel(SiglipVisionConfig(**asdict(config))).eval()
    fill_in(theirs)
    own = Siglip(config, pooled=True).eval()
    state = {name.removeprefix("vision_model."): weight for name, weight in theirs.state_dict().items()}
    own.vision_model.load_state_dict(state)
    pixels = torch.randn(2, 3, 28, 28)
    agree(own.pool(pixels), theirs(pixels).pooler_output, 2 * roundings(theirs))
