"""Packed weights in safetensors files: every way they are spelt loads to the same tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import inkstream
from inkstream.engine.files.convert import convert
from inkstream.quant.pack import pack
from inkstream.quant.packed import Packed, unpack
from inkstream.quant.small import rotate
from inkstream.types import InputError
from inkstream.weights.files import list_weights, read_header, read_state, write_state

ROWS, COLUMNS = 160, 256
LAYER = "layers.0.out"
E4M3 = torch.float8_e4m3fn


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mark(**said) -> torch.Tensor:
    """What `comfy_quant` holds; padded, as some are."""
    return torch.tensor(list(json.dumps(said).encode() + b"\0\0"), dtype=torch.uint8)


def listed(prefix: str = "", **said) -> dict[str, str]:
    """The header's `_quantization_metadata`."""
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {prefix + LAYER: said}})}


def swizzled(scales: torch.Tensor) -> torch.Tensor:
    """Scales (rows, columns) where tensor cores want them, one by one: the place of each is written out."""
    rows, columns = scales.shape
    high, wide = -(-rows // 128), -(-columns // 4)
    out = torch.zeros(high * wide * 512, dtype=torch.uint8)
    r, c = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    tile = (r // 128) * wide + c // 4
    out[tile * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4] = scales.view(torch.uint8)
    return out.view(E4M3).view(high * 128, wide * 4)


Q = (normal(ROWS, COLUMNS) * 100).to(E4M3)
I8 = (normal(ROWS, COLUMNS) * 30).round().clamp(-127, 127).to(torch.int8)
SCALE = torch.tensor(0.125)
ROW_SCALES = torch.rand(ROWS, 1, generator=torch.Generator().manual_seed(1)) + 0.5
NIBBLES = torch.randint(0, 256, (ROWS, COLUMNS // 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
BLOCKS = (torch.rand(ROWS, COLUMNS // 16, generator=torch.Generator().manual_seed(3)) * 8).to(E4M3)
SWAPPED = (NIBBLES >> 4) | (NIBBLES << 4)
FULL_FP4 = unpack(Packed("nvfp4", NIBBLES, (ROWS, COLUMNS), (BLOCKS.float(), SCALE.view(1, 1))))
SAYS_FP8 = {"format": "float8_e4m3fn"}
W, NAME = f"{LAYER}.weight", f"{LAYER}."

DIALECTS = {
    "plain": ({W: Q}, {}, Q.float()),
    "plain e5m2": ({W: Q.float().to(torch.float8_e5m2)}, {}, Q.float().to(torch.float8_e5m2).float()),
    "scale_weight": (
        {W: Q, NAME + "scale_weight": SCALE, NAME + "scale_input": SCALE, "scaled_fp8": torch.zeros(0, dtype=E4M3)},
        {}, Q.float() * 0.125,
    ),
    "scale_weight of one axis": (
        {W: Q, NAME + "scale_weight": SCALE.view(1), "scaled_fp8": torch.zeros(2, dtype=E4M3)}, {}, Q.float() * 0.125
    ),
    "comfy_quant": (
        {W: Q, NAME + "weight_scale": SCALE, NAME + "input_scale": SCALE, NAME + "comfy_quant": mark(**SAYS_FP8)},
        {}, Q.float() * 0.125,
    ),
    "metadata": ({W: Q, NAME + "weight_scale": SCALE}, listed(**SAYS_FP8), Q.float() * 0.125),
    "metadata with a prefix": (
        {W: Q, NAME + "weight_scale": SCALE}, listed("model.diffusion_model.", **SAYS_FP8), Q.float() * 0.125
    ),
    "a scale a row": ({W: Q, NAME + "weight_scale": ROW_SCALES}, listed(**SAYS_FP8), Q.float() * ROW_SCALES),
    "a scale a row, flat": ({W: Q, NAME + "weight_scale": ROW_SCALES[:, 0]}, {}, Q.float() * ROW_SCALES),
    "int8": (
        {W: I8, NAME + "weight_scale": ROW_SCALES, NAME + "comfy_quant": mark(format="int8_tensorwise", per_row=True)},
        {}, I8.float() * ROW_SCALES,
    ),
    "int8, nothing said": ({W: I8, NAME + "weight_scale": SCALE}, {}, I8.float() * 0.125),
    "int8 turned": (
        {W: I8, NAME + "weight_scale": SCALE},
        listed(format="int8_tensorwise", convrot=True, convrot_groupsize=256), rotate(I8.float() * 0.125, 256),
    ),
    "nvfp4 by ComfyUI": (
        {W: NIBBLES, NAME + "weight_scale": swizzled(BLOCKS), NAME + "weight_scale_2": SCALE,
         NAME + "comfy_quant": mark(format="nvfp4")},
        {}, FULL_FP4,
    ),
    "nvfp4 by Model Optimizer": (
        {W: SWAPPED, NAME + "weight_scale": BLOCKS, NAME + "weight_scale_2": SCALE, NAME + "input_scale": SCALE},
        {}, FULL_FP4,
    ),
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_read_as_one_packed_weight(tmp_path, dialect, prefix):
    tensors, metadata, full = DIALECTS[dialect]
    plain = {"norm.weight": torch.ones(3), "layers.0.norm.weight": torch.ones(3).to(E4M3)}
    names = {name: prefix + name for name in (*tensors, *plain)}
    save_file({names[k]: v.clone() for k, v in {**tensors, **plain}.items()}, tmp_path / "x.safetensors", metadata)
    state = read_state(tmp_path / "x.safetensors")
    assert state.keys() == {names[W], *(names[name] for name in plain)}
    packed = state[names[W]]
    assert isinstance(packed, Packed)
    assert torch.allclose(unpack(packed), full, rtol=1e-6, atol=1e-6)
    header = read_header(tmp_path / "x.safetensors").tensors
    assert header.keys() == state.keys()
    assert all((header[k].shape, header[k].nbytes) == (state[k].shape, state[k].nbytes) for k in state)
    assert all(weight.is_meta for weight in header.values())


def test_activations_are_packed_too_where_a_file_asks_for_it(tmp_path):
    def is_dynamic(tensors, metadata) -> bool:
        save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / "x.safetensors", metadata)
        weight = read_state(tmp_path / "x.safetensors")[W]
        assert isinstance(weight, Packed)
        return weight.dynamic

    asked = ["scale_weight of one axis", "comfy_quant", "metadata", "int8", "int8, nothing said", "int8 turned"]
    assert [name for name in asked if not is_dynamic(*DIALECTS[name][:2])] == []
    assert [name for name in ("plain", "scale_weight", "nvfp4 by ComfyUI") if is_dynamic(*DIALECTS[name][:2])] == []
    tensors = {W: Q, NAME + "weight_scale": SCALE}
    assert not is_dynamic(tensors, listed(**SAYS_FP8, full_precision_matrix_mult=True))


@pytest.mark.parametrize(
    ("tensors", "metadata", "said"),
    [
        ({W: Q}, listed(format="mxfp8"), "packed as mxfp8 and lacks its scales"),
        ({W: I8}, listed(format="int8_tensorwise"), "packed as int8_tensorwise and lacks its scales"),
        ({W: I8, NAME + "weight_scale": SCALE}, listed(**SAYS_FP8), "float8_e4m3fn in int8"),
        ({W: Q, NAME + "weight_scale": torch.ones(3)}, {}, r"scales of \(3,\) for 160 rows"),
        ({W: Q, NAME + "weight_scale": torch.ones(ROWS, 5)}, {}, "256 columns, which its scales do not divide"),
        ({W: Q, NAME + "comfy_quant": torch.zeros(3, dtype=torch.uint8)}, {}, "cannot be read"),
        ({W: Q}, {"_quantization_metadata": '{"layers": [1]}'}, "cannot be read"),
        ({W: NIBBLES, NAME + "weight_scale_2": SCALE}, {}, "lacks matching scales"),
        (
            {W: NIBBLES, NAME + "weight_scale": BLOCKS, NAME + "weight_scale_2": SCALE},
            listed(format="nvfp4"), "2560 block scales, 4096 were expected",
        ),
        ({W: I8, NAME + "weight_scale": SCALE}, listed(format="int8_tensorwise", convrot=True, convrot_groupsize=48),
         "in runs of 48"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_named_with_its_file(tmp_path, tensors, metadata, said):
    save_file({k: v.clone() for k, v in tensors.items()}, tmp_path / "x.safetensors", metadata)
    for read in (read_header, read_state):
        with pytest.raises(InputError, match=said) as caught:
            read(tmp_path / "x.safetensors")
        assert "x.safetensors" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "int8", "nf4", "int4"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_what_is_written_is_read_again(tmp_path, name, dynamic):
    dynamic = dynamic and name in ("e4m3", "int8")
    state = {W: pack(name, normal(ROWS, COLUMNS), dynamic), "norm.weight": torch.ones(3)}
    write_state(tmp_path / "x.safetensors", state, {"origin": "me"})
    back = read_state(tmp_path / "x.safetensors")
    packed = back[W]
    assert isinstance(packed, Packed)
    assert (packed.format, packed.dynamic, packed.shape) == (name, dynamic, (ROWS, COLUMNS))
    assert torch.equal(unpack(packed), unpack(state[W]))
    assert read_header(tmp_path / "x.safetensors").metadata["origin"] == "me"
    only = read_state(tmp_path / "x.safetensors", {W})
    assert list(only) == [W]
    assert torch.equal(unpack(only[W]), unpack(packed))
    files = write_state(tmp_path / "y.safetensors", state | {"other.weight": state[W]}, shard_bytes=1000)
    (tmp_path / "x.safetensors").unlink()
    assert len(files) == 3
    shards = read_state(tmp_path)
    assert torch.equal(unpack(shards["other.weight"]), unpack(packed))


def test_formats_of_gguf_are_not_written_to_safetensors(tmp_path):
    with pytest.raises(InputError, match=r"packed as q8_0, which is not written to safetensors: add --quant"):
        write_state(tmp_path / "x.safetensors", {W: pack("q8_0", normal(4, 256))})
    assert not list(tmp_path.iterdir())


# A model ------------------------------------------------------------------------------------------------------------


def quiet(model: inkstream.Model) -> torch.Tensor:
    request = inkstream.Request(prompt="a red ball", seed=1, steps=1)
    return model.decode(model.sample(request, model.encode(request)))


@pytest.mark.parametrize("fused", [True, False])
def test_a_model_in_fp8_draws_nearly_the_same_picture(tiny_folder, tmp_path, fused):
    """Every matrix in fp8 with a scale of its own, one a tensor: those of q, k and v become one weight with three."""
    folder = convert(tiny_folder, tmp_path / "m", "native" if fused else "diffusers")
    (file,) = list_weights(folder if fused else folder / "transformer")
    state, tensors, layers = read_state(file), {}, {}
    for name, weight in state.items():
        layer = name.removesuffix(".weight")
        if weight.ndim == 2 and layer != name and ("attention" in name or "feed_forward" in name):
            scale = weight.abs().max() / 448
            tensors |= {name: (weight / scale).to(E4M3), f"{layer}.weight_scale": scale}
            layers[layer] = SAYS_FP8
        else:
            tensors[name] = weight.clone()
    metadata = read_header(file).metadata | {"_quantization_metadata": json.dumps({"layers": layers})}
    save_file(tensors, file, metadata)
    model = inkstream.load(folder, inkstream.Machine("cpu"))
    qkv = model.family.transformer.layers[0].attention.qkv
    assert qkv.packed.format == "e4m3"
    assert len(set(qkv.packed.scales[0].flatten().tolist())) == (1 if fused else 3)
    error = (quiet(model) - quiet(inkstream.load(tiny_folder, inkstream.Machine("cpu")))).square().mean()
    assert 28 < -10 * error.log10() < 60  # PSNR in dB


def test_packed_norms_and_pads_are_read_in_full(tiny_folder, tmp_path):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "m"))
    (file,) = list_weights(folder / "transformer")
    save_file({name: tensor.to(E4M3) for name, tensor in read_state(file).items()}, file)
    transformer = inkstream.load(folder, inkstream.Machine("cpu", "fp32")).family.transformer
    assert transformer.x_pad_token.dtype == torch.float32
    assert transformer.layers[0].attention_norm1.weight.dtype == torch.float32
    assert transformer.x_embedder.packed.format == "e4m3"


def test_nobody_trains_packed_weights(tiny_folder, tmp_path):
    from inkstream.engine.files.sources import locate
    from inkstream.engine.machine.install import Placement
    from inkstream.engine.machine.loader import read

    folder = convert(tiny_folder, tmp_path / "m", quant="fp8")
    found = locate(folder).parts["transformer"]
    module = read(found, Placement(torch.device("cpu"), torch.float32, rules=found.rules), packed=False)
    assert all(tensor.dtype == torch.float32 for tensor in module.state_dict().values())
