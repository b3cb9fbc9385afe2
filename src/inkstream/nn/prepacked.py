"""Matrices that wait on the CPU as its library wants them.

MKL packs a matrix before it multiplies by it: half of the time of a product with 32 rows, a quarter with 256, a
twelfth with 1024. A transformer multiplies by the same ones at every step, so that it is worth doing once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inkstream.nn.heap import give_back_freed_memory
from inkstream.nn.offload import advise, is_mapped, mapped_ranges
from inkstream.nn.quant import Outline
from inkstream.nn.stack import Blocks

LEAST = 2**20
"""Numbers of a matrix from which it pays; with smaller ones the best packing depends on the rows to come."""
ROWS = 320
"""Rows that are packed for. MKL takes any: from 8 to 4000, with one thread or two, none took a fiftieth longer than
unpacked, most took less."""


class PrepackedLinear(nn.Module):
    """As nn.Linear, in float32 on the CPU, without gradients. Its weight is packed when it is first used, and from then
    on there in MKL's layout alone, of whose file no page stays in memory; it is neither moved nor saved."""

    def __init__(self, layer: nn.Linear, mapped: bool = False):
        """mapped: the layer's weight is a view of a mapped file."""
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        self.bias = layer.bias
        self._plain: Tensor | None = layer.weight.detach()
        self._mapped = mapped
        self._like = torch.empty(1).expand(layer.weight.shape)  # its shape and type are all that is asked of it

    @property
    def weight(self) -> Outline:
        """For those who ask a layer where it is and what it computes in."""
        return Outline(tuple(self._like.shape), self._like.dtype, self._like.device)

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        if self._plain is not None:
            self._pack()
        rows = x.numel() // self.in_features  # told of others, torch would take the plain weight, which MKL need not
        return torch.ops.mkl._mkl_linear(x, self._packed, self._like, self.bias, rows)

    def _pack(self) -> None:
        """What the first product would do in any case. What it was packed from leaves memory at once."""
        assert self._plain is not None
        self._packed = torch.ops.mkl._mkl_reorder_linear_weight(self._plain, ROWS)
        if self._mapped:
            advise(self._plain, "MADV_DONTNEED")
        self._plain = None
        if not self._mapped:
            give_back_freed_memory()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def prepack(transformer: nn.Module) -> None:
    """From now on the large layers of its blocks multiply by prepacked weights, where the CPU computes them in float32
    by MKL and they stay."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return
    ranges = mapped_ranges()
    for stack in transformer.modules():
        if isinstance(stack, Blocks) and stack.streamed is None:
            for block in stack:
                for above, name, layer in large_layers(block):
                    setattr(above, name, PrepackedLinear(layer, is_mapped(layer.weight, ranges)))


def large_layers(block: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Those worth packing, each with its parent and its name there; not what is called apart from the block, once."""
    apart = {module for name in getattr(block, "apart", ()) for module in _inside(getattr(block, name, None))}
    return [
        (above, name, layer)
        for above in block.modules()
        for name, layer in above.named_children()
        if type(layer) is nn.Linear and layer not in apart and is_worth_packing(layer)
    ]


def is_worth_packing(layer: nn.Linear) -> bool:
    """Whether it is large, on the CPU, in float32, and nothing else than a product of this process's own."""
    weight, alone = layer.weight, not layer._forward_hooks and getattr(layer, "group", None) is None
    plain = weight.dtype == torch.float32 and weight.device.type == "cpu" and alone
    return plain and weight.numel() >= LEAST


def _inside(module: nn.Module | None) -> list[nn.Module]:
    return [] if module is None else list(module.modules())
