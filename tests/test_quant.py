"""Packed weights: what their bytes are, that key tables take them as they are, and layers that hold them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from inkstream.nn import quant
from inkstream.nn.forward import ANY, PLAIN
from inkstream.nn.layers import SwiGLU, rms_norm, rms_norm_into
from inkstream.nn.quant import (
    Outline,
    PackedEmbedding,
    PackedLinear,
    Rounded,
    full_weight,
    multiply_fp8,
    multiply_int8,
    place,
    round_to_int8,
    takes_packed,
)
from inkstream.quant.pack import BLOCKS, GROUPS, fits, pack
from inkstream.quant.packed import CHUNK, FORMATS, GGUF, Packed, cut, join, unpack
from inkstream.quant.small import E2M1, NF4, hadamard, rotate
from inkstream.types import InputError
from inkstream.weights.keymap import drop, fuse, rename, split, translate

PACKABLE = [*BLOCKS, *GROUPS]
ERROR = {
    "q8_0": 0.006, "q6_k": 0.02, "q5_k": 0.04, "q5_1": 0.041, "q5_0": 0.046, "q4_k": 0.08, "q4_1": 0.085, "q4_0": 0.093,
    "q3_k": 0.16, "q2_k": 0.31, "e4m3": 0.03, "e5m2": 0.06, "int8": 0.01, "nf4": 0.098, "int4": 0.102,
}  # fmt: skip
"""Of normal numbers, the root of the mean squared error over that of the numbers, at most."""


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_packed(name: str, rows: int = 6, columns: int = 512, seed: int = 0) -> Packed:
    if name in PACKABLE:
        return pack(name, normal(rows, columns, seed=seed))
    generator = torch.Generator().manual_seed(seed)  # formats that are read but not written
    if name.startswith("iq"):
        form = FORMATS[name]
        blocks = torch.randint(
            0, 256, (rows * columns // form.numbers, form.bytes), dtype=torch.uint8, generator=generator
        )
        blocks[:, :2] = torch.randn(len(blocks), 1, generator=generator).half().view(torch.uint8)
        return Packed(name, blocks.view(rows, -1), (rows, columns))
    data = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
    if name == "int4_low":
        return Packed(name, data, (rows, columns), (torch.rand(rows, 1, generator=generator),))
    blocks = torch.rand(rows, columns // 16, generator=generator).to(torch.float8_e4m3fn)
    return Packed(name, data, (rows, columns), (blocks, torch.full((1, 1), 0.5 + seed)))


# Numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKABLE)
def test_what_is_packed_comes_back_as_near_as_the_format_allows(name):
    weight = normal(64, 512) * 0.02
    weight[3] = 0
    packed = pack(name, weight)
    back = unpack(packed)
    assert back.shape == weight.shape
    assert back.dtype == torch.float32
    assert torch.equal(back[3], weight[3])
    error = (back - weight).square().mean().sqrt() / weight.square().mean().sqrt()
    assert 0 < error < ERROR[name]
    assert unpack(packed, torch.bfloat16).equal(back.bfloat16())


@pytest.mark.parametrize("name", PACKABLE)
def test_packing_on_meta_foresees_shapes_and_bytes(name):
    weight = normal(4, 512)
    real, foreseen = pack(name, weight), pack(name, weight.to("meta"))
    assert foreseen.is_meta
    assert (foreseen.shape, foreseen.nbytes, foreseen.data.shape) == (real.shape, real.nbytes, real.data.shape)
    assert [(s.shape, s.dtype) for s in foreseen.scales] == [(s.shape, s.dtype) for s in real.scales]
    assert unpack(foreseen).shape == weight.shape


def test_blocks_are_what_their_bytes_say():
    half = torch.tensor([0.5]).half().view(torch.uint8)
    integers = torch.arange(-16, 16, dtype=torch.int8)
    block = torch.cat((half, integers.view(torch.uint8)))
    assert unpack(Packed("q8_0", block.view(1, -1), (1, 32))).tolist() == [(integers.float() / 2).tolist()]
    nibbles = torch.arange(16, dtype=torch.uint8)
    block = torch.cat((half, nibbles | ((15 - nibbles) << 4)))  # the high halves are the second half of the numbers
    first = [(i - 8) / 2 for i in range(16)]
    assert unpack(Packed("q4_0", block.view(1, -1), (1, 32))).tolist() == [first + first[::-1]]


def test_small_formats_are_what_their_tables_say():
    data = torch.tensor([[0x01, 0xF7]], dtype=torch.uint8)
    two, one = torch.full((1, 1), 2.0), torch.ones(1, 1)
    assert unpack(Packed("nf4", data, (1, 4), (two,)))[0].tolist() == [2 * torch.tensor(NF4)[i] for i in (0, 1, 15, 7)]
    assert unpack(Packed("int4", data, (1, 4), (one,)))[0].tolist() == [-8, -7, 7, -1]
    assert unpack(Packed("nvfp4", data, (1, 4), (one, two)))[0].tolist() == [2 * E2M1[i] for i in (0, 1, 15, 7)]
    assert unpack(Packed("nvfp4_low", data, (1, 4), (one, two)))[0].tolist() == [2 * E2M1[i] for i in (1, 0, 7, 15)]
    assert unpack(Packed("int4_low", data, (1, 4), (two,)))[0].tolist() == [2, 0, 14, -2]


@pytest.mark.parametrize(("name", "dtype"), [("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)])
def test_every_8_bit_float_is_itself(name, dtype):
    data = torch.arange(256, dtype=torch.uint8).view(1, -1)
    expected = data.view(dtype).float()
    assert torch.allclose(unpack(Packed(name, data, (1, 256))), expected, rtol=0, atol=0, equal_nan=True)


def test_each_group_of_a_row_has_the_scale_beside_it():
    data = torch.ones(2, 6, dtype=torch.int8).view(torch.uint8)
    scales = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert unpack(Packed("int8", data, (2, 6), (scales,))).tolist() == [[1, 1, 1, 2, 2, 2], [3, 3, 3, 4, 4, 4]]


def test_a_weight_larger_than_a_chunk_is_unpacked_row_by_row():
    rows = 3 * CHUNK // 512 + 1
    weight = torch.arange(rows, dtype=torch.float32)[:, None].remainder(7).expand(-1, 512)
    assert torch.allclose(unpack(pack("int8", weight.contiguous())), weight)


def test_turned_weights_are_turned_back():
    h = hadamard(16, torch.device("cpu"))
    assert torch.allclose(h @ h, torch.eye(16), atol=1e-6)
    assert torch.equal(h, h.T)
    seed = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]
    assert (2 * hadamard(4, torch.device("cpu"))).tolist() == seed
    weight = normal(8, 512)
    turned = replace(pack("int8", rotate(weight, 256)), rotated=256)
    assert torch.allclose(unpack(turned), weight, atol=0.05)


def test_only_whole_blocks_are_packed():
    assert fits("q4_k", (3, 512))
    assert not fits("q4_k", (3, 320))
    assert fits("q8_0", (3, 320))
    assert not fits("nf4", (3, 96))
    assert not fits("int8", (3,))
    assert not fits("nvfp4", (16, 512))
    with pytest.raises(ValueError, match="does not fit q4_k"):
        pack("q4_k", normal(3, 320))


# Key tables ---------------------------------------------------------------------------------------------------------


TABLE = [
    fuse("q", "k", "v", ours="qkv"),
    fuse("a", "b", ours="uneven", heights=(1, 2)),
    split("both", ours=("left", "right")),
    rename("scale_shift", "shift_scale", swap=True),
    drop("nothing"),
]


@pytest.mark.parametrize("name", FORMATS)
def test_a_key_table_does_the_same_to_packed_weights_as_to_full_ones(name):
    heights = {"q": 4, "k": 4, "v": 4, "a": 2, "b": 4, "both": 6, "scale_shift": 4, "nothing": 2}
    theirs = {f"{key}.weight": random_packed(name, n, seed=i) for i, (key, n) in enumerate(heights.items())}
    ours = translate(TABLE, theirs)
    full = translate(TABLE, {key: unpack(weight) for key, weight in theirs.items()})
    assert ours.keys() == full.keys()
    assert all(isinstance(weight, Packed) for weight in ours.values())
    assert all(torch.equal(unpack(ours[key]), full[key]) for key in ours)
    back = translate(TABLE, ours, back=True)
    assert all(torch.equal(unpack(back[key]), unpack(theirs[key])) for key in back)
    meta = translate(TABLE, {key: weight.to("meta") for key, weight in theirs.items()})
    assert {key: (weight.shape, weight.nbytes) for key, weight in meta.items()} == {
        key: (weight.shape, weight.nbytes) for key, weight in ours.items()
    }


def test_tensors_of_different_scales_are_joined_with_one_a_row():
    a, b = (pack("e4m3", normal(2, 16, seed=i)) for i in range(2))
    a, b = (replace(packed, scales=(torch.full((1, 1), scale),)) for packed, scale in ((a, 2.0), (b, 3.0)))
    joined = join([a, b])
    assert isinstance(joined, Packed)
    assert joined.scales[0].tolist() == [[2.0], [2.0], [3.0], [3.0]]
    assert torch.equal(unpack(joined), torch.cat((unpack(a), unpack(b))))


def test_what_is_packed_in_different_ways_is_joined_in_full():
    a, b, c = pack("q8_0", normal(2, 256)), pack("q4_k", normal(2, 256)), normal(2, 256)
    assert torch.equal(join([a, b]), torch.cat((unpack(a), unpack(b))).bfloat16())
    assert torch.equal(join([a, c]), torch.cat((unpack(a), c)))


def test_rows_that_share_blocks_are_not_taken_apart():
    flat = Packed("q8_0", pack("q8_0", normal(1, 64)).data, (4, 16))
    assert unpack(flat).shape == (4, 16)
    with pytest.raises(InputError, match="cannot be separated"):
        cut(flat, [2, 2])
    assert not takes_packed(nn.Linear(16, 4), "weight", flat)


# Layers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_layer_is_the_layer_of_its_weight_in_full(name, dtype):
    packed = random_packed(name)
    bias, x = normal(6).to(dtype), normal(2, 3, 512).to(dtype)
    layer = PackedLinear(packed, nn.Parameter(bias), dtype)
    assert torch.equal(layer(x), F.linear(x, unpack(packed, dtype), bias))
    table, ids = PackedEmbedding(packed, dtype), torch.tensor([[5, 0], [5, 2]])
    assert torch.equal(table(ids), F.embedding(ids, unpack(packed, dtype)))
    assert layer.weight == Outline((6, 512), dtype, torch.device("cpu"))
    assert torch.equal(full_weight(layer), unpack(packed, dtype))


def test_no_cast_of_a_module_touches_what_is_packed():
    packed = random_packed("nvfp4")
    layer = PackedLinear(packed, None, torch.float32).half()
    assert torch.equal(unpack(layer.packed), unpack(packed))
    other = PackedLinear(random_packed("nvfp4", seed=1), None, torch.float32)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(unpack(other.packed), unpack(packed))


def test_layers_that_can_hold_a_packed_weight_do_and_others_get_it_in_full():
    module = nn.Sequential(nn.Linear(256, 4), nn.LayerNorm(4), nn.Embedding(4, 256), nn.Bilinear(2, 2, 64))
    state = {key: tensor.detach() for key, tensor in module.state_dict().items()}
    full = {**state, "0.weight": normal(4, 256), "2.weight": normal(4, 256)}
    packed = {key: pack("q8_0", full[key]) for key in ("0.weight", "2.weight")}
    odd = Packed("q8_0", pack("q8_0", normal(1, 256)).data, (64, 2, 2))
    module.load_state_dict(place(module, {**full, **packed, "3.weight": odd}, torch.float32), assign=True)
    assert isinstance(module[0], PackedLinear)
    assert isinstance(module[2], PackedEmbedding)
    assert torch.equal(module[3].weight, unpack(odd))
    assert torch.equal(full_weight(module[0]), unpack(packed["0.weight"]))
    assert torch.equal(full_weight(module[3]), unpack(odd))
    assert module[0].bias is not None


def test_a_gradient_passes_through_a_packed_layer():
    layer = PackedLinear(replace(random_packed("int8"), dynamic=True), None, torch.float32)
    x = normal(3, 512).requires_grad_()
    layer(x).sum().backward()
    assert torch.allclose(x.grad, full_weight(layer).sum(0).expand(3, -1))


# Products of packed numbers -----------------------------------------------------------------------------------------


def test_integers_are_multiplied_exactly():
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randint(-127, 128, (n, 64), generator=generator) for n in (24, 32))
    weight[:, 0] = x[:, 0] = 127  # so that the scales are 1
    packed = pack("int8", weight.float(), dynamic=True)
    expected = (x.double() @ weight.double().T).float()
    assert torch.equal(multiply_int8(x.float(), packed, None), expected)
    with torch.no_grad():
        assert torch.equal(PackedLinear(packed, nn.Parameter(torch.ones(24)), torch.float32)(x.float()), expected + 1)


@pytest.mark.parametrize("rotated", [0, 256])
def test_a_product_of_packed_numbers_is_near_the_full_one(rotated):
    weight, x = normal(48, 512), normal(5, 512)
    x[0] = 0
    packed = pack("int8", rotate(weight, rotated) if rotated else weight, dynamic=True)
    out = multiply_int8(x, replace(packed, rotated=rotated), torch.ones(48))
    full = x @ weight.T + 1
    assert torch.equal(out[0], torch.ones(48))
    assert (out - full).square().mean().sqrt() / full.std() < 0.015


def test_one_scale_of_a_whole_weight_serves_all_its_rows():
    packed = replace(pack("int8", normal(8, 64)), scales=(torch.full((1, 1), 0.25),))
    x = normal(3, 64)
    assert torch.allclose(multiply_int8(x, packed, None), x @ unpack(packed).T, rtol=0.1, atol=3)


def test_rows_are_rounded_the_same_few_at_a_time():
    x, y = normal(3 * CHUNK // 2048 + 1, 2048), normal(3 * CHUNK // 2048 + 1, 2048, seed=1)
    x[3] = 0
    for rounded, full in ((round_to_int8(x), x), (round_to_int8(x, y, join=torch.mul), x * y)):
        scale = full.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
        assert torch.equal(rounded.scale, scale)
        assert torch.equal(rounded.numbers, (full * scale.reciprocal()).round().to(torch.int8))


@pytest.mark.parametrize("rotated", [0, 16])
def test_layers_that_share_rounded_rows_give_what_each_gives_alone(rotated, monkeypatch):
    monkeypatch.setattr(quant, "has_int8", lambda device: True)
    layer = SwiGLU(64, 128)
    state = {name: pack("int8", weight, dynamic=True) for name, weight in layer.state_dict().items()}
    state = {name: replace(packed, rotated=rotated) for name, packed in state.items()}
    layer.load_state_dict(place(layer, state, torch.float32), assign=True)
    x, ones = normal(9, 64), torch.ones(64)
    with torch.no_grad():
        normed = rms_norm(x, ones, 1e-5)
        gate, up = (multiply_int8(normed, state[name], None) for name in ("w1.weight", "w3.weight"))
        expected = multiply_int8(F.silu(gate) * up, state["w2.weight"], None)
        shared = rms_norm_into([layer.w1, layer.w3], x, ones, 1e-5)
        assert isinstance(shared, Rounded) is (rotated == 0)
        assert torch.equal(layer(shared, PLAIN, ANY), expected)


def test_a_product_of_8_bit_floats_is_near_the_full_one():
    weight, x = normal(48, 512), normal(32, 512).bfloat16()
    packed = pack("e4m3", weight, dynamic=True)
    full = x.float() @ weight.T
    try:
        out = multiply_fp8(x, packed, None)
    except RuntimeError as error:  # not every build of torch has it for CPUs
        pytest.skip(str(error).splitlines()[0])
    assert out.dtype == torch.bfloat16
    assert (out.float() - full).square().mean().sqrt() / full.std() < 0.06


def test_formats_of_gguf_are_told_by_their_name():
    assert set(GGUF) == set(BLOCKS)
    assert all(FORMATS[name].numbers in (32, 256) for name in GGUF)
