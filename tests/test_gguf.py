"""GGUF files, of transformer and text encoder: read as they lie, refused in a line where they are damaged."""

from __future__ import annotations

import shutil
import struct
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import inkstream
from inkstream.engine.files.convert import convert
from inkstream.engine.files.sources import locate
from inkstream.families.parts import QWEN3
from inkstream.nn.quant import PackedEmbedding, PackedLinear
from inkstream.quant.pack import fits, pack
from inkstream.quant.packed import Packed, unpack
from inkstream.types import InputError
from inkstream.weights.files import read_header, read_state
from inkstream.weights.gguf import write_gguf
from inkstream.weights.keymap import translate


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def value(name: str, kind: int, data: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + data


def tensor(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file_of(values: list[bytes], tensors: list[bytes], data: bytes, version: int = 3, alignment: int = 32) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(values)) + b"".join((*values, *tensors))
    return head + bytes(-len(head) % alignment) + data


VALUES = [
    value("general.architecture", 8, text("lumina2")),
    value("general.alignment", 4, struct.pack("<I", 64)),
    value("a.flag", 7, b"\1"),
    value("words", 9, struct.pack("<IQ", 8, 20) + b"".join(text(f"w{i}") for i in range(20))),
    value("numbers", 9, struct.pack("<IQ", 6, 100) + bytes(400)),
    value("comfy.gguf.orig_shape.flat", 9, struct.pack("<IQ3i", 5, 3, 2, 4, 8)),
]
Q8 = pack("q8_0", torch.arange(96.0).view(3, 32) - 40)
TENSORS = [
    tensor("packed.weight", (32, 3), 8, 0),
    tensor("half", (4, 2), 1, 128),
    tensor("brain", (2,), 30, 192),
    tensor("flat", (64,), 0, 256),
]
DATA = b"".join(
    raw.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes().ljust(size, b"\0")
    for raw, size in (
        (Q8.data, 128),
        (torch.arange(8).half(), 64),
        (torch.tensor([1.5, -2.0]).bfloat16(), 64),
        (torch.arange(64.0), 256),
    )
)
WHOLE = file_of(VALUES, TENSORS, DATA, alignment=64)


# Files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [2, 3])
def test_a_file_is_what_its_bytes_say(tmp_path, version):
    path = tmp_path / "x.gguf"
    path.write_bytes(file_of(VALUES, TENSORS, DATA, version, 64))
    state = read_state(path)
    assert list(state) == ["packed.weight", "half", "brain", "flat"]
    packed = state["packed.weight"]
    assert isinstance(packed, Packed)
    assert (packed.format, packed.shape) == ("q8_0", (3, 32))
    assert torch.equal(unpack(packed), unpack(Q8))
    assert torch.equal(state["half"], torch.arange(8).half().view(2, 4))  # the fastest axis stands first in the file
    assert state["brain"].tolist() == [1.5, -2.0]
    assert torch.equal(state["flat"], torch.arange(64.0).view(2, 4, 8))
    header = read_header(path)
    assert {k: (tuple(v.shape), v.nbytes) for k, v in header.tensors.items()} == {
        k: (tuple(v.shape), v.nbytes) for k, v in state.items()
    }
    assert all(weight.is_meta for weight in header.tensors.values())
    assert header.metadata["general.architecture"] == "lumina2"
    assert header.metadata["a.flag"] == "True"
    assert "words" not in header.metadata
    assert list(read_state(path, {"half"})) == ["half"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "cut short or not a GGUF file"),
        (b"version https://git-lfs", "git-lfs pointer"),
        (b"safetensors?", "cut short or not a GGUF file"),
        (file_of([], [], b"", version=1), "GGUF of version 1: take a file of version 2 or 3"),
        (file_of([], [], b"", version=3 << 24), "version 50331648"),
        (file_of([], [tensor("x", (256,), 18, 0)], bytes(256)), "x as IQ3_XXS, which is not supported: take a Q8_0"),
        (file_of([], [tensor("x", (256,), 99, 0)], bytes(256)), "x as number 99"),
        (file_of([], [tensor("x", (33,), 8, 0)], bytes(256)), "not divisible into blocks of 32"),
        (file_of([], [tensor("x", (32, 0), 8, 0)], bytes(256)), r"x is \(0, 32\), which holds no numbers"),
        (file_of([], [tensor("x", (4,), 0, 0)] * 2, bytes(256)), "x occurs twice"),
        (file_of([], [tensor("x", (4,), 0, 3)], bytes(256)), "offset of 3, which is not a multiple of 8"),
        (file_of([], [tensor("x", (4,) * 9, 0, 0)], bytes(256)), "9 axes"),
        (file_of([value("a", 77, b"")], [], b""), "unknown type 77"),
        (file_of([value("general.alignment", 4, bytes(4))], [], b""), "alignment of 0"),
        (
            file_of([VALUES[-1]], [tensor("flat", (63,), 0, 0)], bytes(252)),
            r"flat is \(63,\), which does not match its original shape \(2, 4, 8\)"
        ),
        (WHOLE[:-1], "cut short"),
    ],
)  # fmt: skip
def test_what_is_damaged_is_named_in_one_line(tmp_path, data, said):
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    for read in (read_header, read_state):
        with pytest.raises(InputError, match=said) as caught:
            read(path)
        assert "x.gguf" in str(caught.value)
        assert "\n" not in str(caught.value)


@settings(deadline=None, max_examples=60)
@given(at=st.integers(0, len(WHOLE) - 1), byte=st.integers(0, 255), cut=st.booleans())
def test_no_damage_ends_in_anything_else(tmp_path_factory, at, byte, cut):
    path = tmp_path_factory.mktemp("x") / "x.gguf"
    path.write_bytes(WHOLE[:at] if cut else WHOLE[:at] + bytes([byte]) + WHOLE[at + 1 :])
    with suppress(InputError):
        read_state(path)


def test_what_is_written_is_read_again(tmp_path):
    weight = torch.randn(6, 512, generator=torch.Generator().manual_seed(0))
    state = {"a.weight": pack("q6_k", weight), "b": weight[0].bfloat16(), "c": torch.tensor(2.0), "d.weight": weight}
    plan = {name: w.to("meta") for name, w in state.items()}
    sizes: list[int] = []
    write_gguf(tmp_path / "x.gguf", plan, reversed(state.items()), {"n": 3, "s": "é"}, sizes.append)
    back = read_state(tmp_path / "x.gguf")
    assert list(back) == list(state)
    assert torch.equal(unpack(back["a.weight"]), unpack(state["a.weight"]))
    assert all(torch.equal(back[name].reshape(state[name].shape), state[name]) for name in ("b", "c", "d.weight"))
    assert read_header(tmp_path / "x.gguf").metadata == {"n": "3", "s": "é"}
    assert sum(sizes) == sum(weight.nbytes for weight in state.values())
    with pytest.raises(ValueError, match="nothing was written for b"):
        write_gguf(tmp_path / "x.gguf", plan, [(k, w) for k, w in state.items() if k != "b"], {})


# Models -------------------------------------------------------------------------------------------------------------


def quiet(model: inkstream.Model) -> torch.Tensor:
    request = inkstream.Request(prompt="a red ball", seed=1, steps=1)
    return model.decode(model.sample(request, model.encode(request)))


def packed_where_it_fits(state, name="q8_0"):
    """As files in the wild: matrices packed, vectors in full, what does not fill blocks in half precision."""
    full = {key: weight.float() if weight.ndim < 2 else weight.half() for key, weight in state.items()}
    return {key: pack(name, w) if fits(name, tuple(w.shape)) else w for key, w in full.items()}


@pytest.fixture(scope="module")
def comfyui(tiny_folder, tmp_path_factory) -> Path:
    """ComfyUI's models/ folder with the tiny turbo, transformer and text encoder as GGUF files, named as theirs are."""
    root = tmp_path_factory.mktemp("comfyui") / "models"
    native = convert(tiny_folder, root / "native", "native")
    for folder in ("unet", "clip"):
        (root / folder).mkdir()
    own = {f"model.diffusion_model.{k}": w for k, w in read_state(native / "tiny-turbo.safetensors").items()}
    write = {"general.architecture": "lumina2"}
    state = packed_where_it_fits(own)
    write_gguf(root / "unet" / "z-image-turbo-Q8_0.gguf", state, state.items(), write)
    theirs = translate(QWEN3.layouts["gguf"], read_state(tiny_folder / "text_encoder"), back=True)
    assert {"token_embd.weight", "blk.0.attn_q.weight", "blk.2.ffn_down.weight", "output_norm.weight"} <= theirs.keys()
    state = packed_where_it_fits(theirs)
    write_gguf(root / "clip" / "qwen3.gguf", state, state.items(), {"general.architecture": "qwen3"})
    shutil.copytree(tiny_folder / "tokenizer", root / "unet" / "tokenizer")
    shutil.move(native / "vae", root / "unet" / "vae")
    shutil.rmtree(native)
    return root


def test_a_model_of_gguf_files_in_comfyuis_folders_draws_nearly_the_same_picture(tiny_folder, comfyui):
    model = inkstream.load(comfyui, inkstream.Machine("cpu"))
    assert model.spec.name == "z-image-turbo-Q8_0"
    assert isinstance(model.family.transformer.layers[0].attention.qkv, PackedLinear)
    assert isinstance(model.family.text_encoder.embed_tokens, PackedEmbedding)
    assert model.family.transformer.layers[0].attention_norm1.weight.dtype == torch.float32
    error = (quiet(model) - quiet(inkstream.load(tiny_folder, inkstream.Machine("cpu")))).square().mean()
    assert 35 < -10 * error.log10() < 80  # PSNR in dB


def test_a_file_of_another_architecture_is_refused_by_its_names(tmp_path):
    state = {"blk.0.attn_q.weight": torch.ones(2, 2)}
    write_gguf(tmp_path / "x.gguf", state, state.items(), {"general.architecture": "llama"})
    with pytest.raises(InputError, match=r"x\.gguf is a text encoder, not a transformer that is known here"):
        inkstream.load(tmp_path / "x.gguf")


def test_the_safetensors_file_is_taken_where_a_folder_holds_both(tmp_path, tiny_folder):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "m"))
    (folder / "transformer" / "other.gguf").write_bytes(b"no matter")
    locate(folder)
