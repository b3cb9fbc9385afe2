"""The control nets that requests use with a loaded model."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from inkstream.engine.drawing.adapters import identity
from inkstream.engine.files.controls import find_control, uses_of
from inkstream.families import ControlNet, Family
from inkstream.quant.packed import Weight
from inkstream.types import ControlUse, InputError, Request
from inkstream.weights.files import read_header

BLOCK = re.compile(r"^(?!vision_model|text_model).*\.\d+\.")
"""Names of weights in blocks that each step runs. Those of an image encoder run once."""


@dataclass(eq=False)
class Held:
    """A control net that was read, and the number of requests that are being drawn with it."""

    net: Any
    users: int = 0


@dataclass(eq=False)
class Controls:
    """The control nets of one loaded model. A net is kept until a request begins that does not use it.

    folder: where nets are that requests name. read: checks the file of a net, and returns the net with its weights.
    """

    family: Family
    folder: Path
    read: Callable[[Path, ControlUse], nn.Module]
    _held: dict[tuple[object, ...], Held] = field(default_factory=dict[tuple[object, ...], Held])

    def get(self, use: ControlUse) -> ControlNet:
        """Return the net of a use, read if need be. Raises InputError if it is not there or not for this model."""
        return self._hold(use).net

    @contextmanager
    def use(self, uses: Sequence[ControlUse]) -> Generator[None]:
        """Keep the nets of a request as long as it is drawn, and drop those that no request uses. Raises InputError."""
        wanted = {self._key(use) for use in uses}
        self._held = {key: held for key, held in self._held.items() if held.users or key in wanted}
        own = [self._hold(use) for use in uses]
        for held in own:
            held.users += 1
        try:
            yield
        finally:
            for held in own:
                held.users -= 1

    def check_numbers(self, uses: Iterable[ControlUse]) -> None:
        """Raise InputError if a weight of these nets is not finite."""
        for use in uses:
            module: Any = self._hold(use).net
            for name, weight in module.named_parameters():
                if weight.is_floating_point() and not torch.isfinite(weight).all():
                    raise InputError(
                        f"control net {use.path} holds numbers that are not finite, in {name}: download it again"
                    )

    def _hold(self, use: ControlUse) -> Held:
        key = self._key(use)
        if key not in self._held:
            self._held[key] = Held(self.read(find_control(use.path, self.folder), use))
        self._held[key].net.check(self.family, use)
        return self._held[key]

    def _key(self, use: ControlUse) -> tuple[object, ...]:
        return identity(find_control(use.path, self.folder))


def control_work(request: Request, folder: Path, weights: Iterable[Weight]) -> float:
    """Return the work of a request's control nets as a share of the model's, over all steps of a picture.

    The weights of blocks are compared, from the headers of the nets' files. weights: the transformer's.
    """
    uses = uses_of(request)
    if not uses:
        return 0.0
    own = sum(math.prod(weight.shape) for weight in weights if len(weight.shape) == 2)
    work = 0.0
    for use in uses:
        tensors = read_header(find_control(use.path, folder)).tensors
        blocks = [weight.shape for name, weight in tensors.items() if BLOCK.search(name) and len(weight.shape) == 2]
        work += sum(map(math.prod, blocks)) * (use.ends - use.begins)
    return work / own


def control_bytes(request: Request, folder: Path, dtype: torch.dtype) -> int:
    """Return the size of the weights of a request's control nets, from the headers of their files."""
    files = {find_control(use.path, folder) for use in uses_of(request)}
    shapes = [weight.shape for file in files for weight in read_header(file).tensors.values()]
    return sum(math.prod(shape) for shape in shapes) * dtype.itemsize
