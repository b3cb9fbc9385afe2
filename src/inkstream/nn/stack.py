"""The one loop over a model's blocks. What is done around a block (streaming, checkpointing, caching) is done here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice

from torch import Tensor, nn

from inkstream.nn.cache import in_use
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
    """Send x through the blocks in order; `call(index, block, x)` gives a block what else it takes.

    With a cache in use, blocks may be left out, but never those behind which there are fewer rows than came in: what
    these add cannot be told row by row.
    """

    def through(x: Tensor, start: int, stop: int | None = None) -> Tensor:
        for index, block in visits(blocks, start, stop):
            x = call(index, block, x)
        return x

    cache = in_use.get()
    if cache is None:
        return through(x, 0)
    entering, start = x, 0
    if cache.undecided:
        x, start = through(entering, 0, 1), 1
        cache.decide(x - entering)
        entering = x
    memory = cache.next_stack()
    if cache.skips:
        return through(entering + memory.foretell(cache.t), memory.until)
    last, until = entering, start  # the last with all rows, and how many blocks gave it
    for index, block in visits(blocks, start):
        x = call(index, block, x)
        if x.shape == entering.shape:
            last, until = x, index + 1
    memory.keep(cache.t, last - entering, until)
    return x


def visits(blocks: Iterable[nn.Module], start: int, stop: int | None = None) -> Iterable[tuple[int, nn.Module]]:
    """Those blocks with their index. Of a stack that is streamed no others are brought."""
    streamed: Streamed | None = getattr(blocks, "streamed", None)
    chosen = islice(blocks, start, stop) if streamed is None else streamed.visits(slice(start, stop))
    return enumerate(chosen, start)
