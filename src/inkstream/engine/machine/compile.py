"""Regional compilation: of one block of each kind what lies before and after its attention, once, for all sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from inkstream.nn.forward import Forward
from inkstream.nn.rope import Rope
from inkstream.nn.stack import Blocks


def compile_blocks(model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compile the regions of every block in a model's stacks; returns how many there are that differ.

    A region is a function of tensors whose first size, of tokens or of rows of the modulation, is unknown to the
    compiler, and blocks of a kind share what is compiled of it: another prompt, size or number of pictures compiles
    nothing anew. Attention, which goes by how long each sequence is, stays outside; so do streaming and caching. Where
    adapters change a layer's products, a forward's regions are run as they are written.
    """
    blocks = [block for stack in model.modules() if isinstance(stack, Blocks) for block in stack]
    kinds = {(type(block), name) for block in blocks for name in getattr(block, "regions", ())}
    for block in blocks:
        for name in getattr(block, "regions", ()):
            setattr(block, name, compile_region(getattr(block, name), backend))
    return len(kinds)


def compile_region(region: Callable[..., Any], backend: str | Callable[..., Any]) -> Callable[..., Any]:
    """The same function, compiled when it is first called; as it is where a forward has adapters."""
    compiled = torch.compile(region, backend=backend)

    @wraps(region)
    def call(*given: Any) -> Any:
        if any(isinstance(one, Forward) and one.adapted for one in given):
            return region(*given)
        for tensor in tensors_of(given):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(*given)

    return call


def tensors_of(given: Any) -> Iterator[Tensor]:
    """All tensors among what a region is given."""
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, Rope):
        yield from (given.cos, given.sin)
    elif isinstance(given, list | tuple):
        for one in given:
            yield from tensors_of(one)
