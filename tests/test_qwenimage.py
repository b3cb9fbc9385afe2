"""Qwen-Image 2.1 alone: sizes, names, times, what is computed once, transparency. Parity tests compare it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from inkstream import Engine, load
from inkstream.engine.drawing.complete import complete
from inkstream.engine.drawing.larger import times_of
from inkstream.engine.drawing.model import Model
from inkstream.engine.machine.placement import PLACEMENTS
from inkstream.engine.pictures.metadata import encode_picture
from inkstream.families.names import named
from inkstream.families.qwenimage.keys import COMFYUI, DIFFUSERS
from inkstream.families.qwenimage.model import QwenImageTransformer, picture_positions, text_positions
from inkstream.families.qwenimage.specs import BASE, SPECS, TURBO, TURBO_TIMES, infer_config
from inkstream.flow import add_noise
from inkstream.nn.forward import Sample
from inkstream.types import Machine, Request
from inkstream.weights.keymap import translate

CPU = Machine("cpu", "fp32")


@pytest.fixture(scope="module", params=SPECS)
def folder(request, tmp_path_factory, make_folder) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / f"tiny-{request.param}", SPECS[request.param].tiny)


def draw(model: Model, **fields: Any) -> torch.Tensor:
    request = complete(
        Request(**{"prompt": "a fox", "width": 64, "height": 48, "steps": 2, "seed": 1, **fields}), model.spec
    )
    return model.sample(request, model.encode(request))


def test_the_full_model_has_7_1_billion_parameters_and_is_known_by_its_shapes():
    with torch.device("meta"):
        state = QwenImageTransformer(BASE.transformer).state_dict()
    assert sum(weight.numel() for weight in state.values()) == 7_115_124_736
    assert infer_config({key: tuple(weight.shape) for key, weight in state.items()}) == BASE.transformer


def test_each_layout_round_trips_to_the_identity_and_comfyuis_files_hold_two_layers_as_one():
    state = QwenImageTransformer(BASE.tiny.transformer).state_dict()
    for rules in (DIFFUSERS, COMFYUI):
        theirs = translate(rules, state, back=True)
        ours = translate(rules, theirs)
        assert all(torch.equal(ours[key], state[key]) for key in state)
    gate, up = (state[f"transformer_blocks.1.img_mlp.{name}.weight"] for name in ("gate_layer", "proj"))
    assert torch.equal(theirs["transformer_blocks.1.img_mlp.gate_up.weight"], torch.cat((gate, up)))


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("Qwen-Image-2.1-Turbo-Q4_K_M.gguf", TURBO),
        ("qwen_image_2.1_turbo_int8_convrot.safetensors", TURBO),
        ("Qwen/Qwen-Image-2.1", BASE),
    ],
)
def test_names_of_files_are_known(name, known):
    assert named(name) == known


def test_positions_of_the_picture_follow_the_text_and_count_from_its_middle():
    assert text_positions(2).tolist() == [[0, 0, 0], [1, 1, 1]]
    assert picture_positions(7, 2, 3).tolist() == [[7, r, c] for r in (-1, 0) for c in (-2, -1, 0)]


def test_turbo_has_times_of_its_own_unless_other_ones_are_asked_for(folder):
    spec = load(folder, CPU).spec
    is_turbo = "turbo" in folder.name
    assert (spec.times, spec.guides, spec.steps) == ((TURBO_TIMES, "none", 8) if is_turbo else ((), "twice", 40))

    def times(**fields: Any) -> list[float]:
        return times_of(complete(Request(prompt="a fox", seed=0, **fields), spec), spec, from_picture=False)[0]

    assert (times() == list(TURBO_TIMES)) == is_turbo
    assert times(steps=2) == pytest.approx([1, 0.5, 0] if is_turbo else times(steps=2))
    assert times(shift=3.0) != times()


def test_text_is_read_once_and_not_behind_the_last_block():
    torch.manual_seed(0)
    model, rows = QwenImageTransformer(BASE.tiny.transformer).requires_grad_(False), {0: [], 1: []}
    for i, block in enumerate(model.transformer_blocks):
        block.attn.to_out[0].register_forward_hook(lambda _, args, out, i=i: rows[i].append(len(out)))
    (sample,) = model.prepare([torch.randn(5, 32)], 2, 3, [1.0, 0.5])
    assert rows == {0: [5], 1: []}
    for t in (1.0, 0.5):
        model([Sample(torch.randn(8, 2, 3), t, sample)])
    assert rows == {0: [5, 6, 6], 1: [6, 6]}


def test_under_every_plan_the_picture_is_the_same(folder):
    expected = draw(load(folder, CPU))
    for plan in PLACEMENTS:
        assert torch.equal(draw(load(folder, Machine("cpu", "fp32", placement=plan))), expected), plan


def test_steps_of_training_lower_the_loss_and_reach_every_weight(folder):
    model = load(folder, CPU)
    transformer: Any = model.family.transformer  # type: ignore[attr-defined]
    transformer.requires_grad_(True)
    image, noise = (torch.randn(model.family.latent_shape(64, 64)) for _ in range(2))
    cond = model.family.encode("a fox")
    optimizer = torch.optim.Adam(transformer.parameters(), 1e-3)
    losses = []
    for _ in range(4):
        (prepared,) = model.family.prepare(cond, 64, 64, ())
        (v,) = model.family.answer([Sample(add_noise(image, noise, 0.5), 0.5, prepared)])
        loss = F.mse_loss(v, noise - image)
        optimizer.zero_grad()
        loss.backward()
        assert [name for name, weight in transformer.named_parameters() if weight.grad is None] == []
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


# Transparency ---------------------------------------------------------------------------------------------------------


def test_pictures_keep_their_transparency_in_png_and_webp_and_lie_on_white_in_jpeg(folder):
    request = Request(prompt="a fox", model=str(folder), steps=2, seed=1, width=64, height=64)
    (picture,) = Engine(CPU).generate(request).images
    assert picture.mode == "RGBA"
    assert picture.getchannel("A").getextrema()[0] < 255
    files = {
        kind: Image.open(io.BytesIO(encode_picture(picture, kind, request, BASE))) for kind in ("PNG", "WEBP", "JPEG")
    }
    assert {kind: file.mode for kind, file in files.items()} == {"PNG": "RGBA", "WEBP": "RGBA", "JPEG": "RGB"}
    assert files["PNG"].tobytes() == picture.tobytes()
    white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    apart = F.l1_loss(
        *(torch.frombuffer(bytearray(one.tobytes()), dtype=torch.uint8).float() for one in (white, files["JPEG"]))
    )
    assert apart < 8


def test_a_start_picture_is_opaque_and_what_a_mask_keeps_stays(folder):
    start = Image.effect_noise((64, 64), 60).convert("RGB")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    request = Request(prompt="a fox", model=str(folder), steps=2, seed=1, image=start, mask=mask)
    (picture,) = Engine(CPU).generate(request).images
    left = (0, 0, 32, 64)
    assert picture.mode == "RGB"
    assert picture.crop(left).tobytes() == start.crop(left).tobytes()
    assert picture.tobytes() != start.tobytes()
    model = load(folder, CPU)
    opaque = torch.rand(1, 3, 32, 32)
    given = model.family.encode_image(torch.cat((opaque, torch.ones(1, 1, 32, 32)), 1))
    assert torch.equal(model.family.encode_image(opaque), given)
