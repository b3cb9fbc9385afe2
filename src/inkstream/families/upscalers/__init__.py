"""Networks that enlarge pictures: the table of architectures, and which one a file holds.

An upscaler maps pixels (B, 3, h, w) in [0, 1] to (B, 3, h * scale, w * scale). Its sizes follow from the shapes of its
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from inkstream.families.upscalers import compact, dat, esrgan, hat, plksr, span, swinir
from inkstream.types import InputError
from inkstream.weights.files import few
from inkstream.weights.keymap import Rule, translate

State = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]


class Upscaler(Protocol):
    """A loaded network."""

    scale: int
    """Pixels out per pixel in, along each side."""

    def __call__(self, x: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Architecture:
    """One architecture of upscalers."""

    name: str
    mark: Callable[[Shapes], bool]  # whether a file's names are of this architecture
    infer: Callable[[Shapes], Any]  # shapes, by our names -> config
    build: Callable[[Any], nn.Module]
    rules: Callable[[Shapes], Sequence[Rule]] = lambda shapes: ()  # shapes of a file -> rules into our names
    fold: Callable[[State], State] = lambda state: state  # joins what trained apart


ARCHITECTURES = (
    Architecture("ESRGAN", esrgan.is_esrgan, esrgan.infer, esrgan.RRDBNet, esrgan.rules_of),
    Architecture("Compact", compact.is_compact, compact.infer, compact.SRVGGNetCompact),
    Architecture("SPAN", span.is_span, span.infer, span.SPAN, fold=span.fold),
    Architecture("PLKSR", plksr.is_plksr, plksr.infer, plksr.PLKSR),
    Architecture("SwinIR", swinir.is_swinir, swinir.infer, swinir.SwinIR, swinir.rules_of),
    Architecture("DAT", dat.is_dat, dat.infer, dat.DAT, dat.rules_of),
    Architecture("HAT", hat.is_hat, hat.infer, hat.HAT, hat.rules_of),
)
PREFIXES = ("module.", "netG.")
"""Prefixes that training programs put before all names."""


def build_upscaler(state: State) -> tuple[str, nn.Module]:
    """The name of a file's architecture, and the network with the file's weights in float32.

    state: all weights of a file. Raises InputError, without the file's name, if no architecture has these names and
    shapes, or the network does not take three channels and give three.
    """
    for prefix in PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): weight for name, weight in state.items()}
    shapes = shapes_of(state)
    kind = next((kind for kind in ARCHITECTURES if kind.mark(shapes)), None)
    if kind is None:
        known = ", ".join(kind.name for kind in ARCHITECTURES)
        raise InputError(f"is no upscaler that is known here, it holds {few(list(state))}: take one of {known}")
    try:
        ours = cast("State", translate(kind.rules(shapes), kind.fold(state)))
        config = kind.infer(shapes_of(ours))
        with torch.device("meta"):
            network = kind.build(config)
    except InputError:
        raise
    except (KeyError, ValueError, IndexError, ZeroDivisionError, RuntimeError):
        raise InputError(f"looks like {kind.name}, but its weights have unknown shapes: download it again") from None
    check(kind.name, shapes_of(network.state_dict()), shapes_of(ours))
    network.load_state_dict({name: weight.float() for name, weight in ours.items()}, assign=True)
    return kind.name, network.eval().requires_grad_(False)


def check(name: str, wanted: Shapes, found: Shapes) -> None:
    """Raises InputError unless a file has the weights of a network, and no others."""
    if missing := [key for key in wanted if key not in found]:
        raise InputError(f"lacks {few(missing)} of {name}: download it again")
    if unknown := [key for key in found if key not in wanted]:
        raise InputError(f"holds {few(unknown)}, which {name} does not have: take another file")
    wrong = [key for key in wanted if wanted[key] != found[key]]
    if wrong:
        shape = " x ".join(map(str, found[wrong[0]]))
        raise InputError(f"has {wrong[0]} of {shape}, which does not fit its other weights: download it again")


def shapes_of(state: State) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in state.items()}
