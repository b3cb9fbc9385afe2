"""Requests with adapters: each is drawn with its own, beside others, and nothing of them stays behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from inkstream import Engine
from inkstream.engine.drawing import adapters
from inkstream.engine.drawing.complete import complete
from inkstream.engine.drawing.model import Model, advance, time_at
from inkstream.engine.files.loras import find_lora
from inkstream.families import adapter_names
from inkstream.families.flux1.specs import DEV
from inkstream.families.flux2.specs import KLEIN_BASE_4B
from inkstream.families.zimage.specs import BASE
from inkstream.nn.parallel import Kept
from inkstream.nn.prepacked import weight_of
from inkstream.sampling.schedules import SCHEDULES
from inkstream.types import Done, Failed, InputError, Loading, LoraUse, Machine, Request, Spec
from inkstream.weights.files import read_header
from inkstream.weights.lora.changes import Change, LayerChange, Lora, LowRank, Part
from inkstream.weights.lora.factors import IA3, Dora, LoHa, LoKr
from inkstream.weights.lora.write import write_lora

SPECS = [BASE, DEV, KLEIN_BASE_4B]
Make = Callable[[int, int, torch.Generator], Change]
"""Makes the change of a layer of some outputs and inputs."""


def low_rank(rank: int, size: float = 0.3) -> Make:
    def make(outputs: int, inputs: int, by: torch.Generator) -> LowRank:
        down = torch.randn(rank, inputs, generator=by) / inputs**0.5
        return LowRank(down, torch.randn(outputs, rank, generator=by) * size / rank**0.5)

    return make


def dora(outputs: int, inputs: int, by: torch.Generator) -> Change:
    return Dora(low_rank(2)(outputs, inputs, by), 1 + torch.rand(outputs, 1, generator=by))


def loha(outputs: int, inputs: int, by: torch.Generator) -> Change:
    factors = [torch.randn(*shape, generator=by) / 4 for shape in ((outputs, 2), (2, inputs)) * 2]
    return LoHa(*factors)


def dora_by_columns(outputs: int, inputs: int, by: torch.Generator) -> Change:
    return Dora(low_rank(2)(outputs, inputs, by), 1 + torch.rand(1, inputs, generator=by))


def ia3(outputs: int, inputs: int, by: torch.Generator) -> Change:
    return IA3(torch.randn(1, inputs, generator=by) / 4, (outputs, inputs))


def lokr(outputs: int, inputs: int, by: torch.Generator) -> Change:
    return LoKr(torch.randn(2, 2, generator=by), torch.randn(outputs // 2, inputs // 2, generator=by) / inputs)


def make_lora(spec: Spec, make: Make, seed: int = 0) -> Lora:
    """An adapter of all layers in blocks of a tiny model."""
    by = torch.Generator().manual_seed(seed)
    layers = {path: size for path, size in adapter_names(spec).layers.items() if "layers" in path or "blocks" in path}
    assert len(layers) > 6
    return Lora({path: LayerChange([Part(make(*size, by))]) for path, size in layers.items()})


@pytest.fixture(params=SPECS, ids=lambda spec: spec.family)
def spec(request) -> Spec:
    return request.param.tiny


@pytest.fixture
def model(spec, build) -> Model:
    with torch.no_grad():
        return build(spec)


@pytest.fixture
def save(spec, tmp_path) -> Callable[..., Path]:
    """`save(name, make, seed)` writes an adapter's file."""

    def save(name: str, make: Make, seed: int = 0) -> Path:
        path = tmp_path / f"{name}.safetensors"
        return write_lora(path, make_lora(spec, make, seed), adapter_names(spec), "comfyui")

    return save


def wish(model: Model, loras: Sequence[object] = (), **fields: object) -> Request:
    guidance = {"guidance": 3.0} if model.spec.guides == "twice" else {}
    small = {"prompt": "a fox", "width": 64, "height": 48, "steps": 4, "seed": 0, **guidance, **fields}
    return complete(Request(loras=[str(lora) for lora in loras], **small), model.spec)


@torch.inference_mode()
def draw(model: Model, *wishes: Request) -> list[Tensor]:
    """The latents of requests that are drawn in the same forwards."""
    runs = [model.start(request, model.encode(request), None) for request in wishes]  # type: ignore[arg-type]
    while pending := [run for run in runs if run.query is not None]:
        advance(model.family, pending)
    return [run.result for run in runs]


def decibels(a: Tensor, b: Tensor) -> float:
    """How near b is to a, against a's own range."""
    error = float((a - b).square().mean())
    return float("inf") if error == 0 else float(10 * torch.log10((a.max() - a.min()) ** 2 / error))


def merged(model: Model, lora: Lora, strength: float) -> None:
    """Adds an adapter to the weights."""
    for path, change in lora.layers.items():
        layer = model.family.transformer.get_submodule(path)
        with torch.no_grad():
            for part in change.parts:
                layer.weight[part.rows] += strength * part.change.delta(layer.weight[part.rows].clone())  # type: ignore


@pytest.mark.parametrize("make", [low_rank(4), dora, lokr], ids=["lora", "dora", "lokr"])
def test_a_picture_with_an_adapter_is_that_of_the_merged_weights(spec, build, save, make):
    with torch.no_grad():
        model, other = build(spec), build(spec)
    path = save("one", make)
    (plain,) = draw(model, wish(model))
    (ours,) = draw(model, wish(model, [f"{path}:0.5"]))
    merged(other, make_lora(spec, make), 0.5)
    (theirs,) = draw(other, wish(other))
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert decibels(plain, ours) < 50
    assert torch.equal(draw(model, wish(model))[0], plain)  # nothing of the adapter stayed


def test_four_requests_with_four_adapters_share_forwards_and_equal_their_single_runs(model, save):
    rank4, rank8, other = save("a", low_rank(4)), save("b", low_rank(8), 1), save("c", low_rank(8, 0.2), 2)
    wishes = [
        wish(model, [f"{rank4}:0.8"]),
        wish(model, [f"{rank8}:0.5"], seed=1, width=96),
        wish(model, [rank4, f"{other}:0.4"], seed=2),
        wish(model, seed=3),
    ]
    forwards: list[int] = []
    hook = model.family.transformer.register_forward_hook(lambda *_: forwards.append(1))
    together = draw(model, *wishes)
    hook.remove()
    assert len(forwards) == 4
    for request, ours in zip(wishes, together):
        assert decibels(*draw(model, request), ours) >= 80
        without = request.model_copy(update={"loras": ()})
        assert (decibels(*draw(model, without), ours) < 40) == bool(request.loras)


def test_an_adapter_works_in_a_part_of_the_steps_only(model, save):
    path = save("one", low_rank(4))
    uses = [[], [path], [f"{path}@0-0.5"], [f"{path}@0.5-1"]]
    plain, whole, first, second = draw(model, *(wish(model, use, seed=5) for use in uses))
    seen: list[list[bool]] = []
    (run,) = [model.start(wish(model, [f"{path}@0-0.5"], seed=5), model.encode(wish(model)), None)]  # type: ignore
    while run.query is not None:
        seen.append([bool(sample.around.adapters) for sample in run.samples()])
        advance(model.family, [run])
    assert [any(one) for one in seen] == [True, True, False, False]
    assert all(len(set(one)) == 1 for one in seen)
    assert torch.equal(run.result, first) or decibels(first, run.result) >= 80
    pictures = [plain, whole, first, second]
    assert all(decibels(a, b) < 50 for i, a in enumerate(pictures) for b in pictures[:i])


def test_a_step_cache_begins_anew_when_adapters_change(build, spec, tmp_path):
    with torch.no_grad():
        model = build(replace(spec, steps=20))
    path = write_lora(tmp_path / "a.safetensors", make_lora(spec, low_rank(4)), adapter_names(spec), "comfyui")
    cached = wish(model, [f"{path}@0.5-1"], steps=8, cache="first-block", cache_threshold=10)
    run = model.start(cached, model.encode(cached), None)  # type: ignore[arg-type]
    skipped: list[bool | None] = []
    while run.query is not None:
        cache = run.leg.around.cache
        advance(model.family, [run])
        skipped.append(cache.skips)  # type: ignore[union-attr]
    assert skipped == [False, True, True, True, False, True, True, True]


def test_blocks_have_strengths_of_their_own(model, spec, save):
    path = save("one", low_rank(4))
    stack = "layers" if spec.family == "zimage" else "single_blocks"
    held = model.adapters
    uses = [LoraUse.read(f"{path}#{blocks}") for blocks in (f"{stack}.0-0=0.5", f"{stack}=0")]
    half, none = (held.get(use) for use in uses)
    whole = held.get(LoraUse.read(path))
    strengths = {path: half.products[layer].strength for path, layer in held.layers.items() if layer in half.products}  # type: ignore
    assert {path: 0.5 for path in strengths if path.startswith(f"{stack}.0.")}.items() <= strengths.items()
    assert all(value == 1 for path, value in strengths.items() if not path.startswith(f"{stack}.0."))
    assert len(none.products) == len(whole.products) - sum(path.startswith(f"{stack}.") for path in strengths)
    with pytest.raises(InputError, match=r"changes no layer in layers\.99"):
        held.get(LoraUse.read(f"{path}#layers.99=1"))


@pytest.mark.parametrize(
    ("make", "dialect"),
    [(low_rank(4), "comfyui"), (loha, "lycoris"), (lokr, "lycoris"), (dora_by_columns, "kohya"), (ia3, "lycoris")],
    ids=["lora", "loha", "lokr", "dora of columns", "ia3 of inputs"],
)
def test_the_foreseen_memory_of_an_adapter_is_at_least_what_it_takes(model, spec, tmp_path, make, dialect):
    layers = {path: change for path, change in make_lora(spec, make).layers.items() if "qkv" not in path}
    path = write_lora(tmp_path / "mine.safetensors", Lora(layers), adapter_names(spec), dialect)
    model.adapters.get(LoraUse(str(path)))
    foreseen = adapters.bytes_foreseen([str(path)], path.parent, torch.float32, spec)
    assert model.adapters.bytes <= foreseen <= 1.5 * model.adapters.bytes


def test_the_same_use_is_the_same_adapter_and_the_least_recent_files_are_dropped(model, save, monkeypatch):
    paths = [save(name, low_rank(4), seed) for seed, name in enumerate("abc")]
    held = model.adapters
    uses = [LoraUse.read(str(path)) for path in paths]
    assert held.get(uses[0]) is held.get(uses[0])
    one = held.bytes
    monkeypatch.setattr(held, "keep", int(1.5 * one))
    with held.use([uses[0]]):
        with held.use(uses[1:]) as lines:
            assert held.bytes == 3 * one
            assert held.taken([]) == 3 * one
            assert held.taken([str(paths[1]), f"{paths[2]}:0.5"]) == one
            assert len(lines) == 2
        assert held.bytes == held.taken([]) == one  # the one in use stays, though it is the oldest
        kept = held.get(uses[0])
    assert held.get(uses[0]) is kept


@pytest.mark.parametrize("form", ["int8", "e4m3", "q8_0", "nf4", "q4_k"])
def test_an_adapter_changes_packed_weights_as_it_changes_full_ones(build, form, tmp_path):
    from inkstream.nn.quant import place
    from inkstream.quant.pack import fits, pack
    from inkstream.quant.packed import unpack

    spec = BASE.tiny
    if form == "q4_k":  # its blocks have 256 numbers
        spec = replace(spec, transformer=replace(spec.transformer, dim=256, n_heads=8))
    with torch.no_grad():
        packed, full = build(spec), build(spec)
    transformer = packed.family.transformer
    state = transformer.state_dict()
    fit = [key for key, weight in state.items() if "layers" in key and fits(form, tuple(weight.shape))]
    assert len(fit) > 4
    held = {**state, **{key: pack(form, state[key]) for key in fit}}
    transformer.load_state_dict(place(transformer, held, torch.float32), assign=True)
    rounded = {key: unpack(weight, torch.float32) if key in fit else weight for key, weight in held.items()}
    full.family.transformer.load_state_dict(rounded)
    path = write_lora(tmp_path / "a.safetensors", make_lora(spec, dora), adapter_names(spec), "comfyui")
    (ours,), (theirs,) = (draw(model, wish(model, [path])) for model in (packed, full))
    assert decibels(theirs, ours) > 80


def test_a_prepacked_layer_gives_its_weight_back_exactly():
    from inkstream.nn.prepacked import PrepackedLinear

    layer = torch.nn.Linear(1100, 1000).requires_grad_(False)
    weight = layer.weight.clone()
    prepacked = PrepackedLinear(layer)
    prepacked(torch.randn(3, 1100))
    assert torch.equal(weight_of(prepacked), weight)


def events(request: Request, **machine: object) -> list[object]:
    return list(Engine(Machine("cpu", **machine)).submit(request))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def for_pocket(tmp_path_factory) -> Path:
    from inkstream.families import SPECS as KNOWN

    folder = tmp_path_factory.mktemp("loras")
    lora = make_lora(KNOWN["pocket"], low_rank(2, 0.05))
    return write_lora(folder / "style.safetensors", lora, adapter_names(KNOWN["pocket"]), "kohya")


def test_the_engine_tells_what_an_adapter_is_and_keeps_its_use_with_the_picture(for_pocket):
    request = Request(prompt="a red circle", steps=2, seed=1, loras=["style:0.5"])
    happened = events(request, lora_folder=str(for_pocket.parent))
    notes = [event.note for event in happened if isinstance(event, Loading) and event.note.startswith("lora")]
    assert notes == [f"lora style: LoRA of rank 2 at strength 0.5, {notes[0].split(', ')[1]}"]
    done = next(event for event in happened if isinstance(event, Done))
    assert done.request.loras == ("style:0.5",)
    plain = next(event for event in events(request.model_copy(update={"loras": ()})) if isinstance(event, Done))
    assert not np.array_equal(np.asarray(done.image), np.asarray(plain.image))


def test_an_adapter_that_is_not_there_or_is_for_another_family_is_told(for_pocket, tmp_path):
    (failed,) = [e for e in events(Request(prompt="a", loras=["stile"]), lora_folder=str(for_pocket.parent))
                 if isinstance(e, Failed)]  # fmt: skip
    assert failed.kind == "input"
    assert "did you mean style?" in failed.error
    spec = DEV.tiny
    other = write_lora(tmp_path / "flux.safetensors", make_lora(spec, low_rank(2)), adapter_names(spec), "comfyui")
    (failed,) = [e for e in events(Request(prompt="a", loras=[str(other)])) if isinstance(e, Failed)]
    assert failed.kind == "input"
    assert "flux.safetensors" in failed.error


def test_names_come_before_paths(tmp_path, monkeypatch):
    folder = tmp_path / "loras"
    (folder / "people").mkdir(parents=True)
    (folder / "people" / "ann.safetensors").touch()
    (tmp_path / "people").mkdir()
    (tmp_path / "people" / "ann").touch()
    monkeypatch.chdir(tmp_path)
    assert find_lora("people/ann", folder) == folder / "people" / "ann.safetensors"
    assert find_lora("people", folder) == Path("people")
    for wrong in (":abc", "@0.5", ":0,8"):
        with pytest.raises(InputError, match=f"lora ann.safetensors: {wrong} is no strength, steps or blocks: write"):
            find_lora(f"ann.safetensors{wrong}", folder)


@pytest.mark.parametrize(
    ("text", "use"),
    [
        ("a.safetensors", LoraUse("a.safetensors")),
        (r"C:\x\a.safetensors:-.5", LoraUse(r"C:\x\a.safetensors", -0.5)),
        ("a:0.5@0.25-1#layers.0-14=0,out=2", LoraUse("a", 0.5, 0.25, 1, (("layers.0-14", 0), ("out", 2)))),
        ({"path": "a", "strength": 0.3, "until": 0.5}, LoraUse("a", 0.3, 0, 0.5)),
        ("my#1@home.safetensors", LoraUse("my#1@home.safetensors")),
        ("a:1e-7", LoraUse("a", 1e-7)),
        ({"path": "a", "strength": 0.123456789012345}, LoraUse("a", 0.123456789012345)),
        ({"path": "a:0.5"}, LoraUse("a:0.5")),  # the file's name ends like a strength, or like steps, or like blocks
        ({"path": "a@0-1", "strength": 0.2}, LoraUse("a@0-1", 0.2)),
        ({"path": "a#b=1"}, LoraUse("a#b=1")),
    ],
)  # fmt: skip
def test_a_use_is_read_from_text_and_from_an_object(text, use):
    assert LoraUse.read(text) == use == LoraUse.read(str(use))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [("", "is empty"), ("a:11", "strength 11"), ("a@0.5-0.5", "0.5-0.5"), ({"strength": 1}, "no path"),
     ({"path": "a", "weight": 1}, "no field weight"), (5, "not text or an object"),
     ({"path": "a", "strength": "x"}, "strength 'x' in a lora is not a number"),
     ({"path": "a", "blocks": {"layers": None}}, "layers None"), ({"path": "a", "blocks": [1]}, r"blocks \[1\]")],
)  # fmt: skip
def test_a_wrong_use_is_refused_by_its_value(wrong, told):
    with pytest.raises(ValueError, match=told):
        Request(prompt="a", loras=[wrong])


def test_a_share_of_the_steps_is_a_time_of_the_schedule():
    schedule = SCHEDULES["simple"](8, 3.0, 1000)
    assert [time_at(schedule, share) for share in (0, 0.5, 1)] == [1.0, schedule[4], 0.0]


def test_strengths_that_are_too_much_for_a_few_steps_are_told(build, tmp_path):
    spec = replace(BASE.tiny, name="quick", steps=8)
    with torch.no_grad():
        model = build(spec)
    lora = make_lora(spec, low_rank(2))
    paths = [write_lora(tmp_path / f"{name}.safetensors", lora, adapter_names(spec), "comfyui") for name in "ab"]
    for strength, told in ((0.6, 0), (0.7, 1)):
        with model.adapters.use([LoraUse(str(path), strength) for path in paths]) as lines:
            assert len([line for line in lines if "together" in line]) == told


def test_changes_of_the_same_rows_are_all_relative_to_the_layers_own_output():
    by = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(6, 8).requires_grad_(False)
    first, second = dora(8, 6, by), dora(4, 6, by)
    change = LayerChange([Part(first), Part(second, slice(2, 6))], torch.randn(8, generator=by))
    x = torch.randn(5, 6, generator=by)
    weight = layer.weight + 0.5 * first.delta(layer.weight)
    weight[2:6] += 0.5 * second.delta(layer.weight[2:6])
    product = replace(adapters.bind(layer, change, torch.device("cpu"), torch.float32), strength=0.5)
    out = layer(x)
    product(x, out, out)
    theirs = torch.nn.functional.linear(x, weight, layer.bias + 0.5 * change.bias)
    assert (out - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("side", ["in", "out"])
def test_a_process_gets_the_change_of_what_it_keeps_of_a_layer(side):
    by = torch.Generator().manual_seed(0)
    made = [low_rank(2)(8, 6, by), lokr(4, 6, by)]
    change = LayerChange([Part(made[0]), Part(made[1], slice(4, 8))], torch.randn(8, generator=by))
    whole = made[0].delta(None).clone()
    whole[4:] += made[1].delta(None)
    runs = ((1, 3), (4, 6))
    own = adapters.share_of(change, Kept(side, runs), "x", (8, 6), first=side == "out")
    rows = [1, 2, 4, 5]
    dense = torch.zeros(4, 6) if side == "out" else torch.zeros(8, 4)
    for part in own.parts:
        dense[part.rows] += part.change.delta(None)
    assert (dense - (whole[rows] if side == "out" else whole[:, rows])).abs().max() < 1e-6
    assert torch.equal(own.bias, change.bias[rows]) if side == "out" else own.bias is None
    if side == "in":
        with pytest.raises(InputError, match=r"DoRA.*--parallel context"):
            adapters.share_of(LayerChange([Part(dora(8, 6, by))]), Kept(side, runs), "x", (8, 6), first=True)


def test_a_placement_is_chosen_with_the_memory_of_the_adapters(for_pocket):
    machine = Machine("cpu", lora_folder=str(for_pocket.parent))
    request = Request(prompt="a red circle", seed=1)
    with_adapter = request.model_copy(update={"loras": ("style:0.5",)})
    placing = Engine(machine).placing(request)
    needs = placing.adapters(with_adapter)
    tensors = read_header(for_pocket).tensors.values()
    assert needs == 4 * sum(weight.numel() for weight in tensors) > 0  # type: ignore[union-attr]
    placing.budget = next(plan.peak for plan in placing.plans(request) if plan.placement == "resident")
    assert "resident" in placing.suiting(request)
    assert "resident" not in placing.suiting(with_adapter)
    placing.budget += needs
    assert "resident" in placing.suiting(with_adapter)
    assert "resident" not in placing.suiting(with_adapter, taken=1)  # another request's adapters
