"""What is done to a module before it computes: all of it, in one order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain

import torch
from torch import nn

from inkstream.engine.machine.compile import compile_blocks
from inkstream.engine.machine.graphs import replay_small
from inkstream.engine.machine.placement import Place, Placed, Sharing, copied
from inkstream.nn.prepacked import prepack
from inkstream.nn.quant import place as put_packed
from inkstream.quant.packed import Weight
from inkstream.weights.keymap import Rule

Weights = AbstractContextManager[Mapping[str, Weight]]
"""Our names -> weights, for as long as it takes to hand them over."""


@dataclass(frozen=True)
class Placement:
    """Where a part of a model is to be, and what it computes in there."""

    device: torch.device
    dtype: torch.dtype
    place: Place = "resident"
    rules: Sequence[Rule] = ()  # from its files' layout into ours


def install(
    part: str,
    module: nn.Module,
    weights: Weights,
    placement: Placement,
    crew: Sharing | None = None,
    compiled: bool | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> nn.Module:
    """The module, built on meta, with its weights.

    compiled: a transformer's blocks are compiled when it first draws; False: its large matrices are packed for the CPU;
    None: neither, nor is anything recorded, where weights learn. progress: told the bytes done and in all.
    """
    crew = crew if part == "transformer" else None
    take(module, weights, placement.dtype)
    if crew:
        crew.share(module)  # before any of its weights is moved
    own = copied(placement.rules, module)
    Placed(module, placement.place, placement.device, placement.dtype, own).settle(progress)
    if compiled is not None:
        if part == "transformer":
            compile_blocks(module) if compiled else prepack(module)  # a compiler packs as it likes
        replay_small(part, module)
    if crew:
        crew.attach(module)
    return module


def take(module: nn.Module, weights: Weights, dtype: torch.dtype) -> None:
    """Give a module its weights; its layers hold those that are packed as they are. dtype: what it computes in."""
    with weights as state:
        module.load_state_dict(put_packed(module, state, dtype), strict=True, assign=True)
    unset = [key for key, tensor in chain(module.named_parameters(), module.named_buffers()) if tensor.is_meta]
    assert not unset, f"no weights for {unset}"
    module.eval().requires_grad_(False)
