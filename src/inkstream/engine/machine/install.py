"""All changes that are made to a module before it computes, in one order."""

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
from inkstream.nn.attention import choose_attention
from inkstream.nn.prepacked import prepack
from inkstream.nn.quant import place as put_packed
from inkstream.quant.packed import Weight
from inkstream.types import Machine
from inkstream.weights.keymap import Rule

Weights = AbstractContextManager[Mapping[str, Weight]]
"""Our names -> weights, for as long as it takes to hand them over."""


@dataclass(frozen=True)
class Placement:
    """Where a part of a model is, and in which dtype it computes."""

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
    machine: Machine | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> nn.Module:
    """Give a module, built on meta, its weights, and make it ready to draw.

    machine: chooses the attention of a transformer, and whether its blocks are compiled or its large matrices packed
    for the CPU. None: neither, and nothing is recorded; that is for weights that learn. progress: called with the bytes
    done and the bytes in all.
    """
    crew = crew if part == "transformer" else None
    take(module, weights, placement.dtype)
    if crew:
        crew.share(module)  # before any of its weights is moved
    own = copied(placement.rules, module)
    Placed(module, placement.place, placement.device, placement.dtype, own).settle(progress)
    if machine is not None:
        if part == "transformer":
            choose_attention(module, machine.attention, placement.device)
            compile_blocks(module) if machine.compile else prepack(module)  # a compiler packs as it likes
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
