"""Residuals that are added to the rows of one picture after a model's blocks."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Residual(Protocol):
    """A function that is called after every block that runs, once for each prompt of the picture."""

    def __call__(self, stack: str, index: int, x: Tensor, t: float) -> Tensor | None:
        """Returns the residual to add, shaped like x, or None.

        stack, index: the block, by the name of its stack in the model. x: (L, D), the block's output for the picture
        being drawn. t: the model's time.
        """
        ...
