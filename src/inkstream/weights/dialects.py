"""Packed weights in safetensors files: a tensor of numbers, with tensors of scales and format marks next to it.

Formats that can be read: plain fp8; fp8 with `scale_weight` (ComfyUI's earlier files); fp8, MXFP8, int8, int4 with
rotated rows and NVFP4 as named by `comfy_quant` or by the header's `_quantization_metadata`; MXFP8 and NVFP4 by
NVIDIA's Model Optimizer; bitsandbytes; nunchaku's SVDQuant. Files are written with `_quantization_metadata`, which
ComfyUI reads too, and with two formats of our own, nf4 and int4.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from inkstream.quant.packed import Packed, Weight
from inkstream.types import InputError
from inkstream.weights import bitsandbytes
from inkstream.weights.bitsandbytes import gather_bitsandbytes
from inkstream.weights.svdquant import gather_svdquant

METADATA = "_quantization_metadata"
"""Header key that holds the packing of each layer: {"format_version": "1.0", "layers": {name: {"format": ...}}}."""

MARK = ".comfy_quant"
"""Suffix of the small tensors that hold the same information for one layer."""

MARKS = (MARK, *bitsandbytes.MARKS)
"""Suffixes of all small tensors of JSON that say how a weight is packed (the format marks)."""

SCALES = (".scale_weight", ".weight_scale")
ROWS = ".SCB"
"""Suffix of bitsandbytes' scales of int8 rows: the largest magnitude of each row, which is stored as 127."""
IGNORED = (".scale_input", ".input_scale", ".weight_format", MARK)
"""Suffixes of tensors that are not used. Scales of activations are not needed: their range is measured at run time."""

FORMATS = {
    "float8_e4m3fn": "e4m3",
    "float8_e5m2": "e5m2",
    "int8_tensorwise": "int8",
    "mxfp8": "e4m3",
    "convrot_w4a4": "int4_low",
    "nvfp4": "nvfp4",
    "nf4": "nf4",
    "int4": "int4",
}
"""Format name in these files -> format name in `quant`. Only files written here use the last two."""

MXFP8_GROUP = 32
"""Numbers that share a scale, a power of two, in MXFP8."""

_NAMES = {ours: theirs for theirs, ours in FORMATS.items() if theirs not in ("mxfp8", "convrot_w4a4")}
E8M0 = torch.float8_e8m0fnu
_STORED = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "int8": torch.int8}
_BY_DTYPE = {dtype: name for name, dtype in _STORED.items()}


def gather(state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Weight]:
    """Replace the tensors of each packed weight in a file's state dict by one Packed, and drop its scales and marks.

    Works on meta tensors too, but the marks must have their data. Keys that are not known stay as they are. Raises
    InputError if a weight is packed in a way that is not supported.
    """
    said = _layers(state, metadata)
    fast = tuple(k.removesuffix("scaled_fp8") for k, t in state.items() if k.endswith("scaled_fp8") and t.numel() == 2)
    used: set[str] = set()
    out: dict[str, Weight] = {}
    state = gather_svdquant(state)
    for key, tensor in state.items():
        layer = key.removesuffix(".weight")
        if layer == key or tensor.ndim != 2:
            out[key] = tensor
            continue
        if (unpacked := gather_bitsandbytes(key, tensor, state)) is not None:
            out[key] = unpacked
            used.update(key + name for name in bitsandbytes.BESIDE)
            continue
        beside = {name: state[layer + name] for name in (*SCALES, ROWS, ".weight_scale_2") if layer + name in state}
        packed = _pack(layer, tensor, beside, said.get(layer), bool(fast) and layer.startswith(fast))
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
    """Return whether a safetensors file written here can hold the weight: GGUF's formats, NVFP4, MXFP8 cannot be."""
    if isinstance(weight, Tensor):
        return True
    return weight.format in _NAMES and len(weight.scales) < 2 and all(s.dtype != E8M0 for s in weight.scales)


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
    except (ValueError, TypeError, AttributeError, NotImplementedError, RecursionError) as error:
        raise InputError(f"the file's quantisation metadata cannot be read ({error}): download it again") from error
    return said


def _pack(
    layer: str, tensor: Tensor, beside: Mapping[str, Tensor], said: Mapping[str, Any] | None, fast: bool
) -> Packed | None:
    """Return the weight as a Packed; None if it is an ordinary tensor.

    fast: the file's `scaled_fp8` mark asks for matrix products in fp8 for all layers.
    """
    scale = next((beside[name] for name in SCALES if name in beside), None)
    if scale is None and ROWS in beside and tensor.dtype == torch.int8:
        scale = beside[ROWS].float() / 127
        said = {"format": "int8_tensorwise", "full_precision_matrix_mult": True}
    form = _format(layer, tensor, scale, ".weight_scale_2" in beside, said)
    if form is None:
        return None
    if scale is None and (_is_mxfp8(said) or form in ("int8", "int4_low")):
        name = said.get("format") if said else form
        raise InputError(f"{layer} is packed as {name} and lacks its scales: download the file again")
    rows, width = tensor.shape
    columns = width if form in _STORED else 2 * width
    scales: list[Tensor] = [] if scale is None else [scale]
    if form.startswith("nvfp4"):
        scale = scale.view(_STORED["e4m3"]) if scale is not None and scale.dtype == torch.uint8 else scale
        if scale is None or scale.dtype != _STORED["e4m3"] or ".weight_scale_2" not in beside or columns % 16:
            raise InputError(f"{layer} is packed as NVFP4 and lacks matching scales: download the file again")
        blocks = _unswizzle(layer, scale, rows, columns // 16) if form == "nvfp4" else scale
        scales = [blocks, beside[".weight_scale_2"]]
    elif scale is not None and (_is_mxfp8(said) or (form == "e4m3" and scale.dtype in (torch.uint8, E8M0))):
        scales = [_powers(layer, scale, rows, columns, _is_mxfp8(said))]
    scales = [_shaped(layer, each, rows) for each in scales]
    if any(columns % each.shape[1] for each in scales):
        raise InputError(
            f"{layer} has {columns} columns, which its scales do not divide evenly: download the file again"
        )
    rotated, dynamic = 0, fast or form == "int8"
    if said is not None:
        dynamic = said.get("activations") == "dynamic" or not said.get("full_precision_matrix_mult")
        turned = said.get("convrot") or form == "int4_low"
        rotated = int(said.get("convrot_groupsize", 256)) if turned else 0
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
        if form is None or tensor.dtype != (torch.int8 if form == "int4_low" else _STORED.get(form, torch.uint8)):
            kind = f"{said.get('format')} in {str(tensor.dtype).removeprefix('torch.')}"
            raise InputError(f"{layer} is packed as {kind}, which is not supported: take another file of the model")
        return form
    if tensor.dtype == torch.uint8:
        return "nvfp4_low" if has_second else None
    return None if tensor.dtype == torch.int8 and scale is None else _BY_DTYPE.get(tensor.dtype)


def _is_mxfp8(said: Mapping[str, Any] | None) -> bool:
    return said is not None and said.get("format") == "mxfp8"


def _powers(layer: str, scale: Tensor, rows: int, columns: int, is_tiled: bool) -> Tensor:
    """MXFP8's scales, powers of two, (rows, groups). is_tiled: they are in ComfyUI's tiles for the tensor cores."""
    if scale.element_size() != 1 or columns % MXFP8_GROUP:
        raise InputError(f"{layer} is packed as MXFP8 and lacks matching scales: download the file again")
    scale = scale.view(E8M0)
    return _unswizzle(layer, scale, rows, columns // MXFP8_GROUP) if is_tiled else scale


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
            f"{layer} has {scale.numel()} block scales, {high * wide * 512} were expected: download the file again"
        )
    if scale.is_meta:
        return scale.new_empty(rows, columns)
    tiles = scale.reshape(-1).view(torch.uint8).view(high, wide, 32, 4, 4)
    whole = tiles.permute(0, 3, 2, 1, 4).reshape(high * 128, wide * 4)
    return whole[:rows, :columns].contiguous().view(scale.dtype)
