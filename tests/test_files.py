"""Safetensors files: mapped, not copied; shards are one state; what is damaged or dangerous is named."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from inkstream.types import InputError
from inkstream.weights.files import DTYPES, in_section, read_header, read_state, sections, write_state

STATE = {"a.weight": torch.randn(4, 3), "b": torch.arange(5, dtype=torch.int64), "c": torch.tensor(2.0).bfloat16()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def test_what_is_written_is_read_by_us_and_by_the_safetensors_package(tmp_path):
    path = tmp_path / "x.safetensors"
    assert write_state(path, STATE, {"licence": "apache-2.0"}) == [path]
    assert same(read_state(path), STATE)
    assert same(load_file(path), STATE)
    header = read_header(path)
    assert header.metadata == {"format": "pt", "licence": "apache-2.0"}
    assert all(tensor.is_meta for tensor in header.tensors.values())
    assert header.tensors.keys() == STATE.keys()
    assert all((header.tensors[k].dtype, header.tensors[k].shape) == (v.dtype, v.shape) for k, v in STATE.items())


def test_what_the_safetensors_package_writes_is_read(tmp_path):
    save_file(STATE, tmp_path / "x.safetensors")
    assert same(read_state(tmp_path / "x.safetensors"), STATE)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
def test_every_dtype_goes_through_a_file(dtype, tmp_path):
    state = {"x": torch.arange(6).reshape(2, 3).to(dtype), "empty": torch.empty(0, 4, dtype=dtype)}
    write_state(tmp_path / "x.safetensors", state)
    out = load_file(tmp_path / "x.safetensors")
    assert out["x"].dtype == dtype
    assert torch.equal(out["x"].float(), state["x"].float())
    assert out["empty"].shape == (0, 4)


def test_views_and_transposed_tensors_are_written_as_they_look(tmp_path):
    whole = torch.randn(6, 4)
    state = {"rows": whole[2:4], "turned": whole.T, "same": whole}
    write_state(tmp_path / "x.safetensors", state)
    assert same(read_state(tmp_path / "x.safetensors"), state)


def test_every_tensor_starts_at_a_multiple_of_its_own_size(tmp_path):
    state = {"odd": torch.ones(3, dtype=torch.uint8), "half": torch.ones(1).half(), "wide": torch.ones(2).double()}
    write_state(tmp_path / "x.safetensors", state)
    assert all(t.data_ptr() % t.element_size() == 0 for t in read_state(tmp_path / "x.safetensors").values())


MEASURE = """
import sys, torch
from inkstream.weights.files import read_state, write_state
def memory(kind):
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines[kind].split()[0]) / 1024
before = memory("RssAnon")
state = read_state(sys.argv[1])
size = sum(t.nbytes for t in state.values()) / 2**20
total = sum(float(t[0, 0]) + float(t.sum()) for t in state.values())
read = memory("RssAnon") - before
write_state(sys.argv[2], state)
print(size, read, memory("RssAnon") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory as Linux does")
def test_neither_reading_nor_writing_makes_a_copy(tmp_path):
    write_state(tmp_path / "x.safetensors", {f"w{i}": torch.zeros(1024, 2048) for i in range(12)})
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors")]
    size, read, written = map(float, subprocess.check_output(command, text=True).split())
    assert size == 96
    assert read < 10
    assert written < 20


def test_a_state_above_the_limit_is_cut_into_shards_with_an_index(tmp_path):
    state = {f"w{i}": torch.full((10,), i, dtype=torch.float32) for i in range(7)}
    files = write_state(tmp_path / "model.safetensors", state, shard_bytes=100)
    assert [file.name for file in files] == [f"model-{i:05d}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 280
    assert index["weight_map"]["w6"] == files[3].name
    assert same(read_state(tmp_path), state)
    assert read_header(tmp_path).tensors.keys() == state.keys()


@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12), limit=st.integers(1, 200))
def test_no_shard_is_over_the_limit_but_for_a_single_large_tensor(tmp_path_factory, sizes, limit):
    folder = tmp_path_factory.mktemp("shards")
    state = {f"w{i}": torch.ones(n) for i, n in enumerate(sizes)}
    for file in write_state(folder / "m.safetensors", state, shard_bytes=limit):
        held = read_header(file).tensors.values()
        assert len(held) == 1 or sum(t.nbytes for t in held) <= limit
    assert same(read_state(folder), state)


@pytest.fixture
def sharded(tmp_path) -> Path:
    write_state(tmp_path / "model.safetensors", {f"w{i}": torch.ones(10) for i in range(4)}, shard_bytes=80)
    return tmp_path


def edit_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    for read in (read_state, read_header):
        with pytest.raises(InputError, match=r"lacks model-00002-of-00002\.safetensors"):
            read(sharded)


def test_a_name_that_its_shard_does_not_hold_is_named(sharded):
    edit_index(sharded, lambda index: index.update(w9="model-00001-of-00002.safetensors"))
    with pytest.raises(InputError, match="w9"):
        read_header(sharded)


def test_a_name_in_two_shards_is_refused(sharded):
    save_file({f"w{i}": torch.zeros(1) for i in (0, 2, 3)}, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(InputError, match=r"w0 is in both .*00001-of-00002\.safetensors and model-00002"):
        read_state(sharded)


def test_an_index_cannot_point_outside_its_folder(sharded):
    edit_index(sharded, lambda index: index.update(w0="../other.safetensors"))
    with pytest.raises(InputError, match=r"index\.json is not an index"):
        read_state(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index_is_named(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json is not an index"):
        read_header(sharded)


def test_two_indexes_are_refused(sharded):
    (sharded / "model.fp16.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match="2 indexes"):
        read_header(sharded)


def test_files_of_a_folder_without_an_index_are_one_state(tmp_path):
    for name in "ab":
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    assert read_state(tmp_path).keys() == {"a", "b"}


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "model.pth", "pytorch_model.bin"])
def test_a_pickle_is_refused_unopened(tmp_path, name):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(InputError, match=rf"{name}.*pickle|pickle.*{name}.*convert"):
            read_state(path)
    assert not (tmp_path / "exploded").exists()


def damaged(header: dict | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "cut short"),
        (b"abc", "cut short"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>not found</html>", "not a safetensors file"),
        (damaged({"x": F32}, b"1234"), r"cut short, it has 73 of 77 bytes"),
        (damaged(b'{"x": '), "damaged"),
        (damaged(b"\xff\xfe"), "damaged"),
        (damaged(b"[]"), "damaged"),
        (damaged({"x": []}), "damaged"),
        (damaged({"x": {**F32, "shape": [3]}}, bytes(8)), "damaged"),
        (damaged({"x": {**F32, "shape": [-2]}}, bytes(8)), "damaged"),
        (damaged({"x": {**F32, "shape": "2"}}, bytes(8)), "damaged"),
        (damaged({"x": {**F32, "dtype": "F4"}}, bytes(8)), "type F4"),
        (damaged({"x": {**F32, "data_offsets": [8]}}, bytes(8)), "damaged"),
        (damaged({"x": F32, "y": F32}, bytes(8)), "cannot be read|damaged"),
        (damaged({"x": F32}, bytes(9)), "cannot be read|damaged"),
        (b"\xff" * 64, "cut short"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(tmp_path, content, said):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        read_state(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.binary(max_size=60))
def test_no_bytes_whatever_raise_anything_else(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("noise") / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError):
        read_state(path)


def test_what_is_not_there_or_not_safetensors_is_named(tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"ONNX")
    for name, said in (("y.safetensors", "missing"), ("x.onnx", "not a safetensors or GGUF file"), ("", "holds no")):
        with pytest.raises(InputError, match=said):
            read_header(tmp_path / name)


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "x.safetensors"
    write_state(path, STATE)

    def full(size: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_state(path, {"other": torch.ones(1)}, progress=full)
    assert same(read_state(path), STATE)
    assert list(tmp_path.iterdir()) == [path]


def test_progress_counts_the_bytes_written(tmp_path):
    sizes = []
    write_state(tmp_path / "x.safetensors", STATE, progress=sizes.append)
    assert sum(sizes) == sum(tensor.nbytes for tensor in STATE.values())


def test_a_prefix_is_taken_off_and_other_keys_stay():
    state = {"model.diffusion_model.a": torch.ones(1), "diffusion_model.b": torch.ones(1), "c": torch.ones(1)}
    assert list(in_section(state, "")) == ["a", "diffusion_model.b", "c"]
    assert list(in_section({"diffusion_model.b": torch.ones(1)}, "")) == ["b"]
    assert in_section({"c": torch.ones(1)}, "").keys() == {"c"}


def test_a_key_with_and_without_its_prefix_is_refused():
    with pytest.raises(InputError, match=r"diffusion_model\.a occurs with and without the prefix"):
        in_section({"diffusion_model.a": torch.ones(1), "a": torch.ones(1)}, "")


def test_sections_of_a_whole_model_are_kept_apart():
    names = {
        "model.diffusion_model.x": "",
        "loose": "",
        "vae.decoder.x": "vae.",
        "first_stage_model.x": "first_stage_model.",
        "text_encoders.clip_l.transformer.text_model.x": "text_encoders.clip_l.transformer.",
        "text_encoders.t5xxl.logit_scale": "text_encoders.t5xxl.",
        "text_encoders.tekken_model": "text_encoders.",
    }
    assert sections(names) == list(dict.fromkeys(names.values()))
    for section in names.values():
        assert [*in_section(names, section).values()] == [own for own in names.values() if own == section]
    assert [*in_section(names, "text_encoders.clip_l.transformer.")] == ["text_model.x"]
