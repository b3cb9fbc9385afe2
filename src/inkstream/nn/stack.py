"""The one loop over a model's blocks. What is done around a block (streaming, checkpointing, caching) is done here."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, call: Callable[[int, nn.Module, Tensor], Tensor]) -> Tensor:
    """Send x through the blocks in order; `call(index, block, x)` gives a block what else it takes."""
    for index, block in enumerate(blocks):
        x = call(index, block, x)
    return x
