"""The one loop over a model's blocks. What is done around a block (streaming, checkpointing, caching) is done here."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from inkstream.nn.offload import Streamed, visit_when_called


class Blocks(nn.ModuleList):
    """A stack of blocks, and where they are streamed from, if they are."""

    streamed: Streamed | None = None

    def stream(self, streamed: Streamed) -> None:
        """From now on the blocks come from there."""
        self.streamed = streamed
        for guest in streamed.apart:
            visit_when_called(guest)


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, call: Callable[[int, nn.Module, Tensor], Tensor]) -> Tensor:
    """Send x through the blocks in order; `call(index, block, x)` gives a block what else it takes."""
    streamed = getattr(blocks, "streamed", None)
    for index, block in enumerate(blocks if streamed is None else streamed.visits()):
        x = call(index, block, x)
    return x
