"""Our control nets against the reference implementations, on their own random tiny weights.

diffusers adds the refiner's hints of Z-Image only to a copy of the picture that it drops. There the expected numbers
come from VideoX-Fun's formula, written here with diffusers' blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxControlNetModel,
    FluxTransformer2DModel,
    ZImageControlNetModel,
    ZImageTransformer2DModel,
)
from torch import Tensor, nn

from inkstream.families.flux1.control import CONTROLNET
from inkstream.families.flux1.keys import DIFFUSERS as FLUX1_DIFFUSERS
from inkstream.families.flux1.model import Flux1Transformer
from inkstream.families.flux1.specs import Flux1Config
from inkstream.families.flux2.control import FUN, FunConfig
from inkstream.families.flux2.keys import DIFFUSERS as FLUX2_DIFFUSERS
from inkstream.families.flux2.model import Flux2Transformer
from inkstream.families.flux2.specs import Flux2Config
from inkstream.families.zimage.control import UNION
from inkstream.families.zimage.keys import DIFFUSERS
from inkstream.families.zimage.model import ZImageTransformer
from inkstream.families.zimage.specs import ZImageConfig
from inkstream.nn.around import Around
from inkstream.nn.config import read_config
from inkstream.nn.flux import patchify, plane, unpatchify
from inkstream.nn.forward import Sample
from inkstream.types import Conditioning, ControlUse
from inkstream.weights.keymap import translate
from rounding import agree, roundings

ZIMAGE = {
    "dim": 64, "n_layers": 4, "n_refiner_layers": 2, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32,
    "axes_dims": [8, 12, 12], "axes_lens": [1536, 512, 512],
}  # fmt: skip
VERSIONS = {
    "1.0": {"control_in_dim": 16, "control_layers_places": [0, 2]},
    "2.0": {"control_in_dim": 33, "control_layers_places": [0, 1, 2], "add_control_noise_refiner": "control_layers"},
    "2.1": {
        "control_in_dim": 33,
        "control_layers_places": [0, 2],
        "add_control_noise_refiner": "control_noise_refiner",
    },
    "lite": {"control_in_dim": 33, "control_layers_places": [0], "add_control_noise_refiner": "control_noise_refiner"},
}


def fill_in(module: nn.Module, std: float = 0.1) -> None:
    """Weights far from their neutral start."""
    for name, weight in module.named_parameters():
        nn.init.normal_(weight, mean=1.0 if "norm" in name and weight.ndim == 1 else 0.0, std=std)


def loaded(part: Any, state: dict[str, Tensor]) -> Any:
    """Our net of a published state dict, recognised by its keys and shapes."""
    for rules in part.layouts.values():
        ours = translate(rules, state)
        try:
            net = part.build(part.infer({name: tuple(weight.shape) for name, weight in ours.items()}))
            net.load_state_dict(ours)
        except (KeyError, RuntimeError):
            continue
        return net.eval().requires_grad_(False)
    raise AssertionError("no layout fits")


def unions(version: str) -> tuple[Any, Any, Any, Any]:
    """Their transformer and net, ours and our net."""
    torch.manual_seed(0)
    theirs = ZImageTransformer2DModel(**ZIMAGE).eval().requires_grad_(False)
    fill_in(theirs)
    ours = ZImageTransformer(read_config(ZImageConfig, theirs.config)).eval().requires_grad_(False)
    ours.load_state_dict(translate(DIFFUSERS, theirs.state_dict()))
    sizes = {key: ZIMAGE[key] for key in ("dim", "n_refiner_layers", "n_heads")}
    net = ZImageControlNetModel(
        **VERSIONS[version], control_refiner_layers_places=[0, 1], n_kv_heads=ZIMAGE["n_heads"], **sizes
    )
    fill_in(net.eval().requires_grad_(False))
    state = net.state_dict()
    net = ZImageControlNetModel.from_transformer(net, theirs)
    return theirs, net, ours, loaded(UNION, state)


def zimage_formula(theirs: Any, net: Any, x: Tensor, t: float, caption: Tensor, seen: Tensor, scale: float) -> Tensor:
    """VideoX-Fun's forward with refiner hints, for one caption and picture without pads."""
    emb = theirs.t_embedder(torch.tensor([t * theirs.t_scale]))
    packed = net.patchify_and_embed([x.unsqueeze(1)], [caption], 2, 1)
    (picture,), (words,), (size,), (places,), (word_places,), (pads,), _ = packed
    assert not pads.any()
    ropes = [theirs.rope_embedder(ids)[None] for ids in (places, word_places)]
    whole_rope = torch.cat(ropes, 1)

    def run(block: Any, x: Tensor, table: Tensor) -> Tensor:
        return block(x, torch.ones(x.shape[:2], dtype=torch.bool), table, emb)

    def control(blocks: Any, c: Tensor, x: Tensor, table: Tensor) -> tuple[list[Tensor], Tensor]:
        hints = []
        c = blocks[0].before_proj(c) + x
        for block in blocks:
            mods = block.adaLN_modulation(emb).unsqueeze(1).chunk(4, dim=2)
            attended = block.attention(
                block.attention_norm1(c) * (1 + mods[0]),
                attention_mask=torch.ones(c.shape[:2], dtype=torch.bool),
                freqs_cis=table,
            )
            c = c + mods[1].tanh() * block.attention_norm2(attended)
            c = c + mods[3].tanh() * block.ffn_norm2(block.feed_forward(block.ffn_norm1(c) * (1 + mods[2])))
            hints.append(block.after_proj(c))
        return hints, c

    c = net.control_all_x_embedder["2-1"](net.patchify([seen.unsqueeze(1)], 2, 1)[0])[None]
    x = theirs.all_x_embedder["2-1"](picture)[None]
    hints, c = control(net.control_noise_refiner or net.control_layers, c, x, ropes[0])
    for block, hint in zip(theirs.noise_refiner, hints):
        x = run(block, x, ropes[0]) + scale * hint
    words = theirs.cap_embedder(words)[None]
    for block in theirs.context_refiner:
        words = block(words, torch.ones(words.shape[:2], dtype=torch.bool), ropes[1])
    whole = torch.cat((x, words), 1)
    hints, _ = control(net.control_layers, torch.cat((c, words), 1), whole, whole_rope)
    for i, block in enumerate(theirs.layers):
        whole = run(block, whole, whole_rope)
        if i in net.control_layers_places:
            whole = whole + scale * hints[net.control_layers_places.index(i)]
    out = theirs.all_final_layer["2-1"](whole, emb)
    return theirs.unpatchify(list(out), [size], 2, 1)[0].squeeze(1)


class Alone:
    """As much of a family as a net reads."""

    def __init__(self, transformer: Any):
        self.transformer = transformer


def answers(model: Any, net: Any, x: Tensor, t: float, cond: Conditioning, seen: Tensor, scale: float) -> list[Tensor]:
    """Our forward of all prompts of a picture with a net. model, t: with the release's time."""
    use = ControlUse("net", scale)
    (residual,) = net.follow(Alone(model), seen, use, cond, [1 - t], Around()).residuals
    around = Around(residuals=(residual,))
    prepared = model.prepare_all(cond.tokens.split(list(cond.lengths)), *x.shape[1:], around)
    return model([Sample(x, t, one, around, i) for i, one in enumerate(prepared)])


@torch.no_grad()
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("scale", [0.75, 0.2])
def test_a_union_net_for_z_image_equals_videox_fun_and_diffusers(version, scale):
    theirs, net, ours, own = unions(version)
    x, captions = torch.randn(16, 16, 8), [torch.randn(32, 32), torch.randn(64, 32)]
    seen = torch.randn(net.control_in_dim, 16, 8)
    t = 0.25
    cond = Conditioning(torch.cat(captions), (32, 64))
    got = answers(ours, own, x, t, cond, seen, scale)
    plain = [ours([Sample(x, t, one)])[0] for one in ours.prepare_all(captions, 16, 8)]
    for y, without, caption in zip(got, plain, captions):
        if version == "1.0":  # no hints in the refiner: diffusers is right
            hints = net([x.unsqueeze(1)], torch.tensor([t]), [caption], [seen.unsqueeze(1)], conditioning_scale=scale)
            given = ([x.unsqueeze(1)], torch.tensor([t]), [caption])
            expected = theirs(*given, controlnet_block_samples=hints, return_dict=False)[0][0].squeeze(1)
        else:
            expected = zimage_formula(theirs, net, x, t, caption, seen, scale)
        agree(y, expected, 2 * roundings(theirs))
        assert float((y - without).abs().max()) > 0.01


FLUX1 = {
    "in_channels": 64, "num_layers": 3, "num_single_layers": 5, "attention_head_dim": 32, "num_attention_heads": 2,
    "joint_attention_dim": 32, "pooled_projection_dim": 64, "guidance_embeds": True, "axes_dims_rope": (4, 14, 14),
}  # fmt: skip
NETS = {
    "instantx": {"num_layers": 2, "num_single_layers": 2},
    "union": {"num_layers": 2, "num_single_layers": 2, "num_mode": 7},
    "union-pro-2": {"num_layers": 2, "num_single_layers": 0},
    "xlabs": {"num_layers": 2, "num_single_layers": 0, "conditioning_embedding_channels": 16},
}


@torch.no_grad()
@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("spelling", ["diffusers", "native"])
def test_a_net_for_flux1_equals_the_reference(name, spelling):
    """XLabs' nets go by their own formula there too: diffusers' pipeline cycles through their residuals."""
    torch.manual_seed(0)
    theirs = FluxTransformer2DModel(**FLUX1).eval().requires_grad_(False)
    net = FluxControlNetModel(**{**FLUX1, **NETS[name]}, patch_size=2 if name == "xlabs" else 1)
    net = net.eval().requires_grad_(False)
    for module in (theirs, net):
        fill_in(module)
    ours = Flux1Transformer(read_config(Flux1Config, theirs.config)).eval().requires_grad_(False)
    ours.load_state_dict(translate(FLUX1_DIFFUSERS, theirs.state_dict()))
    state = net.state_dict()
    if spelling == "native":
        rules = CONTROLNET.layouts
        state = translate(rules["native"], translate(rules["diffusers"], state), back=True)
        assert {"pos_embed_input.weight", "double_blocks.0.img_mod.lin.weight"} <= state.keys()
    own = loaded(CONTROLNET, state)
    x, seen, lengths, t, guidance = torch.randn(16, 12, 8), torch.randn(16, 12, 8), (5, 9), 0.7, 3.0
    texts, pooled = [torch.randn(n, 32) for n in lengths], torch.randn(2, 64)
    hint, expected_hint = seen, patchify(seen, 2)[None]
    if name == "xlabs":
        pixels = torch.rand(3, 96, 64)
        hint, expected_hint = own.input_hint_block(pixels[None] * 2 - 1)[0], pixels[None] * 2 - 1
        agree(hint, net.input_hint_block(expected_hint)[0], 64)
    cond = Conditioning(torch.cat(texts), lengths, pooled, guidance)
    use = ControlUse("net", 0.6, mode="pose" if name == "union" else "")
    around = own.follow(Alone(ours), hint, use, cond, [t], Around())
    prepared = ours.prepare(texts, pooled.unbind(), 12, 8, guidance, (), around=around)
    got = ours([Sample(x, t, one, around, i) for i, one in enumerate(prepared)])
    for y, text, vector in zip(got, texts, pooled):
        given = {
            "hidden_states": patchify(x, 2)[None], "encoder_hidden_states": text[None], "timestep": torch.tensor([t]),
            "pooled_projections": vector[None], "guidance": torch.tensor([guidance]), "return_dict": False,
            "txt_ids": torch.zeros(len(text), 3), "img_ids": plane(0, 6, 4, 3).float(),
        }  # fmt: skip
        mode = {"controlnet_mode": torch.tensor([[4]])} if name == "union" else {}
        doubles, singles = net(**given, controlnet_cond=expected_hint, conditioning_scale=0.6, **mode)
        (expected,) = theirs(
            **given,
            controlnet_block_samples=doubles,
            controlnet_single_block_samples=singles,
            controlnet_blocks_repeat=name == "xlabs",
        )
        agree(y, unpatchify(expected[0], 6, 4, 2), 2 * roundings(theirs, net))


FLUX2 = {
    "in_channels": 16, "num_layers": 4, "num_single_layers": 2, "attention_head_dim": 32, "num_attention_heads": 2,
    "joint_attention_dim": 96, "mlp_ratio": 3.0, "axes_dims_rope": (8, 8, 8, 8),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("references", [0, 1])
def test_a_union_net_for_flux2_equals_videox_funs_formula(references):
    """The formula is written here with diffusers' blocks: a hook adds each hint to the model's picture tokens."""
    torch.manual_seed(0)
    theirs = Flux2Transformer2DModel(**FLUX2).eval().requires_grad_(False)
    fill_in(theirs, 0.05)
    ours = Flux2Transformer(read_config(Flux2Config, {**FLUX2, "guidance_embeds": True})).eval().requires_grad_(False)
    ours.load_state_dict(translate(FLUX2_DIFFUSERS, theirs.state_dict()))
    config = FunConfig(control_in_dim=36, num_layers=2, attention_head_dim=32, num_attention_heads=2)
    net = FUN.build(config).eval().requires_grad_(False)
    for name, weight in net.named_parameters():
        nn.init.normal_(weight, mean=1.0 if "norm" in name else 0.0, std=0.05)
    state = translate(FUN.layouts["published"], net.state_dict(), back=True)
    own = loaded(FUN, state)
    assert own.config == config
    x, seen, text, t, guidance = torch.randn(16, 6, 4), torch.randn(36, 6, 4), torch.randn(7, 96), 0.7, 3.0
    reference = [torch.randn(16, 4, 4)] * references
    cond = Conditioning(text, (7,), guidance=guidance, references=tuple(reference))
    around = own.follow(Alone(ours), seen, ControlUse("net", 0.6), cond, [t], Around())
    (prepared,) = ours.prepare([text], 6, 4, guidance, (), reference, around=around)
    (got,) = ours([Sample(x, t, prepared, around)])
    blocks = [deepcopy(theirs.transformer_blocks[0]) for _ in range(2)]
    prefix = "control_transformer_blocks."
    for i, block in enumerate(blocks):
        own_state = {k.removeprefix(f"{prefix}{i}."): v for k, v in state.items() if k.startswith(f"{prefix}{i}.")}
        block.load_state_dict({k: v for k, v in own_state.items() if "_proj." not in k or "attn" in k})
    hints: list[Tensor] = []

    def before_first(module: nn.Module, args: Any, given: dict[str, Any]) -> None:
        picture, words = given["hidden_states"], given["encoder_hidden_states"]
        control = patchify(seen, 1)[None]
        control = torch.nn.functional.pad(control, (0, 0, 0, picture.shape[1] - control.shape[1]))
        c = net.before_proj(net.control_img_in(control)) + picture
        for block, make in zip(blocks, net.after_proj):
            words, c = block(**{**given, "hidden_states": c, "encoder_hidden_states": words})
            hints.append(make(c))

    def behind(nth: int) -> Callable[..., Any]:
        return lambda module, args, given, out: (out[0], out[1] + 0.6 * hints[nth])

    theirs.transformer_blocks[0].register_forward_pre_hook(before_first, with_kwargs=True)
    for nth in range(2):
        theirs.transformer_blocks[2 * nth].register_forward_hook(behind(nth), with_kwargs=True)
    ids = [plane(0, 6, 4, 4), *(plane(10, 4, 4, 4) for _ in reference)]
    words = torch.zeros(7, 4)
    words[:, 3] = torch.arange(7)
    (out,) = theirs(
        hidden_states=torch.cat([patchify(one, 1) for one in (x, *reference)])[None],
        encoder_hidden_states=text[None],
        timestep=torch.tensor([t]),
        guidance=torch.tensor([guidance]),
        img_ids=torch.cat(ids)[None].float(),
        txt_ids=words[None],
        return_dict=False,
    )
    assert hints
    agree(got, unpatchify(out[0, :24], 6, 4, 1), 2 * roundings(theirs, net))
    (plain,) = ours([Sample(x, t, ours.prepare([text], 6, 4, guidance, (), reference)[0])])
    assert float((got - plain).abs().max()) > 0.001
