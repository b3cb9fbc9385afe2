"""Pictures that are enlarged after they are drawn: a second pass in windows, with and without an upscaling model."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from inkstream import Engine
from inkstream.engine.drawing.complete import complete
from inkstream.engine.drawing.larger import evaluations_of, second_pass
from inkstream.engine.drawing.options import options
from inkstream.engine.engine import remarks
from inkstream.engine.machine.loader import open_model
from inkstream.engine.machine.memory import Placing
from inkstream.families import SPECS
from inkstream.families.upscalers.compact import CompactConfig, SRVGGNetCompact
from inkstream.types import Done, InputError, Loading, Machine, Request, Step


@pytest.fixture(scope="module")
def upscalers(tmp_path_factory) -> Path:
    """A folder with one model, which doubles and darkens a picture."""
    folder = tmp_path_factory.mktemp("upscalers")
    network = SRVGGNetCompact(CompactConfig(num_feat=4, num_conv=0, upscale=2))
    state = {name: torch.zeros_like(weight) for name, weight in network.state_dict().items()}
    state["body.2.bias"] -= 0.1
    torch.save(state, folder / "dark.pth")
    return folder


@pytest.fixture(scope="module")
def engine(upscalers) -> Engine:
    return Engine(Machine(device="cpu", dtype="fp32", upscaler_folder=str(upscalers)))


def wish(folder: Path, **fields: Any) -> Request:
    return Request(
        **{"prompt": "a fox", "width": 64, "height": 64, "steps": 4, "seed": 0, "model": str(folder), **fields}
    )


def events_of(engine: Engine, request: Request) -> list[Any]:
    return list(engine.submit(request))


def drawn(engine: Engine, request: Request) -> Image.Image:
    (image,) = engine.generate(request).images
    return image


def test_the_second_pass_is_the_request_that_starts_from_the_enlarged_picture(engine, tiny_base_folder):
    first = drawn(engine, wish(tiny_base_folder))
    ours = drawn(engine, wish(tiny_base_folder, upscale="2x", upscale_strength=0.5, tile=64))
    by_hand = wish(tiny_base_folder, width=128, height=128, image=first, strength=0.5, tile=64)
    assert ours.size == (128, 128)
    assert ours.tobytes() == drawn(engine, by_hand).tobytes()


def test_without_strength_there_is_no_second_pass(engine, tiny_base_folder):
    first = drawn(engine, wish(tiny_base_folder))
    ours = drawn(engine, wish(tiny_base_folder, upscale="100x90", upscale_strength=0))
    assert ours.size == (100, 90)
    larger = first.resize((100, 100), Image.Resampling.LANCZOS).crop((0, 5, 100, 95))
    assert np.abs(np.asarray(ours, np.int16) - np.asarray(larger, np.int16)).mean() < 3


def test_an_upscaling_model_enlarges_before_the_second_pass_and_small_start_pictures(engine, tiny_base_folder):
    first = drawn(engine, wish(tiny_base_folder))
    darker = first.resize((128, 128), Image.Resampling.NEAREST)
    expected = (np.asarray(darker, np.float64) - 25.5).clip(0)
    fields = {"upscale": "2x", "upscaler": "dark", "tile": 64}
    only = drawn(engine, wish(tiny_base_folder, **fields, upscale_strength=0))
    assert np.abs(np.asarray(only, np.float64) - expected).max() <= 1
    again = drawn(engine, wish(tiny_base_folder, **fields, upscale_strength=0.5))
    plain = drawn(engine, wish(tiny_base_folder, upscale="2x", upscale_strength=0.5, tile=64))
    assert again.tobytes() != plain.tobytes()
    start = {"image": first, "width": 128, "height": 128, "strength": 0.5, "tile": 64}
    assert drawn(engine, wish(tiny_base_folder, **start, upscaler="dark")).tobytes() == again.tobytes()


def test_a_start_picture_of_strength_0_is_only_enlarged_and_no_model_is_loaded(upscalers, tmp_path):
    engine = Engine(Machine(device="cpu", upscaler_folder=str(upscalers)))
    image = Image.fromarray(np.random.default_rng(0).integers(30, 256, (33, 50, 4), np.uint8))
    request = Request(image=image, strength=0, upscale="2x", upscale_strength=0, upscaler="dark", seed=1, count=2)
    events = events_of(engine, request)
    done = [event for event in events if isinstance(event, Done)]
    assert [event.image.mode for event in done] == ["RGBA", "RGBA"]
    twice = np.asarray(image.convert("RGB").resize((100, 66), Image.Resampling.NEAREST), np.float64) - 25.5
    assert np.abs(np.asarray(done[0].image.convert("RGB"), np.float64) - twice).max() <= 1
    assert engine._model is None
    assert engine.remarks(request) == []
    assert engine.ran_on("pocket") == {"device": "cpu"}
    assert [event.step for event in events if isinstance(event, Step)] == [1]
    buffer = io.BytesIO()
    done[1].image.save(buffer, "PNG")
    assert engine.generate(done[1].request).images[0].tobytes() == done[1].image.tobytes()


def test_the_steps_of_both_passes_are_counted_on(engine, tiny_base_folder):
    request = wish(tiny_base_folder, upscale="2x", upscale_strength=0.5, upscaler="dark", count=2)
    events = events_of(engine, request)
    steps = [(event.index, event.step, event.steps) for event in events if isinstance(event, Step)]
    assert steps == [(index, step, 6) for index in range(2) for step in range(1, 7)]
    assert "tile 1 of 1" in [event.what for event in events if isinstance(event, Loading)]
    done = [event for event in events if isinstance(event, Done)]
    assert [event.image.size for event in done] == [(128, 128)] * 2
    assert engine.generate(done[1].request).images[0].tobytes() == done[1].image.tobytes()


def test_the_second_pass_is_drawn_in_windows_of_the_models_size_with_their_shift():
    spec = SPECS["flux1-dev"]
    again = second_pass(complete(Request(prompt="x", upscale="2x", seed=1), spec), spec)
    assert again is not None
    assert (again.width, again.height, again.tile, again.strength) == (2048, 2048, 1024, 0.25)
    assert again.shift == complete(Request(prompt="x"), spec).shift
    assert evaluations_of(again, spec) == 13  # of 50
    own = second_pass(complete(Request(prompt="x", upscale="1.5x", shift=2, tile=512), spec), spec)
    assert own is not None
    assert (own.width, own.tile, own.shift) == (1536, 512, 2)
    seen = second_pass(
        complete(Request(prompt="x", upscale="2x", reference=(Image.new("RGB", (64, 64)),)), SPECS["flux2-klein-4b"]),
        SPECS["flux2-klein-4b"],
    )
    assert seen is not None
    assert seen.tile is None  # it sees its references whole


def test_the_memory_of_the_second_pass_and_of_the_model_is_foreseen(engine, upscalers, tiny_base_folder, tmp_path):
    machine = Machine(device="cpu", dtype="fp32", upscaler_folder=str(upscalers))
    placing = Placing(open_model(tiny_base_folder, machine))
    plain, larger, model = (
        placing.plans(wish(tiny_base_folder, **fields))[0]
        for fields in ({}, {"upscale": "4x", "tile": 64}, {"upscale": "4x", "tile": 64, "upscaler": "dark"})
    )
    whole = placing.plans(wish(tiny_base_folder, width=256, height=256))[0]
    assert larger.phases["picture"] == whole.phases["picture"] > plain.phases["picture"]
    assert larger.phases["steps"] < whole.phases["steps"]
    assert model.phases["picture"] >= larger.phases["picture"]


PICTURE = Image.new("RGB", (64, 64), "white")


@pytest.mark.parametrize(
    ("model", "fields", "told"),
    [
        ("z-image-turbo", {"image": PICTURE, "mask": PICTURE}, "a second pass changes what the mask keeps"),
        ("flux1-fill-dev", {"image": PICTURE, "mask": PICTURE}, "does not draw a picture again"),
        ("z-image-turbo", {"width": 8192, "height": 8192}, "upscale 2x makes 16384x16384, and a side of a"),
    ],
)  # fmt: skip
def test_what_has_no_second_pass_is_told(model, fields, told):
    with pytest.raises(InputError, match=told):
        complete(Request(prompt="x", upscale="2x", **fields), SPECS[model])
    complete(Request(prompt="x", upscale="2x", upscale_strength=0, **fields), SPECS[model])


def test_regions_and_control_pictures_are_in_the_second_pass_too_unless_it_crops():
    spec = SPECS["z-image-turbo"]
    wishes = [{"regions": ["0,0,32x64:a star", "0,0,0.5x1:a fox"]}, {"control": [PICTURE], "control_nets": ["net"]}]
    for fields in wishes:
        again = second_pass(complete(Request(prompt="x", upscale="2x", width=64, height=64, **fields), spec), spec)
        assert again is not None
        assert (again.width, again.tile) == (128, 1024)
        assert again.regions == (("0,0,0.5x1:a star", "0,0,0.5x1:a fox") if "regions" in fields else ())
        with pytest.raises(InputError, match="upscale 128x96 crops a picture of 64x64, and control pictures and reg"):
            complete(Request(prompt="x", upscale="128x96", width=64, height=64, **fields), spec)


def test_options_without_effect_are_told():
    spec = SPECS["z-image-turbo"]
    assert remarks(Request(prompt="x", upscaler="dark"), spec) == [
        "upscaler has no effect: nothing is enlarged: give upscale, or a start picture"
    ]
    assert remarks(Request(prompt="x", upscale_strength=0.5), spec) == [
        "upscale strength 0.5 has no effect: nothing is enlarged: give upscale"
    ]
    table = options(spec, Request(prompt="x", upscale="2x", upscaler="dark", upscale_strength=0.5))
    assert {table[name].effect for name in ("upscale", "upscaler", "upscale_strength")} == {"honours"}


def test_an_upscaler_that_is_not_there_is_told(engine, tiny_base_folder):
    with pytest.raises(InputError, match=r"upscaler drak is neither a file nor a name in .*: did you mean dark"):
        drawn(engine, wish(tiny_base_folder, upscale="2x", upscaler="drak"))
