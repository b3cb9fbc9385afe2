"""A stack of a model's blocks, and where they are streamed from, if they are."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from torch import nn

from inkstream.nn.offload import Streamed, visit_when_called


class Blocks(nn.ModuleList):
    """A stack of blocks, and where they are streamed from, if they are."""

    streamed: Streamed | None = None

    def stream(self, streamed: Streamed) -> None:
        """From now on the blocks come from there."""
        self.streamed = streamed
        for guest in streamed.apart:
            visit_when_called(guest)


def visits(blocks: Iterable[nn.Module], start: int = 0, stop: int | None = None) -> Iterable[tuple[int, nn.Module]]:
    """Those blocks in order, each with its index. Of a stack that is streamed no others are brought."""
    streamed: Streamed | None = getattr(blocks, "streamed", None)
    chosen = islice(blocks, start, stop) if streamed is None else streamed.visits(slice(start, stop))
    return enumerate(chosen, start)
