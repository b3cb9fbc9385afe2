"""GGUF against ggml's own Python package: bytes are the same numbers bit for bit, and files are read alike."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from inkstream.quant.pack import pack
from inkstream.quant.packed import FORMATS, GGUF, Packed, unpack
from inkstream.weights.gguf import FILE_TYPES, PACKED, read_gguf, read_metadata, write_gguf

gguf = pytest.importorskip("gguf")

SCALES = {"q2_k": (80, 82), "q3_k": (108,), "q6_k": (208,), **dict.fromkeys(("q4_1", "q5_1", "q4_k", "q5_k"), (0, 2))}
"""Where the float16 of a block stand, if not at its start alone; random bytes there might be no numbers."""


def kind(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name.upper()]


@pytest.mark.parametrize("name", [*GGUF, "iq4_nl", "iq4_xs"])
def test_random_bytes_are_the_same_numbers_bit_for_bit(name):
    form = FORMATS[name]
    assert (form.numbers, form.bytes) == gguf.GGML_QUANT_SIZES[kind(name)]
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (96, form.bytes), dtype=torch.uint8, generator=generator)
    for at in SCALES.get(name, (0,)):
        blocks[:, at : at + 2] = torch.randn(96, 1, generator=generator).half().view(torch.uint8)
    data = blocks.view(8, -1)
    theirs = torch.from_numpy(gguf.quants.dequantize(data.numpy(), kind(name)))
    ours = unpack(Packed(name, data, tuple(theirs.shape)))
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


@pytest.mark.parametrize("name", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_blocks_of_32_are_packed_as_theirs(name):
    weight = torch.randn(16, 512, generator=torch.Generator().manual_seed(0))
    weight[2] = 0
    theirs = gguf.quants.quantize(weight.numpy(), kind(name))
    assert np.array_equal(pack(name, weight).data.numpy(), theirs)


def test_numbers_of_formats_and_files_are_ggmls():
    assert {number: name.upper() for number, name in PACKED.items()} == {
        number: gguf.GGMLQuantizationType(number).name for number in PACKED
    }
    for name, number in FILE_TYPES.items():
        assert name.upper() in gguf.LlamaFileType(number).name


def test_their_reader_reads_what_is_written_here(tmp_path):
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    state = {"a.weight": pack("q4_k", weight), "b.weight": weight.bfloat16(), "c": weight[0], "d": weight.half()}
    path = tmp_path / "x.gguf"
    write_gguf(path, state, reversed(state.items()), {"general.architecture": "lumina2", "general.file_type": 14})
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert list(tensors) == list(state)
    assert [list(map(int, tensors[name].shape)) for name in state] == [[512, 4], [512, 4], [512], [512, 4]]
    full = torch.from_numpy(gguf.quants.dequantize(tensors["a.weight"].data, tensors["a.weight"].tensor_type))
    assert torch.equal(full, unpack(state["a.weight"]))
    assert np.array_equal(tensors["c"].data, weight[0].numpy())
    assert reader.get_field("general.architecture").contents() == "lumina2"


def test_what_their_writer_writes_is_read_here(tmp_path):
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_array("tokenizer.ggml.tokens", [f"token {i}" for i in range(40)])
    writer.add_array("comfy.gguf.orig_shape.b", [2, 2, 4, 16])
    writer.add_float32("some.number", 0.5)
    weight = np.random.default_rng(0).standard_normal((4, 256), dtype=np.float32)
    q8 = gguf.quants.quantize(weight, kind("q8_0"))
    writer.add_tensor("a", q8, raw_dtype=kind("q8_0"))
    writer.add_tensor("b", weight[:1].astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    state = read_gguf(path)
    assert np.array_equal(unpack(state["a"]).numpy(), gguf.quants.dequantize(q8, kind("q8_0")))
    assert state["b"].shape == (2, 2, 4, 16)
    assert read_metadata(path)["some.number"] == "0.5"
    assert "tokenizer.ggml.tokens" not in read_metadata(path)
