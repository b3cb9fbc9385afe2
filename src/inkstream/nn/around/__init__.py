"""What is done around the blocks of one picture. It travels with the picture, and is reached in no other way."""

from __future__ import annotations

from dataclasses import dataclass

from inkstream.nn.around.adapters import Adapter
from inkstream.nn.around.cache import StepCache
from inkstream.nn.around.residuals import Residual


@dataclass(frozen=True, eq=False)
class Around:
    """Of one picture, from its first step to its last. All prompts of a picture share it.

    adapters change products of layers, in their order; residuals add to the picture's rows behind blocks; the cache
    leaves blocks out.
    """

    cache: StepCache | None = None
    adapters: tuple[Adapter, ...] = ()
    residuals: tuple[Residual, ...] = ()


NOTHING = Around()
