"""FLUX.3 keeps the contract of a family at tiny size: folders, files, plans, packed weights, adapters, training."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from conftest import random_states
from inkstream import load
from inkstream.engine.drawing.complete import complete
from inkstream.engine.drawing.model import Model
from inkstream.engine.machine.placement import PLACEMENTS
from inkstream.families import adapter_names
from inkstream.families.flux3.specs import KLEIN, KLEIN_BASE
from inkstream.flow import add_noise
from inkstream.nn.forward import Sample
from inkstream.nn.quant import place
from inkstream.quant.pack import pack
from inkstream.types import InputError, Machine, Request
from inkstream.weights.files import write_state
from inkstream.weights.lora.read import read_lora
from published_packings import fp8_rows, int8_convrot, nvfp4, plain

SPECS = {spec.name: spec for spec in (KLEIN, KLEIN_BASE)}
CPU = Machine("cpu", "fp32")


@pytest.fixture(scope="module", params=SPECS)
def folder(request, tmp_path_factory, make_folder) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / f"tiny-{request.param}", SPECS[request.param].tiny)


def wish(model: Model, **fields: Any) -> Request:
    own = {"prompt": "a fox", "width": 64, "height": 48, "steps": 2, "seed": 1, **fields}
    return complete(Request(**own), model.spec)


def draw(model: Model, **fields: Any) -> torch.Tensor:
    request = wish(model, **fields)
    return model.sample(request, model.encode(request))


def decibels(a: torch.Tensor, b: torch.Tensor) -> float:
    error = float((a - b).square().mean())
    return float("inf") if error == 0 else float(10 * torch.log10((a.max() - a.min()) ** 2 / error))


def test_a_folder_is_known_by_its_weights_with_and_without_its_config(folder):
    tiny = SPECS[folder.name.removeprefix("tiny-")].tiny
    assert load(folder, CPU).spec.transformer == tiny.transformer
    (folder / "transformer" / "config.json").rename(folder / "aside")
    try:
        spec = load(folder, CPU).spec
    finally:
        (folder / "aside").rename(folder / "transformer" / "config.json")
    assert (spec.transformer, spec.text_encoder, spec.shift) == (tiny.transformer, tiny.text_encoder, tiny.shift)
    assert (spec.guides, spec.steps, spec.commercial) == (tiny.guides, tiny.steps, False)


def test_under_every_plan_the_picture_is_the_same(folder):
    expected = draw(load(folder, CPU))
    for plan in PLACEMENTS:
        assert torch.equal(draw(load(folder, Machine("cpu", "fp32", placement=plan))), expected), plan


def test_packed_weights_draw_nearly_the_same(folder):
    model, packed = load(folder, CPU), load(folder, CPU)
    transformer: Any = packed.family.transformer  # type: ignore[attr-defined]
    state = transformer.state_dict()
    held = {k: pack("int8", w) if "blocks" in k and w.ndim == 2 else w for k, w in state.items()}
    transformer.load_state_dict(place(transformer, held, torch.float32), assign=True)
    assert 30 <= decibels(draw(model), draw(packed)) < 100


def test_steps_of_training_lower_the_loss_and_reach_every_weight(folder):
    model = load(folder, CPU)
    transformer: Any = model.family.transformer  # type: ignore[attr-defined]
    transformer.requires_grad_(True)
    shape = model.family.latent_shape(64, 64)
    image, noise, seen = torch.randn(shape), torch.randn(shape), torch.randn(shape)
    cond = model.family.encode("a fox")
    cond = replace(cond, references=(seen,))
    optimizer = torch.optim.Adam(transformer.parameters(), 1e-3)
    losses = []
    for _ in range(4):
        (prepared,) = model.family.prepare(cond, 64, 64, ())
        (v,) = model.family.answer([Sample(add_noise(image, noise, 0.5), 0.5, prepared)])
        loss = F.mse_loss(v, noise - image)
        optimizer.zero_grad()
        loss.backward()
        unreached = [name for name, weight in transformer.named_parameters() if weight.grad is None]
        assert [name for name in unreached if "single_blocks.1" not in name] == []
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "packing"),
    [
        ("flux-3-image-klein.safetensors", plain(torch.bfloat16)),
        ("flux3-image-klein-int8-convrot.safetensors", int8_convrot),
        ("flux-3-image-klein-base-fp8r.safetensors", fp8_rows),
        ("flux3-image-klein-base-nvfp4.safetensors", nvfp4),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_published_files_are_opened_in_every_packing(tmp_path, make_folder, name, packing):
    spec = KLEIN_BASE if "base" in name else KLEIN
    folder = make_folder(tmp_path / "model", spec.tiny)
    shutil.rmtree(folder / "transformer")
    (folder / "model_index.json").unlink()
    tensors, meant = {}, {}
    for key, w in random_states(spec.tiny)["transformer"].items():
        if "blocks" in key and w.ndim == 2:
            own, meant[key] = packing(key.removesuffix(".weight"), w)
            tensors |= own
        else:
            tensors[key], meant[key] = w.bfloat16(), w.bfloat16().float()
    save_file({f"model.diffusion_model.{key}": w.contiguous() for key, w in tensors.items()}, folder / name)
    model = load(folder / name, CPU)
    assert (model.spec.transformer, model.spec.guides) == (spec.tiny.transformer, spec.guides)
    plain_model = load(make_folder(tmp_path / "plain", spec.tiny), CPU)
    plain_model.family.transformer.load_state_dict(meant)
    assert decibels(draw(plain_model), draw(model)) > 20


# Adapters -------------------------------------------------------------------------------------------------------------


def test_adapters_are_read_under_the_names_of_every_program(tmp_path):
    """ComfyUI's names, and those of diffusers: of blocks, embedders, modulators and the last layer."""
    names = adapter_names(KLEIN.tiny)
    ours = {
        "content_mode_blocks.image.0.q_proj": "mode_blocks.image.0.attn.to_q",
        "txt_mode_blocks.1.mlp_out": "txt_mode_blocks.1.ff.linear_out",
        "single_blocks.0.attn_out": "single_transformer_blocks.0.attn.to_out.0",
        "emb_in.image_cond": "x_embedders.image_cond",
        "ref_time_in.in_layer": "target_timestep_embedder.linear_1",
        "single_stream_modulations.txt.lin": "single_stream_modulations.txt.linear",
        "final_layer.image.adaLN_modulation.1": "norm_out.linear",
    }
    generator = torch.Generator().manual_seed(0)
    made = {
        path: [torch.randn(2, i, generator=generator), torch.randn(o, 2, generator=generator)]
        for path, (o, i) in names.layers.items()
        if path in ours
    }
    for prefix, of in (("diffusion_model.", dict(zip(ours, ours))), ("transformer.", ours)):
        state = {}
        for path, (down, up) in made.items():
            swapped = torch.cat(up.chunk(2)[::-1]) if of[path] == "norm_out.linear" else up
            state |= {
                f"{prefix}{of[path]}.lora_A.weight": down,
                f"{prefix}{of[path]}.lora_B.weight": swapped.contiguous(),
            }
        file = write_state(tmp_path / f"{prefix}safetensors", state)
        read = read_lora(tmp_path / f"{prefix}safetensors", names)
        assert set(read.layers) == set(ours)
        for path, (down, up) in made.items():
            (part,) = read.layers[path].parts
            assert torch.allclose(part.change.up @ part.change.down, up @ down, atol=1e-5), (file, path)


def test_an_adapter_of_the_flow_maps_embedder_does_not_fit_the_base_model(tmp_path):
    layer = "diffusion_model.ref_time_in.in_layer"
    state = {f"{layer}.lora_A.weight": torch.ones(2, 256), f"{layer}.lora_B.weight": torch.ones(64, 2)}
    write_state(tmp_path / "jumps.safetensors", state)
    read_lora(tmp_path / "jumps.safetensors", adapter_names(KLEIN.tiny))
    with pytest.raises(InputError, match="ref_time_in"):
        read_lora(tmp_path / "jumps.safetensors", adapter_names(KLEIN_BASE.tiny))


def test_prompts_are_padded_to_a_multiple_of_80_tokens_and_their_states_do_not_depend_on_others(folder):
    family = load(folder, CPU).family
    ids = [family.tokens(prompt) for prompt in ("a fox", "a" * 70, "b" * 100)]
    together = family.encode_tokens(ids)
    assert together.lengths == (80, 160, 160)
    for one, states in zip(ids, together.tokens.split(list(together.lengths))):
        assert torch.allclose(family.encode_tokens([one]).tokens, states, atol=1e-5)
