"""A stack of a model's blocks, resident or streamed."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from torch import nn

from inkstream.nn.offload import Streamed, visit_when_called


class Blocks(nn.ModuleList):
    """A stack of blocks. streamed: the source that the blocks are streamed from, or None."""

    streamed: Streamed | None = None

    def stream(self, streamed: Streamed) -> None:
        """Streams the blocks from now on."""
        self.streamed = streamed
        for guest in streamed.apart:
            visit_when_called(guest)


def visits(blocks: Iterable[nn.Module], start: int = 0, stop: int | None = None) -> Iterable[tuple[int, nn.Module]]:
    """The blocks from start to stop in order, each with its index. A streamed stack loads only these."""
    streamed: Streamed | None = getattr(blocks, "streamed", None)
    chosen = islice(blocks, start, stop) if streamed is None else streamed.visits(slice(start, stop))
    return enumerate(chosen, start)
