"""nunchaku's files: SVDQuant matrices of 4 bits beside a low-rank branch in 16, and AWQ matrices for modulations.

A SVDQuant layer computes `(x / smooth) @ quantised.T + x @ down.T @ up.T + bias`. Here it becomes one matrix and its
bias, in the dtype of the low-rank branch: 4-bit products of activations are not used.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from inkstream.quant.svdquant import (
    DEPTH,
    GROUP,
    PACK,
    SHIFT,
    SMALL_GROUP,
    TILE,
    unpack_awq,
    unpack_codes,
    unpack_down,
    unpack_residual,
    unpack_scales,
    unpack_small_scales,
    unpack_up,
    unpack_vector,
)
from inkstream.types import InputError

NAMES = {
    "qweight": "qweight", "wscales": "wscales", "wzeros": "wzeros", "wcscales": "wcscales", "wtscale": "wtscale",
    "smooth": "smooth", "smooth_factor": "smooth", "smooth_orig": "", "smooth_factor_orig": "",
    "lora_down": "down", "proj_down": "down", "lora_up": "up", "proj_up": "up", "bias": "bias",
}  # fmt: skip
"""Last words of a layer's tensors, in earlier and later files -> what they are; "" is not used."""

AFTER_GELU = (".mlp_fc2", ".mlp_context_fc2", ".ff.net.2", ".ff_context.net.2")
"""FLUX.1's layers that read a GELU's output. INT4 files have the kernels' SHIFT in the biases of these layers."""


def gather_svdquant(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace the tensors of each SVDQuant and AWQ layer by its weight and bias. Works on meta tensors too.

    Raises InputError if the shapes of a layer's tensors do not belong together.
    """
    layers = {key.removesuffix(".qweight") for key in state if key.endswith(".qweight")}
    layers = {layer for layer in layers if f"{layer}.wscales" in state}
    parts: dict[str, dict[str, Tensor]] = {layer: {} for layer in layers}
    out: dict[str, Tensor] = {}
    for key, tensor in state.items():
        layer, _, name = key.rpartition(".")
        if layer not in layers or name not in NAMES:
            out[key] = tensor
        elif NAMES[name]:
            parts[layer][NAMES[name]] = tensor
    for layer, own in parts.items():
        weight, bias = _awq(layer, own) if "wzeros" in own else _svdquant(layer, own)
        out[f"{layer}.weight"] = weight
        if bias is not None:
            out[f"{layer}.bias"] = bias
    return out


def _svdquant(layer: str, own: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    qweight, scales = own["qweight"], own["wscales"]
    floats = scales.dtype == torch.float8_e4m3fn
    rows, columns = (len(qweight), 2 * qweight.shape[1]) if qweight.ndim == 2 else (0, 0)
    rank = own["up"].shape[1] if "up" in own and own["up"].ndim == 2 else 0
    group = SMALL_GROUP if floats else GROUP
    shapes: dict[str, tuple[int, ...]] = {
        "qweight": (rows, columns // 2), "wscales": (columns // group, rows), "wcscales": (rows,),
        "smooth": (columns,), "down": (columns, rank), "up": (rows, rank), "bias": (rows,),
        "wtscale": () if "wtscale" in own and own["wtscale"].ndim == 0 else (1,),
    }  # fmt: skip
    whole = rows and rows % TILE == 0 and columns % TILE == 0 and rank % PACK == 0 and columns % DEPTH == 0
    numbers = all(own[name].is_floating_point() for name in own if name != "qweight")
    if not whole or not numbers or ("down" in own) != ("up" in own) or qweight.dtype not in (torch.int8, torch.uint8):
        raise InputError(f"{layer} is packed as SVDQuant with matrices that do not fill its tiles: download it again")
    _check(layer, "SVDQuant", own, shapes)
    dtype = own["up"].dtype if rank else torch.bfloat16
    if qweight.is_meta:
        return qweight.new_empty(rows, columns, dtype=dtype), own.get("bias")
    unpacked = unpack_small_scales(scales) if floats else unpack_scales(scales)
    weight = unpack_residual(unpack_codes(qweight), unpacked, floats)
    if "wcscales" in own:
        weight *= unpack_vector(own["wcscales"]).float().unsqueeze(1)
    if "wtscale" in own:
        weight *= own["wtscale"].float()
    if "smooth" in own:
        weight /= unpack_vector(own["smooth"]).float()
    bias = unpack_vector(own["bias"]) if "bias" in own else None
    if bias is not None and not floats and layer.endswith(AFTER_GELU):
        bias = (bias.float() + SHIFT * weight.sum(1)).to(bias.dtype)
    if rank:
        weight.addmm_(unpack_up(own["up"]).float(), unpack_down(own["down"]).float())
    return weight.to(dtype), bias


def _awq(layer: str, own: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """An AWQ layer. FLUX.1's modulations have the 3 or 6 numbers of a feature together, and 1 added to the scales."""
    qweight = own["qweight"]
    rows, columns = (4 * len(qweight), 2 * qweight.shape[1]) if qweight.ndim == 2 else (0, 0)
    groups = len(own["wscales"]) if own["wscales"].ndim else 0
    numbers = all(own[name].is_floating_point() for name in own if name != "qweight")
    if not rows or not numbers or columns % GROUP or groups < columns // GROUP or qweight.dtype != torch.int32:
        raise InputError(f"{layer} is packed as AWQ with matrices that do not fill its tiles: download it again")
    _check(layer, "AWQ", own, {"wscales": (groups, rows), "wzeros": (groups, rows), "bias": (rows,)})
    dtype, bias = own["wscales"].dtype, own.get("bias")
    if qweight.is_meta:
        return qweight.new_empty(rows, columns, dtype=dtype), bias
    weight = unpack_awq(qweight, own["wscales"], own["wzeros"])
    kinds, rest = divmod(rows, columns)
    if kinds in (3, 6) and not rest:
        weight = weight.view(columns, kinds, columns).transpose(0, 1).reshape(rows, columns)
        if bias is not None:
            bias = bias.view(columns, kinds).t().clone()
            bias[[1, 4] if kinds == 6 else [1]] -= 1  # shift, scale, gate; twice where there are 6
            bias = bias.flatten()
    return weight.to(dtype), bias


def _check(layer: str, kind: str, own: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if name in own and tuple(own[name].shape) != shape:
            raise InputError(
                f"{layer} is packed as {kind} and its {name} is {tuple(own[name].shape)}, expected {shape}: "
                "download the file again"
            )
