"""Layers with packed (quantised) weights: dequantised at use, or multiplied in 8 bits where the hardware can."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inkstream.nn.gpu import kernels_for
from inkstream.quant.packed import CHUNK, Packed, Weight, rows_of, unpack
from inkstream.quant.small import rotate

E4M3 = torch.float8_e4m3fn
E4M3_MOST = torch.finfo(E4M3).max
FEWEST_ROWS = 17
"""The fewest rows that `torch._int_mm` takes on GPUs."""


class Rounded(NamedTuple):
    """Rows already rounded to 8 bits, for a `PackedLinear` that multiplies 8-bit numbers."""

    dtype: torch.dtype  # of the original rows and of the product
    numbers: Tensor  # (N, I) e4m3 or int8
    scale: Tensor  # (N, 1) float32, the factor of each row


@dataclass(frozen=True)
class Outline:
    """Shape, dtype and device of a weight that is not stored in full."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class PackedWeight(nn.Module):
    """A packed weight stored as buffers, so that it moves between devices and is saved with its module."""

    data: Tensor

    def __init__(self, packed: Packed, dtype: torch.dtype):
        """dtype: the default dtype to dequantise to."""
        super().__init__()
        self.dtype = dtype
        self._like = replace(packed, data=torch.empty(0), scales=())
        self.register_buffer("data", packed.data)
        self._scales = [scale.dtype for scale in packed.scales]
        for i, scale in enumerate(packed.scales):  # stored as bytes, so that Module.to(dtype) does not round them
            self.register_buffer(f"scale_{i}", scale.contiguous().view(torch.uint8))

    @property
    def packed(self) -> Packed:
        scales = tuple(getattr(self, f"scale_{i}").view(dtype) for i, dtype in enumerate(self._scales))
        return replace(self._like, data=self.data, scales=scales)

    @property
    def weight(self) -> Outline:
        """Shape, dtype and device, for callers that read these from `layer.weight`."""
        return Outline(self._like.shape, self.dtype, self.data.device)

    def extra_repr(self) -> str:
        return f"{self._like.format}, {self._like.shape}"


class PackedLinear(PackedWeight):
    """Like nn.Linear, with a packed weight. It computes in the dtype of its input."""

    def __init__(self, packed: Packed, bias: nn.Parameter | None, dtype: torch.dtype):
        super().__init__(packed, dtype)
        self.out_features, self.in_features = packed.shape
        self.bias = bias

    def forward(self, x: Tensor | Rounded) -> Tensor:  # (..., in_features) -> (..., out_features)
        packed = self.packed
        if isinstance(x, Rounded):
            return multiply_rounded(x, packed, self.bias)
        if packed.dynamic and not torch.is_grad_enabled():
            rows = x.reshape(-1, self.in_features)
            for possible, multiply in ((multiplies_int8, multiply_int8), (multiplies_fp8, multiply_fp8)):
                if possible(packed, rows):
                    return multiply(rows, packed, self.bias).view(*x.shape[:-1], self.out_features)
        return F.linear(x, unpack(packed, x.dtype), self.bias)


class PackedEmbedding(PackedWeight):
    """Like nn.Embedding, with a packed weight. Only the rows that are looked up are dequantised."""

    def forward(self, ids: Tensor) -> Tensor:  # integers (...) -> (..., D)
        packed, at = self.packed, ids.flatten()
        scales = tuple(s if len(s) == 1 else rows_of(s, at) for s in packed.scales)
        rows = replace(packed, data=packed.data[at], shape=(len(at), packed.shape[1]), scales=scales)
        return unpack(rows, self.dtype).view(*ids.shape, -1)


def full_weight(layer: nn.Module) -> Tensor:
    """A layer's weight, dequantised if it is packed."""
    return unpack(layer.packed, layer.dtype) if isinstance(layer, PackedWeight) else layer.get_parameter("weight")


def takes_packed(module: nn.Module, key: str, weight: Packed) -> bool:
    """Whether the layer that owns this key of the module's state dict can hold its weight packed."""
    owner, _, name = key.rpartition(".")
    layer = module.get_submodule(owner)
    whole_rows = len(weight.data) == len(weight)
    return name == "weight" and whole_rows and weight.ndim == 2 and type(layer) in (nn.Linear, nn.Embedding)


def place(module: nn.Module, state: Mapping[str, Weight], dtype: torch.dtype) -> dict[str, Tensor]:
    """Replaces layers whose weight is packed in the state, and returns the tensors for the module to load.

    Packed weights that no layer can hold are dequantised to dtype, the module's compute dtype.
    """
    out: dict[str, Tensor] = {}
    for key, weight in state.items():
        if isinstance(weight, Tensor):
            out[key] = weight
        elif not takes_packed(module, key, weight):
            out[key] = unpack(weight, dtype)
        else:
            owner, _, _ = key.rpartition(".")
            above, _, name = owner.rpartition(".")
            layer = module.get_submodule(owner)
            new = _hold(weight, layer, dtype)
            setattr(module.get_submodule(above), name, new)
            out |= {f"{owner}.{name}": buffer for name, buffer in new.named_buffers()}
    return out


def _hold(weight: Packed, layer: nn.Module, dtype: torch.dtype) -> PackedWeight:
    """The packed layer that replaces a layer."""
    return PackedLinear(weight, layer.bias, dtype) if isinstance(layer, nn.Linear) else PackedEmbedding(weight, dtype)


# Products in 8 bits -------------------------------------------------------------------------------------------------


def multiplies_int8(packed: Packed, x: Tensor) -> bool:
    """Whether `multiply_int8` can run: int8 weights with one scale a row, and hardware with int8 products."""
    if packed.format != "int8" or any(scale.shape[1] > 1 for scale in packed.scales):
        return False
    if not has_int8(x.device):
        return False
    sides = packed.shape[0] % 8 == 0 and packed.shape[1] % 8 == 0
    return x.device.type == "cpu" or (len(x) >= FEWEST_ROWS and sides)


@lru_cache
def has_int8(device: torch.device) -> bool:
    """Whether a device multiplies int8 faster than floats: NVIDIA GPUs, and CPUs with AVX-512 VNNI.

    On other CPUs int8 products of torch take several times as long as those of float32.
    """
    if device.type == "cpu":
        return torch.cpu._is_vnni_supported()
    return device.type == "cuda" and torch.version.hip is None


def multiply_int8(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """x @ weight + bias, with x rounded by `round_to_int8`. x: (N, I) -> (N, O)"""
    rows = rotate(x, packed.rotated) if packed.rotated else x
    return multiply_rounded(round_to_int8(rows), packed, bias)


def all_multiply_int8(layers: Sequence[nn.Module], x: Tensor) -> bool:
    """Whether all layers (at least one) multiply x rounded to int8, and can share one rounding of x. x: (N, I)"""
    return (
        len(layers) > 0  # torch before 2.12 does not trace bool()
        and not torch.is_grad_enabled()
        and all(
            isinstance(layer, PackedLinear)
            and layer.packed.dynamic
            and not layer.packed.rotated
            and multiplies_int8(layer.packed, x)
            for layer in layers
        )
    )


def round_to_int8(x: Tensor, *others: Tensor, join: Callable[..., Tensor] | None = None) -> Rounded:
    """Rounds each row of x to 255 steps of its range; with `join`, rounds join(x, *others). All: (N, I).

    The CPU works on a few rows at a time, so that they stay in its caches between joining and rounding.
    """
    numbers = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(len(x), 1, device=x.device)
    step = _rows_at_once(x)
    for q, by, *rows in zip(numbers.split(step), scale.split(step), *(each.split(step) for each in (x, *others))):
        joined = rows[0] if join is None else join(*rows)
        by.copy_(_range(joined)).div_(127)
        q.copy_((joined * by.reciprocal()).round_())
    return Rounded(x.dtype, numbers, scale)


def multiplies_fp8(packed: Packed, x: Tensor) -> bool:
    """Whether `multiply_fp8` can run: e4m3 weights with one scale a row, bfloat16 x, a GPU with fp8 products."""
    return (
        packed.format == "e4m3"
        and x.dtype == torch.bfloat16
        and has_fp8(x.device)
        and all(scale.shape[1] == 1 for scale in packed.scales)
        and not packed.rotated
        and packed.shape[0] % 16 == 0
        and packed.shape[1] % 16 == 0
    )


@lru_cache
def has_fp8(device: torch.device) -> bool:
    """Whether a GPU multiplies 8-bit floats: NVIDIA Ada, Hopper and newer."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)


def all_multiply_fp8(layers: Sequence[nn.Module], x: Tensor) -> bool:
    """Whether all layers (at least one) multiply x rounded to 8-bit floats. x: (N, I)"""
    return (
        len(layers) > 0  # torch before 2.12 does not trace bool()
        and not torch.is_grad_enabled()
        and all(
            isinstance(layer, PackedLinear) and layer.packed.dynamic and multiplies_fp8(layer.packed, x)
            for layer in layers
        )
    )


def multiply_fp8(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """x @ weight + bias, with x rounded by `round_rows`. x: (N, I) bfloat16 -> (N, O)"""
    return multiply_rounded(round_rows(x), packed, bias)


def multiply_rounded(x: Rounded, packed: Packed, bias: Tensor | None) -> Tensor:
    """x @ weight + bias. x: (N, I) -> (N, O). With int8, products and sums are exact."""
    if x.numbers.dtype == torch.int8:
        weight = packed.data.view(torch.int8).t()
        sums = torch._int_mm(x.numbers, weight)  # (N, O) int32  # pyright: ignore[reportPrivateImportUsage]
        return _scale_back(sums, x.scale, packed, bias).to(x.dtype)
    ones = torch.ones(1, 1, device=x.scale.device)
    own = (packed.scales[0].float() if packed.scales else ones).expand(len(packed), 1).t().contiguous()  # (1, O)
    weight = packed.data.view(E4M3).t()
    multiply = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
    return multiply(x.numbers, weight, scale_a=x.scale, scale_b=own, bias=bias, out_dtype=x.dtype, use_fast_accum=True)


def round_rows(x: Tensor) -> Rounded:
    """Scales each row of x to the range of e4m3 and rounds it to e4m3. x: (N, I)"""
    if fused := kernels_for(x):
        return Rounded(x.dtype, *fused.round_rows(x, E4M3))
    scale = _range(x) / E4M3_MOST  # (N, 1)
    return Rounded(x.dtype, (x * scale.reciprocal()).clamp_(-E4M3_MOST, E4M3_MOST).to(E4M3), scale)


def _rows_at_once(x: Tensor) -> int:
    """How many rows to process at once: all on a GPU, as many as fit the caches on a CPU."""
    return max(1, (CHUNK // 4 if x.device.type == "cpu" else x.numel()) // x.shape[1])


def _range(x: Tensor) -> Tensor:
    """The largest magnitude of each row, at least 1e-30. (N, I) -> (N, 1) float32"""
    return x.abs().amax(-1, keepdim=True).float().clamp_(min=1e-30)


def _scale_back(sums: Tensor, scale: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """Converts int32 sums (N, O) in place to float32: sums * row scales * weight scales + bias."""
    out = sums.view(torch.float32)
    rows = _rows_at_once(sums)
    own = [each.float().t() for each in packed.scales]
    for integers, numbers, by in zip(sums.split(rows), out.split(rows), scale.split(rows)):
        numbers.copy_(integers).mul_(by)
        for each in own:
            numbers.mul_(each)
        if bias is not None:
            numbers.add_(bias)
    return out
