"""Merged adapters: the same pictures as at run time, the share that rounding keeps, and the memory that they take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from inkstream import Engine
from inkstream.engine.files.convert import convert
from inkstream.engine.machine.loader import open_model, read_model
from inkstream.engine.machine.memory import Placing
from inkstream.families import adapter_names
from inkstream.families.flux1.specs import DEV
from inkstream.families.flux2.specs import KLEIN_4B
from inkstream.families.zimage.specs import TURBO
from inkstream.nn.offload import is_mapped, mapped_ranges
from inkstream.nn.prepacked import weight_of
from inkstream.quant.pack import pack
from inkstream.quant.packed import Packed, unpack
from inkstream.types import InputError, Loading, Machine, Request, Spec
from inkstream.weights.lora.changes import LayerChange, Lora, LowRank, Part
from inkstream.weights.lora.factors import Dora
from inkstream.weights.lora.merge import Merge, Merged, refit
from inkstream.weights.lora.write import write_lora

SPECS = [TURBO.tiny, DEV.tiny, KLEIN_4B.tiny]


def make_lora(spec: Spec, size: float = 0.3, dora: bool = False, only: str = "") -> Lora:
    by = torch.Generator().manual_seed(0)
    layers = {}
    for path, (outputs, inputs) in adapter_names(spec).layers.items():
        if ("layers" in path or "blocks" in path) and only in path:
            up = torch.randn(outputs, 4, generator=by) * size / 2
            low = LowRank(torch.randn(4, inputs, generator=by) / inputs**0.5, up, 0.5)
            change = Dora(low, 1 + torch.rand(outputs, 1, generator=by)) if dora else low
            layers[path] = LayerChange([Part(change)])
    return Lora(layers)


@pytest.fixture(params=SPECS, ids=lambda spec: spec.family)
def spec(request) -> Spec:
    return request.param


@pytest.fixture
def folder(spec, make_folder, tmp_path) -> Path:
    return make_folder(tmp_path / spec.family, spec)


@pytest.fixture
def save(tmp_path) -> Callable[[Spec, Lora], Path]:
    def save(spec: Spec, lora: Lora) -> Path:
        return write_lora(tmp_path / "style.safetensors", lora, adapter_names(spec), "comfyui")

    return save


def latents(machine: Machine, model: Path, loras: tuple[str, ...] = ()) -> tuple[np.ndarray, list[str]]:
    """A picture, and the notes that were shown while it was drawn."""
    request = Request(prompt="a fox", model=str(model), width=64, height=48, steps=2, seed=0, loras=loras)
    notes, picture = [], None
    for event in Engine(machine).submit(request):
        notes += [event.note] if isinstance(event, Loading) and event.note else []
        if hasattr(event, "error"):
            raise InputError(event.error)
        picture = getattr(event, "image", picture)
    assert picture is not None
    return np.asarray(picture).astype(float), notes


def weights(machine: Machine, model: Path) -> dict[str, torch.Tensor]:
    transformer = read_model(open_model(model, machine), "resident").family.transformer
    modules = {name: layer for name, layer in transformer.named_modules() if hasattr(layer, "in_features")}
    own = {f"{name}.weight": weight_of(layer) for name, layer in modules.items()}
    return {**transformer.state_dict(), **own}


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_merged_weights_are_the_sum_in_float32_and_all_of_the_change_is_kept(spec, folder, save, dora):
    path = save(spec, lora := make_lora(spec, dora=dora))
    notes: list[str] = []
    tell = lambda event: notes.append(event.note)  # noqa: E731
    machine = Machine("cpu", "fp32", merge_lora=(f"{path}:0.5",))
    read_model(open_model(folder, machine), "resident", tell)
    plain, ours = weights(Machine("cpu", "fp32"), folder), weights(machine, folder)
    for name, weight in plain.items():
        change = lora.layers.get(name.removesuffix(".weight"))
        wanted = weight if change is None else weight + 0.5 * change.parts[0].change.delta(weight)
        assert (ours[name] - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    assert "merged style: 100.0% of the change is kept (fp32)" in notes


@pytest.mark.slow
def test_a_merged_picture_is_that_of_the_adapter_at_run_time(spec, folder, save):
    path = save(spec, make_lora(spec))
    plain, _ = latents(Machine("cpu", "fp32"), folder)
    merged, notes = latents(Machine("cpu", "fp32", merge_lora=(f"{path}:0.5",)), folder)
    there, _ = latents(Machine("cpu", "fp32"), folder, (f"{path}:0.5",))
    assert np.abs(merged - there).max() <= 1  # of 255: a number between two steps of 8 bits may go either way
    assert np.abs(merged - there).mean() < 1e-2
    assert np.abs(merged - plain).mean() > 0.5
    assert any(note.startswith("merged style: 100.0%") for note in notes)


@pytest.mark.slow
def test_the_velocity_of_a_merged_model_is_that_of_the_adapter_to_a_hundred_thousandth(spec, folder, save):
    """In float32, before pictures are rounded to 8 bits."""
    from inkstream.engine.drawing.complete import complete
    from inkstream.engine.drawing.model import advance

    path = save(spec, make_lora(spec))
    results = []
    for machine, loras in (
        (Machine("cpu", "fp32", merge_lora=(str(path),)), ()),
        (Machine("cpu", "fp32"), (str(path),)),
    ):
        model = read_model(open_model(folder, machine), "resident")
        asked = Request(prompt="a fox", width=64, height=48, steps=2, seed=0, loras=loras)
        wish = complete(asked, model.spec)
        with torch.inference_mode():
            run = model.start(wish, model.encode(wish), None)  # type: ignore[arg-type]
            while run.query is not None:
                advance(model.family, [run])
        results.append(run.result)
    ours, theirs = results
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def exact_share(before: torch.Tensor, delta: torch.Tensor, dtype: torch.dtype) -> tuple[float, float]:
    after = (before.double() + delta.double()).to(dtype).double() - before.double()
    return float((after * delta.double()).sum()), float(delta.double().square().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kept_share_is_that_of_its_formula(dtype):
    spec = TURBO.tiny
    lora = make_lora(spec, 0.0005)
    merge = Merge([Merged("style", lora, dict.fromkeys(lora.layers, 1.0))])
    kept = wanted = 0.0
    for i, (path, change) in enumerate(lora.layers.items()):
        before = torch.randn(change.parts[0].change.shape, generator=torch.Generator().manual_seed(i)).to(dtype)
        merge.change(f"{path}.weight", before, before)
        own = exact_share(before.float(), change.parts[0].change.delta(None), dtype)
        kept, wanted = kept + own[0], wanted + own[1]
    assert merge.share == pytest.approx(kept / wanted, rel=1e-6 if dtype == torch.bfloat16 else 1e-3)
    if dtype == torch.float32:
        assert merge.share == pytest.approx(1, abs=1e-3)
        assert "fp32" in merge.line()
    else:
        assert merge.share < 0.9
        assert merge.line().endswith("keeps all of it")


def test_bf16_loses_a_small_change_wholly():
    lora = Lora({"a": LayerChange([Part(LowRank(torch.full((1, 8), 1e-5), torch.ones(8, 1)))])})
    merge = Merge([Merged("small", lora, {"a": 1.0})])
    before = torch.ones(8, 8, dtype=torch.bfloat16)
    assert torch.equal(merge.change("a.weight", before, before), before)
    assert merge.share == 0


def test_several_adapters_norms_biases_and_replaced_vectors_are_all_relative_to_the_model():
    low = LowRank(torch.ones(1, 4), torch.ones(4, 1), 0.5)
    one = Lora({"a": LayerChange([Part(low, slice(0, 4))], torch.ones(8))}, {"norm.weight": torch.ones(3)})
    dora = Dora(low, torch.ones(4, 1))
    two = Lora({"a": LayerChange([Part(dora, slice(4, 8))])}, replaced={"norm.weight": torch.zeros(3)})
    merge = Merge([
        Merged("one", one, {"a": 2.0, "norm.weight": 0.5}), Merged("two", two, {"a": 1.0, "norm.weight": 0.25})
    ])  # fmt: skip
    weight = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    assert merge.names == {"a.weight", "a.bias", "norm.weight"}
    ours = merge.change("a.weight", weight, weight)
    assert torch.allclose(ours[:4], weight[:4] + 1.0)
    assert torch.allclose(ours[4:], weight[4:] + dora.delta(weight[4:]))
    assert torch.equal(merge.change("a.bias", torch.zeros(8), torch.zeros(8)), torch.full((8,), 2.0))
    norm = torch.full((3,), 4.0)
    assert torch.equal(merge.change("norm.weight", norm, norm), torch.full((3,), 4 + 0.5 - 0.25 * 4))


@pytest.mark.parametrize("form", ["int8", "e4m3", "q8_0", "nf4", "q4_k"])
def test_a_packed_weight_is_packed_again_in_its_own_format(form):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    low = LowRank(torch.randn(4, 256, generator=torch.Generator().manual_seed(1)) / 16, torch.ones(64, 4) * 0.3)
    before = pack(form, weight, dynamic=form == "int8")
    merge = Merge([Merged("style", Lora({"a": LayerChange([Part(low)])}), {"a": 1.0})])
    after = merge.change("a.weight", before, before)
    assert isinstance(after, Packed)
    assert (after.format, after.dynamic) == (form, before.dynamic)
    wanted = unpack(before) + low.delta()
    step = (unpack(pack(form, wanted)) - wanted).norm()
    assert (unpack(after) - wanted).norm() <= step * 1.0001
    assert merge.share == pytest.approx(float((low.delta() * (unpack(after) - unpack(before))).sum()
                                              / low.delta().square().sum()), rel=1e-5)  # fmt: skip


def test_rotated_weights_are_rotated_again():
    from dataclasses import replace

    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    form = replace(pack("int8", weight), rotated=256)
    assert (unpack(refit("a", weight, form)) - weight).norm() < 0.02 * weight.norm()  # type: ignore[arg-type]


def test_a_format_that_is_only_read_is_refused_by_name_before_anything_is_read():
    form = Packed("nvfp4", torch.zeros(8, 16, dtype=torch.uint8), (8, 32), (torch.ones(8, 2), torch.ones(1, 1)))
    lora = Lora({"a": LayerChange([Part(LowRank(torch.ones(1, 32), torch.ones(8, 1)))])})
    with pytest.raises(InputError, match=r"a\.weight is packed as nvfp4, which is only read here: use --lora"):
        Merge([Merged("style", lora, {"a": 1.0})]).check({"a.weight": form.to("meta")})


@pytest.mark.parametrize("quant", ["int8", "fp8", "q8_0"])
def test_a_merged_and_packed_model_is_near_the_packed_one_with_the_adapter(quant, make_folder, save, tmp_path):
    spec = TURBO.tiny
    path = save(spec, make_lora(spec))
    folder = convert(make_folder(tmp_path / "whole", spec), tmp_path / quant, quant=quant)
    packed, merged = weights(Machine("cpu", "fp32"), folder), None
    merged = weights(Machine("cpu", "fp32", merge_lora=(str(path),)), folder)
    for name, change in make_lora(spec).layers.items():
        wanted = packed[f"{name}.weight"] + change.parts[0].change.delta(None)
        error = (merged[f"{name}.weight"] - wanted).norm() / wanted.norm()
        assert error < (0.04 if quant == "fp8" else 0.01)


def test_weights_that_no_adapter_changes_stay_views_of_the_file(make_folder, save, tmp_path):
    spec = TURBO.tiny
    folder = make_folder(tmp_path / "whole", spec)
    path = save(spec, make_lora(spec, only="layers.0.feed_forward"))
    native = convert(folder, tmp_path / "native", "native")
    opened = open_model(native, Machine("cpu", "fp32", merge_lora=(str(path),)))
    transformer = read_model(opened, "resident").family.transformer
    ranges = mapped_ranges()
    copied = {name for name, weight in transformer.named_parameters() if not is_mapped(weight, ranges)}
    assert copied == {name for name in opened.merged if name in dict(transformer.named_parameters())}
    assert len(copied) >= 3


def test_a_merged_file_is_read_once_and_its_memory_is_freed(tiny_folder, save):
    path = save(TURBO.tiny, make_lora(TURBO.tiny))
    opened = open_model(tiny_folder, Machine("cpu", "fp32", merge_lora=(str(path),)))
    names = opened.merged
    path.unlink()
    read_model(opened, "resident")
    assert opened.merge is not None
    assert opened.merge.adapters == ()
    assert opened.merged == names != frozenset()


@pytest.mark.parametrize("quant", [None, "int8"])
def test_changed_weights_count_as_copied(quant, make_folder, save, tmp_path):
    spec = TURBO.tiny
    path = save(spec, make_lora(spec))
    folder = make_folder(tmp_path / "whole", spec)
    folder = convert(folder, tmp_path / "native", "native", quant=quant)
    wish = Request(prompt="a fox", model=str(folder), width=64, height=48, steps=2)
    plain, merged = (
        {plan.placement: plan.peak for plan in Placing(open_model(folder, machine)).plans(wish)}
        for machine in (Machine("cpu", "fp32"), Machine("cpu", "fp32", merge_lora=(str(path),)))
    )
    state = open_model(folder, Machine("cpu", "fp32")).source.parts["transformer"].tensors
    changed = sum(state[f"{name}.weight"].nbytes for name in make_lora(spec).layers)
    assert merged["streamed"] - plain["streamed"] == changed
    assert merged["resident"] == plain["resident"]  # they take memory in any case


def test_what_cannot_be_merged_is_told_before_weights_are_read(tiny_folder, save, tmp_path):
    flux = save(DEV.tiny, make_lora(DEV.tiny))
    for lora, said in (
        (f"{flux}", "none of its"),
        (f"{flux}@0-0.5", r"@0-0\.5: merged weights hold for all steps"),
        ("nothing", "neither a file nor a name"),
    ):
        with pytest.raises(InputError, match=said):
            open_model(tiny_folder, Machine("cpu", merge_lora=(lora,)))
