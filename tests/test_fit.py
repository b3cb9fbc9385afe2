"""Advice about models and machines: known cards, precisions in the order of time, and the time of a picture."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from inkstream.cli import main
from inkstream.cli.doctor import recommend
from inkstream.engine import engine as engines
from inkstream.engine.drawing.complete import complete
from inkstream.engine.machine import fit
from inkstream.engine.machine.cards import CARDS, find_card
from inkstream.engine.machine.fit import Speed, fits, operations, seconds_of
from inkstream.families import SPECS
from inkstream.nn import quant
from inkstream.quant.pack import pack
from inkstream.types import InputError, Loading, Request

TURBO = SPECS["z-image-turbo"]
PACKED = {"q8_0", "q6_k", "q5_k", "q4_k", "nf4"}
CPU = Speed(products=1e11, packed={"w8a8": 3e11}, unpacked=dict.fromkeys(PACKED, 1e9), brought=5e9)
CARD = Speed(products=1e13, packed={}, unpacked=dict.fromkeys({*PACKED, "fp8"}, 8e10), brought=2e10)


@pytest.mark.parametrize(
    ("asked", "title"),
    [("RTX 3060", "RTX 3060 12GB"), ("3060", "RTX 3060 12GB"), ("NVIDIA GeForce RTX 3060 Ti", "RTX 3060 Ti 8GB"),
     ("rtx3060ti", "RTX 3060 Ti 8GB"), ("4060ti 16 GB", "RTX 4060 Ti 16GB"),
     ("GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti Super 16GB"),
     ("Tesla T4", "T4 16GB"), ("NVIDIA H200", "H200 141GB"), *((card.title, card.title) for card in CARDS)],
)  # fmt: skip
def test_cards_are_found_by_their_usual_names(asked, title):
    card = find_card(asked)
    assert not isinstance(card, int)
    assert card.title == title


@pytest.mark.parametrize(
    ("asked", "line"),
    [("RTX 4060 Ti", "name one of 'RTX 4060 Ti 8GB', 'RTX 4060 Ti 16GB'"), ("RTX 3060 8GB", "'RTX 3060 12GB'"),
     ("RTX 4090 Super", "RTX 4080 Super"), ("Voodoo", "give its memory, such as 8GiB"),
     ("800", "is not a memory size")],
)  # fmt: skip
def test_other_names_of_cards_are_refused_with_what_is_near(asked, line):
    with pytest.raises(InputError, match=line):
        find_card(asked)


def test_the_doctor_answers_for_a_card(capsys):
    assert main(["doctor", "--for", "RTX 3060"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("RTX 3060 12GB: ")
    assert "z-image-turbo: fp8 parked (7.34 GiB, about 36 s a picture)" in " ".join(shown.split())


def test_precisions_are_in_the_order_of_their_time_on_a_cpu(monkeypatch):
    monkeypatch.setattr(fit, "has_int8", lambda device: True)
    found = fits(TURBO, "cpu", None, CPU)
    assert found[0].precision == "w8a8"
    slow = replace(CPU, packed={"w8a8": 2e9})  # as measured where int8 products are slow
    found = fits(TURBO, "cpu", None, slow)
    assert (found[0].precision, found[-1].precision) == ("bf16", "w8a8")
    times = [one.seconds for one in found[1:]]
    assert times == sorted(times)


def test_int8_products_are_not_offered_to_a_cpu_without_them(monkeypatch):
    monkeypatch.setattr(fit, "has_int8", lambda device: False)
    assert "w8a8" not in {one.precision for one in fits(TURBO, "cpu", None, CPU)}


def test_a_cpu_without_int8_products_unpacks_such_weights(monkeypatch):
    weight, x = pack("int8", torch.randn(48, 64), dynamic=True), torch.randn(5, 64)
    layer = quant.PackedLinear(weight, None, torch.float32)
    exact = x @ quant.unpack(weight, torch.float32).T
    with torch.inference_mode():
        monkeypatch.setattr(quant, "has_int8", lambda device: False)
        assert torch.equal(layer(x), exact)
        monkeypatch.setattr(quant, "has_int8", lambda device: True)
        assert not torch.equal(layer(x), exact)  # x is rounded to int8


def test_streamed_layers_are_for_when_nothing_else_is_as_fast():
    found = fits(TURBO, "cuda", int(10.8 * 2**30), CARD)
    assert (found[0].precision, found[0].placement) == ("fp8", "parked")
    assert min(one.seconds for one in found if one.placement == "streamed") <= found[0].seconds * 1.1


@pytest.mark.parametrize(("minutes", "name"), [(30, "z-image-turbo"), (90, "pocket")])
def test_a_model_that_takes_hours_is_not_recommended(minutes, name):
    def one(name: str, seconds: float) -> dict[str, object]:
        return {"name": name, "commercial": True, "fits": [{"seconds": seconds}]}

    assert recommend([one("pocket", 1.0), one("z-image-turbo", minutes * 60)]) == name
    assert recommend([one("z-image-turbo", minutes * 60)]) == "z-image-turbo"


@pytest.mark.parametrize("name", ["z-image-turbo", "flux1-dev", "pocket"])
def test_operations_follow_the_size(name):
    """Those of two sizes are in the table; more pixels take more than in proportion, because of attention."""
    spec = SPECS[name]
    width, height = spec.size
    facts = fit.foreseen()[name]
    for size, key in (((width, height), "flops"), ((width // 2, height // 2), "flops_half")):
        found = operations(spec, *size)
        assert {phase: found[phase] for phase in ("steps", "picture")} == {
            phase: pytest.approx(facts[key][phase], rel=0.1) for phase in ("steps", "picture")
        }
    large = operations(spec, 4 * width, 4 * height)
    assert large["picture"] > 16 * facts["flops"]["picture"]


def test_the_time_of_a_picture_counts_steps_and_prompts(monkeypatch):
    monkeypatch.setattr(fit, "measure_products", lambda device, dtype, precision=None: 3e12 if precision else 1e12)
    monkeypatch.setattr(fit, "has_int8", lambda device: True)
    spec = SPECS["z-image"]
    model = SimpleNamespace(spec=spec, device=torch.device("cpu"), dtype=torch.float32)

    def seconds(weights=(), **options):
        found = seconds_of(complete(Request(prompt="x", model="z-image", seed=1, **options), spec), model, weights)
        assert found is not None
        return found

    one, two = seconds(steps=10), seconds(steps=20)
    assert two == pytest.approx(2 * one, rel=0.1)
    assert seconds(steps=10, guidance=1.0) == pytest.approx(one / 2, rel=0.1)
    assert seconds(steps=10, solver="heun") == pytest.approx(one * 1.9, rel=0.1)
    fast = pack("int8", torch.ones(8, 8), dynamic=True)
    assert seconds([torch.ones(1), fast], steps=10) == pytest.approx(one / 3, rel=0.1)
    assert seconds([replace(fast, dynamic=False)], steps=10) == one
    large = seconds(steps=10, width=2048, height=2048)
    assert large > 4 * one
    tiled = seconds(steps=10, width=2048, height=2048, tile=1024)  # in nine windows, which overlap
    assert 8.5 * one < tiled < 9.5 * one
    enlarged = seconds(steps=10, upscale="2x", upscale_strength=0.3)
    assert enlarged == pytest.approx(one + 0.3 * tiled, rel=0.1)
    assert seconds(steps=10, upscale="2x", upscale_strength=0) < 1.1 * one


def test_control_nets_take_time_in_the_steps_in_which_they_are_on(monkeypatch, tmp_path):
    monkeypatch.setattr(fit, "measure_products", lambda device, dtype, precision=None: 1e12)
    spec, controls = SPECS["z-image"], SimpleNamespace(folder=tmp_path)
    model = SimpleNamespace(spec=spec, device=torch.device("cpu"), dtype=torch.float32, controls=controls)
    encoder = {"vision_model.encoder.layers.0.fc1.weight": torch.ones(64, 64)}
    state = {"control_layers.0.out.weight": torch.ones(8, 8), "control_layers.0.norm.weight": torch.ones(8), **encoder}
    save_file(state, tmp_path / "net.safetensors")
    weights = [torch.ones(8, 16), torch.ones(16)]

    def seconds(*nets: str) -> float:
        wish = Request(prompt="x", model="z-image", seed=1, control=["a.png"] * len(nets), control_nets=nets)
        found = seconds_of(complete(wish, spec), model, weights)  # type: ignore[arg-type]
        assert found is not None
        return found

    plain = seconds()
    assert seconds("net") == pytest.approx(1.5 * plain, rel=0.05)
    assert seconds("net:0.3@0-0.5") == pytest.approx(1.25 * plain, rel=0.05)
    assert seconds("net", "net") == pytest.approx(2 * plain, rel=0.05)


def test_a_long_picture_is_announced_before_it_starts_and_once(tiny_folder, monkeypatch):
    monkeypatch.setattr(engines, "seconds_of", lambda request, model, weights: 2100.0)
    engine = engines.Engine()
    request = Request(prompt="x", model=str(tiny_folder), width=64, height=64, steps=2)
    notes = [
        [event.note for event in engine.submit(request) if isinstance(event, Loading) and event.what == "time"]
        for _ in range(2)
    ]
    assert notes == [["a picture of 64x64 in 2 steps takes about 35 min here"], []]


def test_small_pictures_and_unknown_architectures_are_not_measured(monkeypatch):
    monkeypatch.setattr(fit, "measure_products", lambda *what: pytest.fail("measured"))
    pocket = SPECS["pocket"]
    unknown = replace(pocket, transformer=replace(pocket.transformer, n_layers=3))
    for spec in (pocket, unknown):
        model = SimpleNamespace(spec=spec, device=torch.device("cpu"), dtype=torch.float32)
        assert seconds_of(complete(Request(prompt="x", seed=1), spec), model, ()) is None
