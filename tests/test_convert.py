"""`convert`: the folder appears whole or not at all, with the same weights. (tests/parity: diffusers loads it.)"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import inkstream
from inkstream.engine.files import convert as convert_module
from inkstream.engine.files.convert import convert
from inkstream.families.zimage.specs import TURBO
from inkstream.types import InputError, Loading
from inkstream.weights.files import read_header, read_state, write_state


def states(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {part: read_state(folder / part) for part in ("transformer", "text_encoder", "vae")}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_to_native_and_back_is_the_identity(tiny_folder, tmp_path):
    native = convert(tiny_folder, tmp_path / "native", "native")
    back = convert(native, tmp_path / "back", "diffusers")
    for part, state in states(tiny_folder).items():
        assert same(states(back)[part], state)
    assert (back / "tokenizer/tokenizer.json").read_bytes() == (tiny_folder / "tokenizer/tokenizer.json").read_bytes()
    for name in ("model_index.json", "transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"):
        assert json.loads((back / name).read_text()) == json.loads((tiny_folder / name).read_text())


def test_the_native_folder_holds_one_file_with_origin_and_licence(tiny_folder, tmp_path):
    folder = convert(tiny_folder, tmp_path / "native", "native")
    assert sorted(p.name for p in folder.iterdir()) == [
        "inkstream.json", "scheduler", "text_encoder", "tiny-turbo.safetensors", "tokenizer", "vae"
    ]  # fmt: skip
    header = read_header(folder / "tiny-turbo.safetensors")
    assert header.metadata["licence"] == "unknown"  # the folder does not say
    assert header.metadata["origin"] == "tiny-turbo"
    assert json.loads(header.metadata["config"])["dim"] == TURBO.tiny.transformer.dim
    assert "layers.0.attention.qkv.weight" in header.tensors


def test_the_index_names_the_tokenizers_own_class(tiny_folder, tmp_path):
    own = Path(shutil.copytree(tiny_folder, tmp_path / "own"))
    (own / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    back = convert(convert(own, tmp_path / "native", "native"), tmp_path / "back", "diffusers")
    index = json.loads((back / "model_index.json").read_text())
    assert index["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]


def test_dtypes_are_kept_tensor_by_tensor(tiny_folder, tmp_path):
    mixed = Path(shutil.copytree(tiny_folder, tmp_path / "mixed"))
    (file,) = (mixed / "transformer").glob("*.safetensors")
    state = {k: v.clone() if "embedder" in k else v.bfloat16() for k, v in read_state(file).items()}
    write_state(file, state)
    back = convert(convert(mixed, tmp_path / "native", "native"), tmp_path / "back", "diffusers")
    assert same(read_state(back / "transformer"), state)


def test_unknown_entries_of_a_config_are_kept(tiny_folder, tmp_path):
    source = Path(shutil.copytree(tiny_folder, tmp_path / "source"))
    path = source / "vae/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sample_size": 512, "remark": "mine"}))
    config = json.loads((convert(source, tmp_path / "out", "diffusers") / "vae/config.json").read_text())
    assert (config["sample_size"], config["remark"]) == (512, "mine")


def test_an_existing_folder_is_not_overwritten(tiny_folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("full", "file"):
        with pytest.raises(InputError, match=rf"{name} already exists: take another name"):
            convert(tiny_folder, tmp_path / name)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]
    (tmp_path / "empty").mkdir()
    assert inkstream.load(convert(tiny_folder, tmp_path / "empty")).spec.name == "empty"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device"), RuntimeError("broken")])
@pytest.mark.parametrize("at", ["transformer", "vae"])
def test_an_interrupted_conversion_leaves_nothing(tiny_folder, tmp_path, error, at):
    def stop(event: Loading) -> None:
        if event.what == f"writing {at}":
            raise error

    with pytest.raises((KeyboardInterrupt, OSError, RuntimeError)):
        convert(tiny_folder, tmp_path / "deep" / "out", progress=stop)
    assert not list((tmp_path / "deep").iterdir())


def test_a_full_disk_is_reported_before_anything_is_written(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(InputError, match=r"out needs 0\.0 GB, .* free: make room"):
        convert(tiny_folder, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_unknown_layout_is_refused(tiny_folder, tmp_path):
    with pytest.raises(InputError, match="layout gguf is not known: take diffusers or native"):
        convert(tiny_folder, tmp_path / "out", "gguf")


def test_progress_ends_at_the_last_byte(tiny_folder, tmp_path):
    events: list[Loading] = []
    convert(tiny_folder, tmp_path / "out", progress=events.append)
    done = [event.done_bytes for event in events]
    assert done == sorted(done)
    assert done[-1] == events[-1].total_bytes
    assert sum(t.nbytes for state in states(tiny_folder).values() for t in state.values()) == done[-1]


def test_the_card_goes_with_the_model(tiny_folder, tmp_path):
    source = Path(shutil.copytree(tiny_folder, tmp_path / "source"))
    liked = {"steps": 5, "guides": "none", "guidance": 2.5, "size": [96, 64], "solver": "heun", "title": "Mine"}
    (source / "inkstream.json").write_text(json.dumps(liked))
    for layout in ("native", "diffusers"):
        spec = inkstream.load(convert(source, tmp_path / layout, layout)).spec
        assert (spec.steps, spec.guidance, spec.size, spec.solver, spec.title) == (5, 2.5, (96, 64), "heun", "Mine")
        assert spec.guides == "none"


@pytest.mark.parametrize(
    "card",
    [{"steps": 0}, {"size": [16]}, {"solver": "x"}, {"abilities": 3}, {"guidance": "a"}, {"guides": "often"},
     {"commercial": "no"}, {"licence": 3}],
)  # fmt: skip
def test_an_invalid_card_is_refused(tiny_folder, tmp_path, card):
    source = Path(shutil.copytree(tiny_folder, tmp_path / "source"))
    (source / "inkstream.json").write_text(json.dumps(card))
    (name,) = card
    with pytest.raises(InputError, match=rf"inkstream\.json is not a valid model card \(.*{name}.*\): correct"):
        inkstream.load(source)
