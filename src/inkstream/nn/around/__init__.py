"""Per-picture additions to the transformer blocks: step cache, adapters, residuals. `Sample.around` carries them."""

from __future__ import annotations

from dataclasses import dataclass

from inkstream.nn.around.adapters import Adapter
from inkstream.nn.around.cache import StepCache
from inkstream.nn.around.residuals import Residual


@dataclass(frozen=True, eq=False)
class Around:
    """The additions of one picture, from its first step to its last. All prompts of the picture share them.

    cache: skips blocks. adapters: change the outputs of layers, in order. residuals: are added to the picture's rows
    after blocks.
    """

    cache: StepCache | None = None
    adapters: tuple[Adapter, ...] = ()
    residuals: tuple[Residual, ...] = ()


NOTHING = Around()
