"""Residuals that are added to the rows of one picture after a model's blocks, such as those of a control net."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

Sample = Any
"""A `nn.forward.Sample`, which itself names this module."""
Rows = Any
"""A `nn.forward.Rows`."""


class Hints(Protocol):
    """A residual in one forward. It is called after every block that runs on the picture, in the blocks' order."""

    def __call__(self, stack: str, index: int, before: Tensor, after: Tensor, rows: Rows) -> Tensor | None:
        """Returns what to add to the block's output: for all rows of `after`, or for the target rows alone. None: 0.

        stack, index: the block, by the name of its stack in the model. before: (L, D), the block's input, of all the
        picture's samples in this stack, with the layout `rows`; samples that are alike may have one set of rows. after:
        the block's output, of the same rows, or of the target rows alone if the block returns only those.
        """
        ...


class Residual(Protocol):
    """A function that is called at the beginning of every forward of its picture.

    Anything that it computes from the samples belongs to this forward alone, so it keeps no state between forwards.
    Work that only some blocks need is best done when they are reached: a step cache may skip them.
    """

    def __call__(self, samples: Mapping[int, Sample]) -> Hints:
        """samples: of each prompt of the picture, by their index in the forward, which is the owner in `Rows`."""
        ...
