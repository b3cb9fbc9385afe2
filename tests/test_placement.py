"""Plans: wherever a model's parts are, it draws the same; what a plan takes is foreseen, and no budget is passed."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from inkstream.bench.random_model import write_random
from inkstream.engine.engine import Engine
from inkstream.engine.machine.loader import open_model
from inkstream.engine.machine.memory import Placing, taken_by_process, typical
from inkstream.engine.machine.placement import BESIDE, PLACEMENTS
from inkstream.families import SPECS
from inkstream.nn.heap import give_back_freed_memory
from inkstream.types import Done, Failed, InputError, Loading, Machine, Request, read_size

ALL = ["z-image-turbo", "flux1-dev", "flux1-redux-dev", "flux1-fill-dev", "flux2-klein-4b", "flux2-dev"]


@pytest.fixture(scope="module")
def folders(make_folder, tmp_path_factory):
    place = tmp_path_factory.mktemp("placed")
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = make_folder(place / name, SPECS[name].tiny)
        return made[name]

    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose blocks are most of it: 60 MB of transformer in bfloat16."""
    turbo = SPECS["z-image-turbo"].tiny
    transformer = replace(turbo.transformer, dim=512, n_layers=8, n_heads=4, axes_dims=(32, 48, 48))
    spec = replace(turbo, transformer=transformer, text_encoder=replace(turbo.text_encoder, vocab_size=2048))
    return write_random(spec, tmp_path_factory.mktemp("wide") / "wide")


def wish(folder: Path, **fields) -> Request:
    spec = open_model(folder, Machine("cpu")).source.spec
    asked = typical(spec)
    return asked.model_copy(update={"model": str(folder), "width": 64, "height": 64, "steps": 2, "seed": 5, **fields})


@pytest.mark.parametrize("name", ALL)
def test_every_plan_draws_the_same_picture(folders, name):
    request = wish(folders(name))
    pictures = [np.asarray(Engine(Machine("cpu", placement=plan)).generate(request).images[0]) for plan in PLACEMENTS]
    assert pictures[0].std() > 0
    assert np.array_equal(pictures[0], pictures[1])
    assert np.array_equal(pictures[0], pictures[2])


@pytest.mark.parametrize("name", ALL)
def test_a_more_frugal_plan_is_foreseen_to_take_less(folders, name):
    placing = Placing(open_model(folders(name), Machine("cpu")))
    resident, parked, streamed = placing.plans(wish(folders(name)))
    assert [plan.placement for plan in (resident, parked, streamed)] == list(PLACEMENTS)
    assert resident.phases["prompt"] > parked.phases["prompt"] >= streamed.phases["prompt"]
    assert parked.phases["steps"] > streamed.phases["steps"]


@pytest.mark.slow
def test_weights_parked_or_streamed_leave_the_device(wide):
    for plan, some in (("parked", 1.0), ("streamed", 0.35)):
        engine = Engine(Machine("cpu", "fp32", placement=plan))
        engine.generate(wish(wide))
        transformer = engine.model.family.transformer  # type: ignore[attr-defined]
        on_device = sum(p.nbytes for p in transformer.parameters() if p.dtype == torch.float32)
        assert on_device <= some * sum(4 * p.numel() for p in transformer.parameters())


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.integers(2**28, 2**30), st.sampled_from([64, 256]), st.sampled_from([64]))
def test_a_plan_is_never_foreseen_to_take_more_than_its_budget(budget, width, height):
    KNOWN.setdefault("opened", open_model("pocket", Machine("cpu")))
    request = Request(prompt="a red circle", width=width, height=height, seed=1)
    placing = Placing(KNOWN["opened"], budget)
    placing._known = KNOWN.setdefault("plans", {})
    taken = {plan.placement: plan.peak + placing.taken for plan in placing.plans(request)}
    if min(taken.values()) > budget:
        with pytest.raises(InputError, match="GiB of memory are not enough"):
            placing.choose(request)
    else:
        chosen = placing.choose(request)
        assert taken[chosen] <= budget
        assert all(taken[name] > budget for name in list(PLACEMENTS)[: list(PLACEMENTS).index(chosen)])


KNOWN: dict = {}  # what takes long, of the examples before


def test_what_is_plenty_without_a_look_is_plenty_with_one():
    placing = Placing(open_model("pocket", Machine("cpu")), 2**40)
    request = Request(prompt="x", width=1024, height=1024, seed=1)
    assert placing.suiting(request) == list(PLACEMENTS)
    assert placing.plans(request)[0].peak < 32 * 1024 * 1024 * 1024


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not say what a peak was")
@pytest.mark.parametrize("plan", PLACEMENTS)
def test_what_is_foreseen_is_what_a_process_takes(wide, plan):
    script = Path(__file__).parents[1] / "scripts" / "plan_peaks.py"
    words = [sys.executable, script, wide, "--child", "--placement", plan, "--pixels", "512", "--steps", "1"]
    command = [*map(str, words), "--device=cpu"]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(3)]
    found = [json.loads(run.stdout.splitlines()[-1]) for run in runs]
    # The peak is the largest of three: the system takes pages back at its own time, so that one run can miss the peak.
    measured, (foreseen,) = max(one["measured"] for one in found), {one["foreseen"] for one in found}
    assert abs(measured - foreseen) < 0.1 * foreseen + BESIDE


def test_where_memory_is_short_what_was_freed_is_given_back_between_phases(folders, monkeypatch):
    given_back: list[str] = []
    for plan in PLACEMENTS:
        engine, request = Engine(Machine("cpu", placement=plan)), wish(folders("z-image-turbo"), count=2)
        list(engine.load(request.model, request))
        with monkeypatch.context() as patch:
            patch.setattr("inkstream.engine.engine.give_back_freed_memory", lambda plan=plan: given_back.append(plan))
            engine.generate(request)
    assert given_back == ["parked"] * 3 + ["streamed"] * 3  # behind the prompt, before either picture


def test_a_model_has_left_memory_before_the_next_is_opened(folders, monkeypatch):
    engine = Engine(Machine("cpu"))
    engine.generate(wish(folders("z-image-turbo")))
    before, alive = weakref.ref(engine.model.family.transformer), []
    opening = engine._open

    def open_and_look(*given):
        alive.append(before() is not None)
        return opening(*given)

    monkeypatch.setattr(engine, "_open", open_and_look)
    engine.generate(wish(folders("flux2-klein-4b")))
    assert alive == [False]


@pytest.mark.slow
def test_running_out_of_memory_falls_to_the_next_plan_and_says_so(folders):
    """Memory runs out inside the model, at the second picture of two: the first is not drawn again."""
    folder = folders("z-image-turbo")
    request = wish(folder, count=2)
    expected = Engine(Machine("cpu")).generate(request).images
    engine = Engine(Machine("cpu", placement=None))
    drawn, notes = [], []
    for event in engine.submit(request):
        if isinstance(event, Done):
            drawn.append(event)
            if len(drawn) == 1:
                full = engine.model.family.transformer.x_embedder  # type: ignore[attr-defined]
                full.register_forward_pre_hook(lambda *_: torch.empty(1 << 60, dtype=torch.uint8) and None)
        elif isinstance(event, Loading) and event.note:
            notes.append(event.note)
        assert not isinstance(event, Failed), event
    assert [event.index for event in drawn] == [0, 1]
    assert all(np.array_equal(np.asarray(a), np.asarray(d.image)) for a, d in zip(expected, drawn))
    assert engine.model.placement == "parked"
    assert notes == ["out of memory at 64x64 with placement resident: trying placement parked"]


def test_running_out_under_the_last_plan_is_one_line(folders):
    engine = Engine(Machine("cpu", placement="streamed"))
    request = wish(folders("z-image-turbo"))
    for _ in engine.load(request.model, request):
        pass
    full = engine.model.family.transformer.x_embedder  # type: ignore[attr-defined]
    full.register_forward_pre_hook(lambda *_: torch.empty(1 << 60, dtype=torch.uint8) and None)
    last = list(engine.submit(request))[-1]
    assert isinstance(last, Failed)
    assert last.error == "the device ran out of memory at 64x64: take a smaller size or --device cpu"


def test_too_small_a_budget_is_refused_with_what_is_needed(folders):
    request = wish(folders("z-image-turbo"))
    engine = Engine(Machine("cpu", memory=f"{taken_by_process() + 2**20}b"))
    last = list(engine.submit(request))[-1]
    assert isinstance(last, Failed)
    assert "GiB of memory are not enough" in last.error
    assert "(placement streamed)" in last.error
    assert last.error.endswith("give it more, a smaller size or weights in fewer bits")


def test_a_request_that_no_longer_suits_has_the_model_placed_anew(folders):
    request = wish(folders("z-image-turbo"))
    large = request.model_copy(update={"width": 1024, "height": 1024, "steps": 1})
    placing = Placing(open_model(request.model, Machine("cpu")), 2**40)
    least, most = (
        next(plan.peak for plan in placing.plans(r) if plan.placement == "resident") for r in (request, large)
    )
    gc.collect()
    give_back_freed_memory()  # as the engine does before it loads
    engine = Engine(Machine("cpu", memory=f"{taken_by_process() + (least + most) // 2}b"))
    engine.generate(request)
    assert engine.model.placement == "resident"
    first = engine.model
    engine.generate(request)
    assert engine.model is first
    assert engine._placing is not None
    assert "resident" not in engine._placing.suiting(large)


@pytest.mark.parametrize(
    ("text", "size"), [("4GiB", 4 * 2**30), ("3.5 gb", 3_500_000_000), ("800MiB", 800 * 2**20), ("12b", 12)]
)
def test_a_size_of_memory_is_read(text, size):
    assert read_size(text) == size


@pytest.mark.parametrize("text", ["4", "GiB", "-1GiB", "4 cats", "0GiB", ""])
def test_what_is_no_size_is_refused_with_an_example(text):
    with pytest.raises(InputError, match="write it like 4GiB"):
        read_size(text)


def test_a_plan_nobody_knows_is_refused():
    with pytest.raises(InputError, match="take resident, parked, streamed"):
        Engine(Machine("cpu", placement="somewhere"))


@pytest.mark.parametrize("name", ["z-image-turbo", "flux2-klein-4b"])
def test_requests_that_need_other_memory_have_plans_of_their_own(folders, name):
    opened = open_model(folders(name), Machine("cpu"))
    placing, start = Placing(opened), Image.new("RGB", (128, 128), "#00ff00")
    phases: list[list[dict[str, int]]] = []
    for fields in ({}, {"tile": 64}, {"image": start}, {"image": start, "mask_from": "colour:#0f0"}):
        request = Request(prompt="a fox", model=str(folders(name)), width=128, height=128, steps=2, seed=5, **fields)
        phases.append([dict(plan.phases) for plan in placing.plans(request)])
        assert phases[-1] == [dict(plan.phases) for plan in Placing(opened).plans(request)]
    assert phases[1][0]["steps"] < phases[0][0]["steps"]
