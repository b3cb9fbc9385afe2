"""Frozen blocks between weights that learn: each is computed again for its backward, and streamed blocks come again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from inkstream.nn.offload import Streamed
from inkstream.nn.stack import Blocks


def recompute_blocks(model: nn.Module, weights_in: Callable[[nn.Module], Sequence[nn.Parameter]]) -> None:
    """Let the blocks of a model keep only their inputs, and compute again in the backward pass what gradients need.

    Streamed blocks, which leave the device after they have run, come again for that, the last one first. weights_in:
    returns the adapter's weights for the layers of a block.
    """
    for blocks in model.modules():
        if isinstance(blocks, Blocks):
            way = None if blocks.streamed is None else _WayBack(blocks.streamed)
            for index, block in enumerate(blocks):
                block.forward = _Call(block.forward, index, tuple(weights_in(block)), way)


class _WayBack:
    """Brings the blocks of a stack in reverse order, one for each call of `to`."""

    def __init__(self, streamed: Streamed):
        self.streamed = streamed
        self.visits: Iterator[nn.Module] | None = None
        self.at = 0

    def to(self, index: int) -> None:
        """Bring a block: the last one of a pass, or the one before the block that was brought last."""
        if self.visits is None:
            self.visits, self.at = iter(self.streamed.visits(slice(None, None, -1))), len(self.streamed.guests)
        while self.at > index:
            next(self.visits)
            self.at -= 1

    def end(self) -> None:
        if self.visits is not None:
            self.visits.close()  # type: ignore[attr-defined]
            self.visits = None


@dataclass(frozen=True, eq=False)
class _Call:
    """A block's forward."""

    block: Callable[..., Tensor]
    index: int
    weights: tuple[nn.Parameter, ...]
    way: _WayBack | None

    def __call__(self, *args: Any) -> Tensor:
        if not torch.is_grad_enabled():
            return self.block(*args)
        leaves, structure = tree_flatten(args)

        def run(tensors: Sequence[Tensor]) -> Tensor:
            given = iter(tensors)
            whole = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            return self.block(*tree_unflatten(whole, structure))

        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        return _Again.apply(self, run, len(inputs), *inputs, *self.weights)  # type: ignore[no-any-return]


class _Again(torch.autograd.Function):
    """A function that is computed again for its gradients."""

    @staticmethod
    def forward(
        ctx: Any, call: _Call, run: Callable[[Sequence[Tensor]], Tensor], count: int, *tensors: Tensor
    ) -> Tensor:
        ctx.call, ctx.run, ctx.count = call, run, count
        ctx.save_for_backward(*tensors[:count])
        with torch.enable_grad():  # layers choose their kernels by it: both passes compute the same
            return run(tensors[:count]).detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        call: _Call = ctx.call
        needed = ctx.needs_input_grad[3 : 3 + ctx.count]
        if call.way is not None:
            call.way.to(call.index)
        with torch.enable_grad():
            inputs = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needed)]
            out = ctx.run(inputs)
        wanted = [t for t, need in zip(inputs, needed) if need]
        found = iter(torch.autograd.grad(out, [*wanted, *call.weights], gradient, allow_unused=True))
        gradients = [next(found) if need else None for need in needed]
        del out, inputs, wanted
        if call.way is not None and (call.index == 0 or not any(needed)):  # no block before this one has gradients
            call.way.end()
        return None, None, None, *gradients, *found
