"""Weights that bitsandbytes packed: NF4 and FP4 with a scale for each block, which may be packed too, and LLM.int8.

Beside `L.weight` are `absmax` (the scales), `quant_map` (the 16 values) and `quant_state.bitsandbytes__nf4`, JSON with
the shape. With double quantisation, scales are 8-bit numbers with `nested_absmax` and `nested_quant_map`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from inkstream.quant.packed import Packed, Weight
from inkstream.quant.small import NF4
from inkstream.types import InputError

MARKS = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")
BESIDE = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *MARKS)
"""What follows the weight's name in the names of the tensors beside it."""


def gather_bitsandbytes(key: str, tensor: Tensor, state: Mapping[str, Tensor]) -> Weight | None:
    """A weight of 4 bits; None if it is not one of bitsandbytes. NF4 in whole rows stays packed.

    Works on meta tensors too, but the marks must have their data. Raises InputError if its tensors do not belong
    together.
    """
    mark = next((mark for mark in MARKS if key + mark in state), None)
    if mark is None:
        return None
    try:
        return _unpacked(key, tensor, state, json.loads(bytes(state[key + mark].tolist())), mark.endswith("nf4"))
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, RuntimeError, NotImplementedError, OverflowError) as error:
        raise InputError(f"{key} is packed by bitsandbytes and cannot be read ({error}): download it again") from error


def _unpacked(key: str, tensor: Tensor, state: Mapping[str, Tensor], said: Mapping[str, Any], is_nf4: bool) -> Weight:
    rows, columns = said["shape"]
    block = said["blocksize"]
    if not all(isinstance(n, int) and n > 0 for n in (rows, columns, block)) or rows * columns != 2 * tensor.numel():
        raise ValueError(f"{rows} x {columns} numbers in blocks of {block} are not {tensor.numel()} bytes")
    if tensor.dtype != torch.uint8 or math.prod(state[key + ".quant_map"].shape) != 16:
        raise ValueError(f"{tensor.dtype} with {tuple(state[key + '.quant_map'].shape)} values")
    scales = _scales(key, state, said, -(-rows * columns // block))
    data = tensor.reshape(rows, -1) if columns % 2 == 0 else tensor.flatten()
    values = state[key + ".quant_map"].flatten().float()
    if is_nf4 and columns % block == 0 and columns % 2 == 0:
        if not values.is_meta and not torch.allclose(values, torch.tensor(NF4), atol=1e-3):
            raise ValueError("its values are not NF4's")
        return Packed("nf4", data, (rows, columns), (scales.view(rows, -1),))
    dtype = {"float16": torch.float16, "float32": torch.float32}.get(str(said.get("dtype")), torch.bfloat16)
    if tensor.is_meta:
        return tensor.new_empty(rows, columns, dtype=dtype)
    codes = torch.stack((data >> 4, data & 15), -1).flatten()
    return (values[codes.int()] * scales.repeat_interleave(block)[: len(codes)]).view(rows, columns).to(dtype)


def _scales(key: str, state: Mapping[str, Tensor], said: Mapping[str, Any], blocks: int) -> Tensor:
    """The scales of all blocks, float32."""
    absmax = state[key + ".absmax"].flatten()
    if len(absmax) != blocks:
        raise ValueError(f"{len(absmax)} scales for {blocks} blocks")
    if key + ".nested_absmax" not in state:
        return absmax.float()
    nested, values = state[key + ".nested_absmax"].flatten(), state[key + ".nested_quant_map"].flatten()
    size, offset = said["nested_blocksize"], float(said["nested_offset"])
    if not isinstance(size, int) or size < 1 or len(nested) != -(-blocks // size) or len(values) != 256:
        raise ValueError(f"{len(nested)} scales for {blocks} scales in blocks of {size}")
    if absmax.is_meta:
        return absmax.new_empty(blocks, dtype=torch.float32)
    if absmax.dtype != torch.uint8:
        raise ValueError(f"its scales are {absmax.dtype}")
    return values.float()[absmax.int()] * nested.float().repeat_interleave(size)[:blocks] + offset
