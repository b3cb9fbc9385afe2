"""Tools for adapters' files: what is promised of norms, ranks and cosines holds, and nothing of a file is lost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from inkstream.cli import main
from inkstream.engine.files import lora_tools
from inkstream.engine.files.lora_tools import DTYPES, HISTORY, ModelWeights, open_file
from inkstream.engine.files.sources import locate
from inkstream.families import SPECS, adapter_names
from inkstream.families.flux1.specs import DEV
from inkstream.families.flux2.specs import KLEIN_4B
from inkstream.families.zimage.specs import TURBO
from inkstream.types import InputError
from inkstream.weights.files import read_header
from inkstream.weights.lora.arithmetic import approximate, decompose, dot
from inkstream.weights.lora.changes import Change, Full, LayerChange, Lora, LowRank, Part
from inkstream.weights.lora.factors import Dora, LoHa, LoKr
from inkstream.weights.lora.read import read_lora
from inkstream.weights.lora.write import DIALECTS, write_lora

TINY = [TURBO.tiny, DEV.tiny, KLEIN_4B.tiny]
NAMES = {spec.family: adapter_names(spec) for spec in TINY}
ZIMAGE = NAMES["zimage"]
Make = Callable[[int, int, torch.Generator], Change]


def low_rank(outputs: int, inputs: int, by: torch.Generator) -> Change:
    up = torch.randn(outputs, 4, generator=by) * torch.tensor([1.0, 0.5, 0.1, 0.01])
    return LowRank(torch.randn(4, inputs, generator=by) / inputs**0.5, up, 0.7)


def loha(outputs: int, inputs: int, by: torch.Generator) -> Change:
    return LoHa(*(torch.randn(*shape, generator=by) * 0.3 for shape in ((outputs, 2), (2, inputs)) * 2))


def lokr(outputs: int, inputs: int, by: torch.Generator) -> Change:
    return LoKr(torch.randn(2, 2, generator=by), torch.randn(outputs // 2, inputs // 2, generator=by))


def make(change: Make = low_rank, family: str = "zimage", seed: int = 0, **metadata: str) -> Lora:
    by = torch.Generator().manual_seed(seed)
    layers = {path: size for path, size in NAMES[family].layers.items() if "layers" in path or "blocks" in path}
    return Lora({path: LayerChange([Part(change(*size, by))]) for path, size in layers.items()}, metadata=metadata)


@pytest.fixture
def save(tmp_path) -> Callable[..., Path]:
    def save(name: str, lora: Lora, dialect: str = "comfyui", family: str = "zimage") -> Path:
        return write_lora(tmp_path / f"{name}.safetensors", lora, NAMES[family], dialect)

    return save


def opened(path: Path, family: str = "zimage") -> lora_tools.AdapterFile:
    return open_file(path, next(spec for spec in TINY if spec.family == family))


def deltas(lora: Lora) -> dict[str, Tensor]:
    found = {}
    for path, layer in lora.layers.items():
        found[path] = torch.zeros(ZIMAGE.layers[path])
        for part in layer.parts:
            found[path][part.rows] += part.change.delta(None)
    return found


# Matrices ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_singular_values_are_those_of_the_dense_matrix(shape):
    change = low_rank(*shape, torch.Generator().manual_seed(0))
    true = torch.linalg.svdvals(change.delta(None).double())[:4]
    for one in (change, Full(change.delta(None))):
        values, left, right = decompose(one)
        assert torch.allclose(values[:4].double(), true, rtol=1e-5)
        assert ((left * values) @ right - change.delta(None)).abs().max() < 1e-5
    assert len(decompose(change)[0]) == 4


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.99, 1.0])
def test_the_smallest_rank_that_keeps_a_share_is_taken(keep):
    change = Full(torch.randn(24, 40, generator=torch.Generator().manual_seed(1)))
    low, _ = approximate(change, None, keep)
    assert isinstance(low, LowRank)
    whole = change.change.norm()
    assert low.delta().norm() / whole >= keep - 1e-6
    fewer, _ = approximate(change, low.rank - 1, None)
    assert isinstance(fewer, LowRank)
    assert fewer.delta().norm() / whole < keep


def test_products_of_low_rank_changes_are_those_of_their_dense_matrices():
    by = torch.Generator().manual_seed(0)
    a, b = low_rank(24, 40, by), low_rank(24, 40, by)
    true = float((a.delta(None).double() * b.delta(None).double()).sum())
    assert dot(a, b) == pytest.approx(true, rel=1e-4)
    assert dot(a, Full(b.delta(None))) == pytest.approx(true, rel=1e-4)


# Resize --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [low_rank, loha], ids=["lora", "loha"])
@pytest.mark.parametrize("dialect", ["comfyui", "kohya", "diffusers", "peft"])
def test_a_resized_adapter_keeps_the_promised_share_of_every_layer(change, dialect, save, tmp_path):
    path = save("style", make(change))
    out = tmp_path / ("small" if dialect == "peft" else "small.safetensors")
    done = lora_tools.resize(opened(path), out, keep=0.9, dialect=dialect)
    before, after = deltas(opened(path).lora), deltas(opened(out).lora)
    for name, delta in before.items():
        assert (after[name] - delta).norm() <= (1 - 0.9**2) ** 0.5 * delta.norm() + 1e-5
    kept = sum(float(delta.square().sum()) for delta in after.values())
    total = sum(float(delta.square().sum()) for delta in before.values())
    assert done.share == pytest.approx((kept / total) ** 0.5, rel=1e-4)
    assert done.share >= 0.9


def test_a_rank_is_that_of_the_nearest_change(save, tmp_path):
    path = save("style", make())
    done = lora_tools.resize(opened(path), tmp_path / "small.safetensors", rank=2)
    assert set(done.ranks) == {2}
    before, after = deltas(opened(path).lora), deltas(opened(done.path).lora)
    for place in ZIMAGE.places(ZIMAGE.written["comfyui"]).values():  # which has queries, keys and values apart
        if place.layer in before:
            left, values, right = torch.linalg.svd(before[place.layer][place.rows])
            nearest = (left[:, :2] * values[:2]) @ right[:2]
            assert (after[place.layer][place.rows] - nearest).abs().max() < 1e-5


def test_what_depends_on_the_model_is_not_resized(save, tmp_path):
    dora = make(lambda o, i, by: Dora(low_rank(o, i, by), torch.ones(o, 1)))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"the DoRA of .* depends on the model's weights: merge it"):
        lora_tools.resize(opened(save("dora", dora)), tmp_path / "small.safetensors", rank=2)


# Compare -------------------------------------------------------------------------------------------------------------


def test_an_adapter_is_like_itself_and_opposite_to_its_negative(save):
    one = make()
    back = {path: LayerChange([Part(LowRank(part.change.down, -2 * part.change.up, 0.7))])  # type: ignore[attr-defined]
            for path, layer in one.layers.items() for part in layer.parts}  # fmt: skip
    a, b = opened(save("a", one)), opened(save("b", Lora(back)))
    assert lora_tools.compare(a, a)["cosine"] == pytest.approx(1)
    facts = lora_tools.compare(a, b)
    assert facts["cosine"] == pytest.approx(-1)
    assert facts["norms"][1] == pytest.approx(2 * facts["norms"][0])
    assert {round(block["cosine"], 6) for block in facts["blocks"].values()} == {-1}


def test_adapters_of_other_rows_and_of_other_layers_are_orthogonal(save):
    paths = [path for path in ZIMAGE.layers if "layers" in path]
    path, (outputs, inputs) = paths[0], ZIMAGE.layers[paths[0]]
    down, half = torch.ones(1, inputs), torch.zeros(outputs, 1)
    half[: outputs // 2] = 1
    a = opened(save("a", Lora({path: LayerChange([Part(LowRank(down, half))])})))
    b = opened(save("b", Lora({path: LayerChange([Part(LowRank(down, 1 - half))])})))
    c = opened(save("c", Lora({paths[-1]: make().layers[paths[-1]]})))
    assert lora_tools.compare(a, b)["cosine"] == 0
    assert lora_tools.compare(a, c)["cosine"] == 0


def test_cosines_of_every_kind_are_those_of_the_dense_changes(save):
    files = [opened(save(str(i), make(kind, seed=i))) for i, kind in enumerate((low_rank, loha, lokr))]
    for a in files:
        for b in files:
            ours, theirs = (torch.cat([d.flatten() for d in deltas(one.lora).values()]).double() for one in (a, b))
            true = float(ours @ theirs / ours.norm() / theirs.norm())
            assert lora_tools.compare(a, b)["cosine"] == pytest.approx(true, abs=1e-5)


# Extract and merge ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("spec", TINY, ids=lambda spec: spec.family)
def test_what_is_merged_into_a_model_is_extracted_from_it(spec, make_folder, tmp_path, capsys):
    base = make_folder(tmp_path / "base", spec)
    lora = make(family=spec.family)
    name = next(name for name in NAMES[spec.family].vectors)
    vector = torch.full(NAMES[spec.family].vectors[name], 0.25)
    file = write_lora(tmp_path / "a.safetensors", Lora(lora.layers, {name: vector}), NAMES[spec.family], "comfyui")
    assert main(["lora", "merge", str(base), f"{file}:0.5", "-o", str(tmp_path / "tuned")]) == 0
    assert "merged a: 100.0% of the change is kept (fp32)" in capsys.readouterr().err
    out = tmp_path / "again.safetensors"
    assert main(["lora", "extract", str(tmp_path / "tuned"), str(base), "-o", str(out), "--rank", "4"]) == 0
    assert "100.00% of the change is kept" in capsys.readouterr().err
    back = read_lora(out, NAMES[spec.family])
    assert back.layers.keys() == lora.layers.keys()
    for path, layer in lora.layers.items():
        wanted = 0.5 * layer.parts[0].change.delta(None)
        found = torch.zeros_like(wanted)
        for part in back.layers[path].parts:
            found[part.rows] += part.change.delta(None)
        assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert torch.allclose(back.vectors[name], 0.5 * vector, atol=1e-6)
    card = json.loads((tmp_path / "tuned/inkstream.json").read_text())
    assert card["merged"] == [f"{file}:0.5"]


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["int8", "q8_0", "bf16"])
def test_a_merged_model_is_written_in_another_precision(quant, tiny_folder, save, tmp_path):
    file = save("a", make())
    assert main(["lora", "merge", str(tiny_folder), str(file), "-o", str(tmp_path / "m"), "--quant", quant]) == 0
    base, ours = (ModelWeights(locate(folder).parts["transformer"]) for folder in (tiny_folder, tmp_path / "m"))
    for name in ours.names:
        change = deltas(opened(file).lora).get(name.removesuffix(".weight"))
        wanted = base[name] if change is None else base[name] + change
        assert (ours[name] - wanted).norm() <= 0.01 * wanted.norm()


def test_models_that_no_adapter_leads_between_are_refused(tiny_folder, make_folder, tmp_path):
    flux = locate(make_folder(tmp_path / "flux", DEV.tiny))
    turbo = locate(tiny_folder)
    with pytest.raises(InputError, match="are not of one architecture"):
        lora_tools.extract(flux, turbo, tmp_path / "x.safetensors", rank=4)
    with pytest.raises(InputError, match="have equal weights"):
        lora_tools.extract(turbo, turbo, tmp_path / "x.safetensors", rank=4)
    assert not (tmp_path / "x.safetensors").exists()


# Convert and info ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dialect", DIALECTS)
def test_converted_files_hold_the_same_change_and_all_metadata(dialect, save, tmp_path):
    file = save("a", make(mine="kept", ss_trigger="inkstyle"), "kohya")
    there = tmp_path / ("there" if dialect == "peft" else "there.safetensors")
    lora_tools.convert(opened(file), there, dialect)
    back = lora_tools.convert(opened(there), tmp_path / "back.safetensors", "kohya")
    for name, delta in deltas(opened(file).lora).items():
        assert (deltas(opened(there).lora)[name] - delta).abs().max() < 1e-6
        assert (deltas(opened(back).lora)[name] - delta).abs().max() < 1e-6
    said = opened(back).lora.metadata
    assert (said["mine"], opened(back).lora.report.trigger) == ("kept", "inkstyle")
    assert [step["to"] for step in json.loads(said[HISTORY])] == [dialect, "kohya"]


def test_the_dtype_of_a_file_is_kept_or_chosen(save, tmp_path):
    file = write_lora(tmp_path / "a.safetensors", make(), ZIMAGE, "kohya", dtype=torch.float16)
    for name, dtype in (("b", None), ("c", DTYPES["bf16"])):
        made = lora_tools.convert(opened(file), tmp_path / f"{name}.safetensors", "comfyui", dtype)
        assert {tensor.dtype for tensor in load_file(made).values()} == {dtype or torch.float16}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_info_tells_what_a_file_is(dialect, tiny_folder, tmp_path, capsys):
    place = tmp_path / ("a" if dialect == "peft" else "a.safetensors")
    file = write_lora(place, make(ss_trigger="inkstyle", ss_base_model_version="zimage"), ZIMAGE, dialect)
    assert main(["lora", "info", str(place), "-m", str(tiny_folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["dialects"] == [dialect]
    assert facts["algebras"] == ["LoRA"]
    assert (facts["trigger"], facts["base"], facts["dtype"]) == ("inkstyle", "zimage", "fp32")
    assert facts["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert facts["hash"] == read_header(file).metadata["sshs_model_hash"][:12]
    assert facts["bytes"] == file.stat().st_size
    weights = ModelWeights(locate(tiny_folder).parts["transformer"])
    for block in ("layers.0", "total"):
        own = {name: delta for name, delta in deltas(opened(place).lora).items() if block in ("total", name[:8])}
        change = sum(float(delta.square().sum()) for delta in own.values()) ** 0.5
        size = sum(float(weights[f"{name}.weight"].square().sum()) for name in own) ** 0.5
        assert facts["norms"][block] == pytest.approx({"norm": change, "relative": change / size}, rel=1e-4)


def test_info_without_a_hash_in_the_metadata_computes_that_of_the_tensors(save, tmp_path):
    file = tmp_path / "bare.safetensors"
    save_file(load_file(save("a", make())), file)
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert lora_tools.hashes(file)["hash"] == hashlib.sha256(data[start:]).hexdigest()[:12]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pocket", "z-image", "flux1-dev", "flux2-klein-4b", "flux2-klein-9b", "flux2-dev"])
def test_the_model_of_a_file_is_found_by_its_layers(name, tmp_path):
    names = adapter_names(SPECS[name])
    paths = [next(iter(names.layers)), [path for path in names.layers if "layers." in path or "blocks." in path][-1]]
    ones = {path: LowRank(torch.ones(1, names.layers[path][1]), torch.ones(names.layers[path][0], 1)) for path in paths}
    lora = Lora({path: LayerChange([Part(change)]) for path, change in ones.items()})
    found = open_file(write_lora(tmp_path / "a.safetensors", lora, names, "comfyui")).models
    assert all(SPECS[model].family == SPECS[name].family for model in found)
    assert all(adapter_names(SPECS[model]).layers[path] == names.layers[path] for model in found for path in paths)


# Errors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["info", "nothing.safetensors"], "nothing.safetensors"),
        (["info", "{a}", "-m", "nope"], "nope is not a known model, file or folder"),
        (["info", "{flux}", "-m", "{base}"], "has a layer in this model"),
        (["merge", "{base}", "-o", "m"], "no adapter was given"),
        (["merge", "{base}", "{a}@0-0.5", "-o", "m"], "merged weights hold for all steps"),
        (["merge", "{base}", "{flux}", "-o", "m"], "has a layer in this model"),
        (["merge", "{base}", "{a}", "-o", "{base}"], "already exists"),
        (["convert", "{a}", "-o", "b.safetensors", "--to", "odd"], "odd"),
        (["convert", "{a}", "-o", "{a}", "--to", "kohya"], "exists and is not overwritten"),
        (["convert", "{a}", "-o", "b", "--to", "kohya"], "give a name that ends in .safetensors"),
        (["convert", "{a}", "-o", "b.safetensors", "--to", "peft"], "is a folder: give a name without"),
        (["convert", "{loha}", "-o", "b.safetensors", "--to", "diffusers", "-m", "{base}"], "cannot be written"),
        (["resize", "{a}", "-o", "b.safetensors"], "give either --rank, such as 16, or --keep"),
        (["resize", "{a}", "-o", "b.safetensors", "--rank", "0"], "--rank 0 is out of range"),
        (["resize", "{a}", "-o", "b.safetensors", "--keep", "1.5"], "--keep 1.5 is out of range"),
        (["extract", "{base}", "{base}", "-o", "b.safetensors", "--rank", "4"], "have equal weights"),
        (["compare", "{a}", "{flux}", "-m", "{base}"], "has a layer in this model"),
        (["compare", "{a}", "{flux}", "-m", "{base}"], "a.safetensors is for tiny-turbo)"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(words, said, save, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    places = {"base": tiny_folder, "a": save("a", make()), "loha": save("loha", make(loha))}
    places["flux"] = save("flux", make(family="flux1"), family="flux1")
    before = {path.name for path in tmp_path.iterdir()}
    assert main(["lora", *(word.format(**places) for word in words)]) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert len(shown.err.strip().splitlines()) == 1
    assert shown.out == ""
    assert {path.name for path in tmp_path.iterdir()} == before
