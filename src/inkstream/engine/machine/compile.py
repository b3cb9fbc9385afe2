"""Regional compilation: the parts of a block before and after its attention are compiled once, for all sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, wraps
from typing import Any, cast

import torch
from torch import Tensor, nn

from inkstream.nn.forward import Forward, ProductBy, Rows, adapted_product
from inkstream.nn.rope import Rope
from inkstream.nn.stack import Blocks


def compile_blocks(model: nn.Module, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compiles the regions of every block in a model's stacks; returns the number of different regions.

    A region is a method of a block that maps tensors to tensors. Its first dimension (tokens, or rows of the
    modulation) is dynamic, and blocks of one class share the compiled code: another prompt, size or number of pictures
    compiles nothing. Attention depends on the sequence lengths and is not compiled, nor are streaming and caching.
    In a forward with adapters, the products of linear layers run outside the compiled code, which is the same for all
    adapters: another adapter, strength or number of them compiles nothing.
    """
    blocks = [block for stack in model.modules() if isinstance(stack, Blocks) for block in stack]
    kinds = {(type(block), name) for block in blocks for name in getattr(block, "regions", ())}
    for block in blocks:
        for name in getattr(block, "regions", ()):
            setattr(block, name, compile_region(getattr(block, name), backend))
    return len(kinds)


def compile_region(region: Callable[..., Any], backend: str | Callable[..., Any]) -> Callable[..., Any]:
    """The compiled function. It compiles at its first call, and once more at its first call with adapters."""
    compiled: Callable[..., Any] = torch.compile(region, backend=backend)  # pyright: ignore[reportUnknownMemberType]
    untraced = untraced_product()

    @wraps(region)
    def call(*given: Any) -> Any:
        for one in given:
            if isinstance(one, Forward) and one.adapted:
                one.product_by = untraced
        for tensor in tensors_of(given):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)  # pyright: ignore[reportPrivateUsage]
        return compiled(*given)

    return call


@cache
def untraced_product() -> ProductBy:
    """`adapted_product` as a function that is called between two pieces of compiled code."""

    def product(forward: Forward, layer: nn.Module, x: Any, rows: Rows) -> Tensor:
        out = adapted_product(forward, layer, x, rows)
        torch._dynamo.maybe_mark_dynamic(out, 0)  # pyright: ignore[reportPrivateUsage]
        return out

    untraced: Any = torch.compiler.disable(product)  # pyright: ignore[reportUnknownMemberType]
    return untraced


def tensors_of(given: Any) -> Iterator[Tensor]:
    """All tensors in a region's arguments."""
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, Rope):
        yield from (given.cos, given.sin)
    elif isinstance(given, list | tuple):
        for one in cast("Sequence[Any]", given):
            yield from tensors_of(one)
