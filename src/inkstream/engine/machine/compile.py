"""Regional compilation: the parts of a block before and after its attention are compiled once, for all sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor, nn

from inkstream.nn.forward import Forward
from inkstream.nn.rope import Rope
from inkstream.nn.stack import Blocks


def compile_blocks(model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compiles the regions of every block in a model's stacks; returns the number of different regions.

    A region is a method of a block that maps tensors to tensors. Its first dimension (tokens, or rows of the
    modulation) is dynamic, and blocks of one class share the compiled code: another prompt, size or number of pictures
    compiles nothing. Attention depends on the sequence lengths and is not compiled, nor are streaming and caching.
    With adapters a region runs uncompiled.
    """
    blocks = [block for stack in model.modules() if isinstance(stack, Blocks) for block in stack]
    kinds = {(type(block), name) for block in blocks for name in getattr(block, "regions", ())}
    for block in blocks:
        for name in getattr(block, "regions", ()):
            setattr(block, name, compile_region(getattr(block, name), backend))
    return len(kinds)


def compile_region(region: Callable[..., Any], backend: str | Callable[..., Any]) -> Callable[..., Any]:
    """The compiled function; it compiles at its first call. A forward with adapters calls the original function."""
    compiled: Callable[..., Any] = torch.compile(region, backend=backend)  # pyright: ignore[reportUnknownMemberType]

    @wraps(region)
    def call(*given: Any) -> Any:
        if any(isinstance(one, Forward) and one.adapted for one in given):
            return region(*given)
        for tensor in tensors_of(given):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # pyright: ignore[reportPrivateUsage]
        return compiled(*given)

    return call


def tensors_of(given: Any) -> Iterator[Tensor]:
    """All tensors in a region's arguments."""
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, Rope):
        yield from (given.cos, given.sin)
    elif isinstance(given, list | tuple):
        for one in cast("Sequence[Any]", given):
            yield from tensors_of(one)
