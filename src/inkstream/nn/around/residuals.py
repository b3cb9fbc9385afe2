"""What is added to the rows of one picture behind a model's blocks."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Residual(Protocol):
    """It is asked behind every block that is run, once for each prompt of the picture."""

    def __call__(self, stack: str, index: int, x: Tensor, t: float) -> Tensor | None:
        """stack, index: the block, by the name of its stack in the model; x: (L, D) the rows of the picture being drawn
        that come out of the block; t: the model's time -> what is added to them, like x, or None."""
        ...
