"""Packed weights in safetensors files: a tensor of numbers, with tensors of scales and format marks next to it.

Formats that can be read: plain fp8; fp8 with `scale_weight` (ComfyUI's earlier files); fp8, int8 and NVFP4 as named by
`comfy_quant` or by the header's `_quantization_metadata`; NVFP4 by NVIDIA's Model Optimizer. Files are written with
`_quantization_metadata`, which ComfyUI reads too, and with two formats of our own, nf4 and int4.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from inkstream.quant.packed import Packed, Weight
from inkstream.types import InputError

METADATA = "_quantization_metadata"
"""Header key that holds the packing of each layer: {"format_version": "1.0", "layers": {name: {"format": ...}}}."""

MARK = ".comfy_quant"
"""Suffix of the small tensors that hold the same information for one layer (the format marks)."""

SCALES = (".scale_weight", ".weight_scale")
IGNORED = (".scale_input", ".input_scale", MARK)
"""Suffixes of tensors that are not used. Scales of activations are not needed: their range is measured at run time."""

FORMATS = {
    "float8_e4m3fn": "e4m3",
    "float8_e5m2": "e5m2",
    "int8_tensorwise": "int8",
    "nvfp4": "nvfp4",
    "nf4": "nf4",
    "int4": "int4",
}
"""Format name in these files -> format name in `quant`. Only files written here use the last two."""

_NAMES = {ours: theirs for theirs, ours in FORMATS.items()}
_STORED = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "int8": torch.int8}
_BY_DTYPE = {dtype: name for name, dtype in _STORED.items()}


def gather(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Weight]:
    """Replace the tensors of each packed weight in a file's state dict by one Packed, and drop its scales and marks.

    Works on meta tensors too, but the marks must have their data. Keys that are not known stay as they are. Raises
    InputError if a weight is packed in a way that is not supported.
    """
    said = _layers(state, metadata)
    fast = any(key.endswith("scaled_fp8") and tensor.numel() == 2 for key, tensor in state.items())
    used: set[str] = set()
    out: dict[str, Weight] = {}
    for key, tensor in state.items():
        layer = key.removesuffix(".weight")
        if layer == key or tensor.ndim != 2:
            out[key] = tensor
            continue
        beside = {name: state[layer + name] for name in (*SCALES, ".weight_scale_2") if layer + name in state}
        packed = _pack(layer, tensor, beside, said.get(layer), fast)
        out[key] = tensor if packed is None else packed
        if packed is not None:
            used.update(layer + name for name in (*beside, *IGNORED))
    return {key: weight for key, weight in out.items() if key not in used and not key.endswith("scaled_fp8")}


def spell(name: str, weight: Weight) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Return the tensors that store one weight in a file, and the entry of its layer in the header's metadata.

    Raises InputError if safetensors files cannot hold the weight's format.
    """
    if isinstance(weight, Tensor):
        return {name: weight}, {}
    if not is_spelt(weight):
        raise InputError(f"{name} is packed as {weight.format}, which is not written to safetensors: add --quant KIND")
    layer = name.removesuffix(".weight")
    says: dict[str, Any] = {"format": _NAMES[weight.format]}
    if not weight.dynamic or weight.format == "e4m3":  # without this key ComfyUI packs activations with a scale of 1
        says["full_precision_matrix_mult"] = True
    if weight.dynamic:
        says["activations"] = "dynamic"
    if weight.rotated:
        says |= {"convrot": True, "convrot_groupsize": weight.rotated}
    stored = weight.data.view(_STORED[weight.format]) if weight.format in _STORED else weight.data
    tensors = {name: stored} | {f"{layer}.weight_scale": scale for scale in weight.scales}
    return tensors, {layer: says}


def is_spelt(weight: Weight) -> bool:
    """Return whether a safetensors file written here can hold the weight: GGUF's formats and NVFP4 are not possible."""
    return isinstance(weight, Tensor) or (weight.format in _NAMES and len(weight.scales) < 2)


def _layers(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Mapping[str, Mapping[str, Any]]:
    """Return layer -> its packing, from the header and the marks.

    Layer names in the metadata may lack the prefix that all tensors have.
    """
    said: dict[str, Any] = {}
    try:
        listed = json.loads(metadata.get(METADATA, "{}")).get("layers", {})
        prefixes = {key[: key.find("diffusion_model.") + 16] for key in state if "diffusion_model." in key} or {""}
        for name, entry in listed.items():
            said |= {prefix + name: entry for prefix in ("", *prefixes)}
        for key, tensor in state.items():
            if key.endswith(MARK):
                said[key.removesuffix(MARK)] = json.loads(bytes(tensor.tolist()).rstrip(b"\0"))
        if not all(isinstance(entry, dict) for entry in said.values()):
            raise TypeError("an entry is not an object")
    except (ValueError, TypeError, AttributeError, NotImplementedError) as error:
        raise InputError(f"the file's quantisation metadata cannot be read ({error}): download it again") from error
    return said


def _pack(
    layer: str, tensor: Tensor, beside: Mapping[str, Tensor], said: Mapping[str, Any] | None, fast: bool
) -> Packed | None:
    """Return the weight as a Packed; None if it is an ordinary tensor.

    fast: the file's `scaled_fp8` mark asks for matrix products in fp8 for all layers.
    """
    scale = next((beside[name] for name in SCALES if name in beside), None)
    form = _format(layer, tensor, scale, ".weight_scale_2" in beside, said)
    if form is None:
        return None
    rows, width = tensor.shape
    columns = width if form in _STORED else 2 * width
    scales: list[Tensor] = [] if scale is None else [scale]
    if form.startswith("nvfp4"):
        if scale is None or ".weight_scale_2" not in beside or columns % 16:
            raise InputError(f"{layer} is packed as NVFP4 and lacks matching scales: download the file again")
        blocks = _unswizzle(layer, scale, rows, columns // 16) if form == "nvfp4" else scale
        scales = [blocks, beside[".weight_scale_2"]]
    scales = [_shaped(layer, each, rows) for each in scales]
    if any(columns % each.shape[1] for each in scales):
        raise InputError(
            f"{layer} has {columns} columns, which its scales do not divide evenly: download the file again"
        )
    rotated, dynamic = 0, fast or form == "int8"
    if said is not None:
        dynamic = said.get("activations") == "dynamic" or not said.get("full_precision_matrix_mult")
        rotated = int(said.get("convrot_groupsize", 256)) if said.get("convrot") else 0
    if rotated and (rotated not in (4, 16, 64, 256, 1024) or columns % rotated):
        raise InputError(
            f"{layer} has {columns} columns rotated in runs of {rotated}, which is not supported: take another file"
        )
    dynamic = dynamic and form in ("e4m3", "int8")
    return Packed(form, tensor.view(torch.uint8), (rows, columns), tuple(scales), rotated, dynamic)


def _format(
    layer: str, tensor: Tensor, scale: Tensor | None, has_second: bool, said: Mapping[str, Any] | None
) -> str | None:
    """Return the format of a packed weight; None if it is not packed. Raises InputError if it is not supported."""
    if tensor.dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return None
    if said is not None:
        form = FORMATS.get(str(said.get("format")))
        if form is None or tensor.dtype != _STORED.get(form, torch.uint8):
            kind = f"{said.get('format')} in {str(tensor.dtype).removeprefix('torch.')}"
            raise InputError(f"{layer} is packed as {kind}, which is not supported: take another file of the model")
        return form
    if tensor.dtype == torch.uint8:
        return "nvfp4_low" if has_second else None
    return None if tensor.dtype == torch.int8 and scale is None else _BY_DTYPE.get(tensor.dtype)


def _shaped(layer: str, scale: Tensor, rows: int) -> Tensor:
    """Bring scales of shape (), (1,), (rows,) or (rows, groups) to the shape (1 or rows, groups)."""
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.ndim in (1, 2) and len(scale) == rows:
        return scale.reshape(rows, -1)
    raise InputError(f"{layer} has scales of {tuple(scale.shape)} for {rows} rows: download the file again")


def _unswizzle(layer: str, scale: Tensor, rows: int, columns: int) -> Tensor:
    """Reorder scales from ComfyUI's tiles of 128 x 4, made for the tensor cores, to (rows, columns).

    Within a tile the scale of (row, column) is at the position row % 32 * 16 + row // 32 * 4 + column.
    """
    high, wide = -(-rows // 128), -(-columns // 4)
    if scale.numel() != high * wide * 512:
        raise InputError(
            f"{layer} has {scale.numel()} scales of NVFP4, {high * wide * 512} were expected: download the file again"
        )
    if scale.is_meta:
        return scale.new_empty(rows, columns)
    tiles = scale.reshape(-1).view(torch.uint8).view(high, wide, 32, 4, 4)
    whole = tiles.permute(0, 3, 2, 1, 4).reshape(high * 128, wide * 4)
    return whole[:rows, :columns].contiguous().view(scale.dtype)
