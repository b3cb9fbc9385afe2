"""`Packed` is a quantised weight as its file stores it. `unpack` dequantises it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

from inkstream.quant import ggml, small
from inkstream.types import InputError

CHUNK = 1 << 19
"""Numbers unpacked at a time on a CPU: about as many as fit its caches. Other devices take 16 times as many."""


@dataclass(frozen=True)
class Format:
    """A number format: the size of its blocks and the function that dequantises them."""

    numbers: int  # numbers in a block
    bytes: int  # bytes of a block
    unpack: Callable[[Tensor], Tensor]  # blocks (N, bytes) uint8 -> (N, numbers) float32
    group: int = 0  # numbers of a row that share one scale of `Packed.scales` when packed here; 0: the whole row


FORMATS: dict[str, Format] = {
    "q8_0": Format(32, 34, ggml.unpack_q8_0),
    "q6_k": Format(256, 210, ggml.unpack_q6_k),
    "q5_k": Format(256, 176, ggml.unpack_q5_k),
    "q5_1": Format(32, 24, ggml.unpack_q5_1),
    "q5_0": Format(32, 22, ggml.unpack_q5_0),
    "q4_k": Format(256, 144, ggml.unpack_q4_k),
    "q4_1": Format(32, 20, ggml.unpack_q4_1),
    "q4_0": Format(32, 18, ggml.unpack_q4_0),
    "q3_k": Format(256, 110, ggml.unpack_q3_k),
    "q2_k": Format(256, 84, ggml.unpack_q2_k),
    "iq4_nl": Format(32, 18, ggml.unpack_iq4_nl),
    "iq4_xs": Format(256, 136, ggml.unpack_iq4_xs),
    "e4m3": Format(1, 1, small.unpack_e4m3),
    "e5m2": Format(1, 1, small.unpack_e5m2),
    "int8": Format(1, 1, small.unpack_int8),
    "nf4": Format(2, 1, small.unpack_nf4, 64),
    "int4": Format(2, 1, small.unpack_int4, 64),
    "int4_low": Format(2, 1, small.unpack_int4_low),
    "nvfp4": Format(2, 1, small.unpack_fp4, 16),
    "nvfp4_low": Format(2, 1, small.unpack_fp4_low, 16),
}
"""Name -> format. Names that begin with q or iq are GGUF's; the others have their scales in separate tensors."""

GGUF = tuple(name for name in FORMATS if name.startswith("q"))
"""GGUF's formats that are written here. Those that begin with iq are only read."""


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight of `shape` in a packed format. It has the methods of a tensor that key tables use."""

    format: str  # a key of FORMATS
    data: Tensor  # (rows, bytes of a row) uint8; rows is shape[0], or 1 where a block spans rows
    shape: tuple[int, ...]
    scales: tuple[Tensor, ...] = ()  # each (rows or 1, groups of a row or 1), float; numbers are scaled by the product
    rotated: int = 0  # length of the runs of a row that were rotated by a Hadamard matrix before packing; 0: none
    dynamic: bool = False  # activations may be quantised at run time too, if the hardware can multiply the format

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + sum(scale.nbytes for scale in self.scales)

    @property
    def is_meta(self) -> bool:
        return self.data.is_meta

    @property
    def device(self) -> torch.device:
        return self.data.device

    def to(self, device: torch.device | str) -> Packed:
        return replace(self, data=self.data.to(device), scales=tuple(scale.to(device) for scale in self.scales))


Weight = Tensor | Packed
WeightT = TypeVar("WeightT", Tensor, Packed)


def unpack(packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
    """Dequantise a weight in float32 and round it to `dtype`, on the weight's device."""
    if packed.is_meta:
        return torch.empty(packed.shape, dtype=dtype, device="meta")
    form = FORMATS[packed.format]
    rows, width = packed.data.shape
    columns = width // form.bytes * form.numbers
    step = max(1, (CHUNK if packed.device.type == "cpu" else 16 * CHUNK) // columns)
    scale = _product(packed.scales)
    out = torch.empty(rows, columns, dtype=dtype, device=packed.device)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        numbers = form.unpack(packed.data[part].reshape(-1, form.bytes)).view(-1, columns)
        if scale is not None:
            own = scale if len(scale) == 1 else scale[part]  # (n or 1, groups)
            numbers = numbers.unflatten(1, (own.shape[1], -1)).mul_(own.unsqueeze(-1)).flatten(1)
        out[part] = small.rotate(numbers, packed.rotated) if packed.rotated else numbers
    return out.view(packed.shape)


def cut(weight: Weight, heights: Sequence[int]) -> tuple[Weight, ...]:
    """Cut a weight along the rows into blocks of these heights. Returns views.

    Raises InputError if a block of the format spans several rows.
    """
    if isinstance(weight, Tensor):
        return weight.split(list(heights))
    if len(weight.data) != len(weight):
        raise InputError(f"rows of {weight.shape} packed as {weight.format} cannot be separated: take another file")
    data = weight.data.split(list(heights))
    scales = [[s] * len(heights) if len(s) == 1 else s.split(list(heights)) for s in weight.scales]
    return tuple(
        replace(weight, data=data[i], shape=(height, *weight.shape[1:]), scales=tuple(s[i] for s in scales))
        for i, height in enumerate(heights)
    )


def join(weights: Sequence[Weight]) -> Weight:
    """Concatenate weights along the rows. They stay packed if all are packed alike; otherwise all are unpacked."""
    first = weights[0]
    rows = sum(len(weight) for weight in weights)
    packed = [weight for weight in weights if isinstance(weight, Packed)]
    if not packed or len({_likeness(weight) for weight in weights}) > 1:
        full = [weight.dtype for weight in weights if isinstance(weight, Tensor)] or [torch.bfloat16]
        tensors = [unpack(weight, full[0]) if isinstance(weight, Packed) else weight for weight in weights]
        return _cat(tensors, rows)
    assert isinstance(first, Packed)
    data = _cat([weight.data for weight in packed], rows)
    scales = zip(*([s.expand(len(weight), -1) for s in weight.scales] for weight in packed))
    joined = tuple(_cat(each, rows) for each in scales)
    dynamic = all(weight.dynamic for weight in packed)
    return replace(first, data=data, shape=(rows, *first.shape[1:]), scales=joined, dynamic=dynamic)


def take_rows(weight: WeightT, runs: Sequence[tuple[int, int]]) -> WeightT:
    """Return these runs of rows, concatenated; a view if there is one run. runs: (start, stop) of each, ascending."""
    ends = [0, *(end for run in runs for end in run), len(weight)]
    pieces = cut(weight, [b - a for a, b in pairwise(ends)])[1::2]
    return pieces[0] if len(pieces) == 1 else join(pieces)  # type: ignore[return-value]


def take_columns(weight: WeightT, runs: Sequence[tuple[int, int]]) -> WeightT:
    """Return these runs of columns, concatenated. Raises InputError if a packed weight cannot be cut there."""
    if isinstance(weight, Tensor):
        pieces = [weight[:, start:stop] for start, stop in runs]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)
    form, width = FORMATS[weight.format], weight.shape[1]
    groups = [width // scale.shape[1] for scale in weight.scales if scale.shape[1] > 1]
    unit = math.lcm(form.numbers, *groups, weight.rotated or 1)
    if any(end % unit for run in runs for end in run):
        raise InputError(
            f"weights packed as {weight.format} can be cut only at multiples of {unit} columns, not at "
            f"{' and '.join(f'{a} to {b}' for a, b in runs)}: take the bf16 file"
        )

    def take(tensor: Tensor) -> Tensor:
        """Return the columns that belong to the runs. The tensor may be narrower than the weight."""
        return torch.cat([tensor[:, a * tensor.shape[1] // width : b * tensor.shape[1] // width] for a, b in runs], 1)

    scales = tuple(take(scale) if scale.shape[1] > 1 else scale for scale in weight.scales)
    return replace(weight, data=take(weight.data), shape=(len(weight), sum(b - a for a, b in runs)), scales=scales)


def reorder(weight: Weight, index: Tensor) -> Weight:
    """Return the rows of a weight in another order. index: (rows,). Raises InputError if a block spans rows."""
    if weight.is_meta:
        return weight
    index = index.to(weight.device)
    if isinstance(weight, Tensor):
        return weight[index]
    if len(weight.data) != len(weight):
        raise InputError(f"rows of {weight.shape} packed as {weight.format} cannot be separated: take another file")
    scales = tuple(scale if len(scale) == 1 else rows_of(scale, index) for scale in weight.scales)
    return replace(weight, data=weight.data[index], scales=scales)


def rows_of(scale: Tensor, at: Tensor) -> Tensor:
    """Return the scales of some rows. Torch cannot index 8-bit floats, so they are indexed as bytes."""
    return scale.view(torch.uint8)[at].view(scale.dtype) if scale.dtype.itemsize == 1 else scale[at]


def _likeness(weight: Weight) -> tuple[object, ...]:
    """Return a key. Packed weights with equal keys can be joined by concatenating their bytes."""
    if isinstance(weight, Tensor):
        return ()
    scales = tuple((scale.shape[1], scale.dtype) for scale in weight.scales)
    cuttable = len(weight.data) == len(weight)
    return (weight.format, weight.shape[1:], weight.data.shape[1], scales, weight.rotated, cuttable or id(weight))


def _cat(tensors: Sequence[Tensor], rows: int) -> Tensor:
    """Concatenate along the rows. On meta this avoids torch.cat, which would import torch's tracer, a slow import."""
    if tensors[0].is_meta:
        return tensors[0].new_empty(rows, *tensors[0].shape[1:])
    return torch.cat(list(tensors))


def _product(scales: Sequence[Tensor]) -> Tensor | None:
    """Return the product of all scales, (rows or 1, groups or 1) float32; None if there are no scales."""
    product = None
    for scale in scales:
        product = scale.float() if product is None else product * scale.float()
    return product
