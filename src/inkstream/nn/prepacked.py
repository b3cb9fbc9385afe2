"""Linear layers on the CPU whose weight is stored in MKL's packed layout.

MKL packs a matrix before it multiplies by it. Packing takes half of the time of a product with 32 rows, a quarter with
256, a twelfth with 1024. A transformer uses the same matrices at every step, so one packing serves all steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inkstream.nn.heap import give_back_freed_memory
from inkstream.nn.offload import advise, is_mapped, mapped_ranges
from inkstream.nn.quant import Outline, full_weight
from inkstream.nn.stack import Blocks

LEAST = 2**20
"""The smallest weight, in numbers, that is prepacked. For smaller ones the best layout depends on the row count."""
ROWS = 320
"""The row count that MKL packs for. Products may have any other row count.

From 8 to 4000 rows, with one thread or two, no product took over 2% longer than unpacked, and most took less time.
"""


class PrepackedLinear(nn.Module):
    """Like nn.Linear, in float32 on the CPU, without gradients, with a prepacked weight.

    The first forward packs the weight. From then on only MKL's layout stays in memory: the pages of a mapped file are
    dropped. The layer cannot be moved or saved.
    """

    def __init__(self, layer: nn.Linear, mapped: bool = False):
        """mapped: whether the layer's weight is a view of a memory-mapped file."""
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        self.bias = layer.bias
        self._plain: Tensor | None = layer.weight.detach()
        self._mapped = mapped
        self.kept = getattr(layer, "kept", None)  # see `parallel.Kept`
        self._like = torch.empty(1).expand(layer.weight.shape)  # torch asks only for its shape and dtype

    @property
    def weight(self) -> Outline:
        """Shape, dtype and device, for callers that read these from `layer.weight`."""
        return Outline(tuple(self._like.shape), self._like.dtype, self._like.device)

    def forward(self, x: Tensor) -> Tensor:  # (..., in_features) -> (..., out_features)
        if self._plain is not None:
            self._pack()
        rows = x.numel() // self.in_features  # a row count unlike x's makes torch read the plain weight, which is gone
        return torch.ops.mkl._mkl_linear(x, self._packed, self._like, self.bias, rows)

    def _pack(self) -> None:
        """Packs the weight, as the first product would in any case, and releases the plain weight at once."""
        assert self._plain is not None
        self._packed = torch.ops.mkl._mkl_reorder_linear_weight(self._plain, ROWS)
        if self._mapped:
            advise(self._plain, "MADV_DONTNEED")
        self._plain = None
        if not self._mapped:
            give_back_freed_memory()

    def unpacked(self) -> Tensor:
        """The weight in its usual layout (O, I). Products with the rows of the identity give its numbers exactly."""
        if self._plain is not None:
            return self._plain
        rows = torch.eye(self.in_features)
        return torch.ops.mkl._mkl_linear(rows, self._packed, self._like, None, len(rows)).T

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a linear layer (O, I), whether it is plain, prepacked or packed."""
    return layer.unpacked() if isinstance(layer, PrepackedLinear) else full_weight(layer)


def prepack(transformer: nn.Module) -> None:
    """Replaces the large linear layers of a transformer's blocks by prepacked ones.

    This applies only to layers that stay on the CPU and compute in float32 by MKL.
    """
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return
    ranges = mapped_ranges()
    for stack in transformer.modules():
        if isinstance(stack, Blocks) and stack.streamed is None:
            for block in stack:
                for above, name, layer in large_layers(block):
                    setattr(above, name, PrepackedLinear(layer, is_mapped(layer.weight, ranges)))


def large_layers(block: nn.Module) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The layers worth packing, each with its parent and its name there. Modules in `block.apart` are left out.

    Modules in `block.apart` are called apart from the block, once.
    """
    apart = {module for name in getattr(block, "apart", ()) for module in _inside(getattr(block, name, None))}
    return [
        (above, name, layer)
        for above in block.modules()
        for name, layer in above.named_children()
        if type(layer) is nn.Linear and layer not in apart and is_worth_packing(layer)
    ]


def is_worth_packing(layer: nn.Linear) -> bool:
    """Whether a layer is large, on the CPU, in float32, without hooks, and not shared with other processes."""
    weight, alone = layer.weight, not layer._forward_hooks and getattr(layer, "group", None) is None
    plain = weight.dtype == torch.float32 and weight.device.type == "cpu" and alone
    return plain and weight.numel() >= LEAST


def _inside(module: nn.Module | None) -> list[nn.Module]:
    return [] if module is None else list(module.modules())
