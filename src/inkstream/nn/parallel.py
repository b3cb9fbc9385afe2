"""One transformer on several devices: each process computes a share of every block and exchanges results.

`share_tokens`: sequence parallelism. Every process has all weights. Before and after attention it has a run of the
tokens; in attention it has a run of the heads (DeepSpeed-Ulysses, arXiv 2309.14509). Runs differ by one where the
numbers do not divide evenly.
`share_layers`: tensor parallelism. Every process has a run of each block's heads and feed-forward features, and only
their weights. The block outputs are all-reduced (Megatron-LM, arXiv 1909.08053).

Blocks contain no code for either. They declare which arguments of their regions have a row per token (`regions`), and
what the outputs or inputs of their layers are (`shares`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from inkstream.nn.layers import run_of_each
from inkstream.nn.quant import PackedLinear
from inkstream.nn.stack import Blocks
from inkstream.quant.packed import take_columns, take_rows

Shares = Mapping[str, tuple[str, ...]]
"""A block's layers: name -> "out" or "in" (its outputs or its inputs are shared out), then the parts of that side in
order. "heads": the features of all heads. "hidden": features of a width of their own."""
UNIT = 256
"""Features that stay together, if there are many.

Kernels prefer such sizes, and packed weights can only be cut between their blocks.
"""
FEWEST_UNITS = 4
"""The fewest units per process, so that the shares differ by less than a quarter."""


@dataclass(frozen=True)
class Share:
    """How many of something each process has, in runs by rank, and this process's rank."""

    sizes: Sequence[int]
    rank: int

    @property
    def count(self) -> int:
        return self.sizes[self.rank]

    @property
    def own(self) -> slice:
        start = sum(self.sizes[: self.rank])
        return slice(start, start + self.count)


@dataclass(frozen=True)
class Group:
    """The processes that compute one forward together. This process has number `rank`.

    All processes call each method together, with tensors of the same shapes. Tensors on meta are not sent; the result
    has the right shape only.
    """

    rank: int
    count: int
    members: dist.ProcessGroup | None = None  # None: all processes

    def share(self, total: int) -> Share:
        """Divides a total as evenly as possible."""
        return Share([total // self.count + (i < total % self.count) for i in range(self.count)], self.rank)

    def sum(self, x: Tensor) -> Tensor:
        """All-reduce: the sum of all processes' x, in place."""
        if not x.is_meta:
            dist.all_reduce(x, group=self.members)
        return x

    def exchange(self, pieces: Sequence[Tensor], sizes: Sequence[int]) -> Sequence[Tensor]:
        """All-to-all: sends each process one piece, and returns the flat pieces of these sizes that they sent."""
        given = torch.cat([piece.reshape(-1) for piece in pieces])
        taken = given.new_empty(sum(sizes))
        if not given.is_meta:
            dist.all_to_all_single(taken, given, list(sizes), [p.numel() for p in pieces], group=self.members)
        return taken.split(list(sizes))

    def gather(self, rows: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """All-gather: every process's rows. rows: (sizes[rank], D), padded to the largest size for sending."""
        most = max(sizes)
        if len(rows) < most:
            rows = torch.cat((rows, rows.new_empty(most - len(rows), *rows.shape[1:])))
        taken = [torch.empty_like(rows) for _ in sizes]
        if not rows.is_meta:
            dist.all_gather(taken, rows.contiguous(), group=self.members)
        return [theirs[:size] for theirs, size in zip(taken, sizes)]


def heads_of(module: nn.Module) -> int:
    """The number of heads of a transformer's attention."""
    return next(heads for layer in module.modules() if isinstance(heads := getattr(layer, "heads", None), int))


# Tokens ---------------------------------------------------------------------------------------------------------------


def share_tokens(module: nn.Module, group: Group) -> None:
    """Lets the processes of a group share the tokens of each block of a transformer from now on."""
    module.is_shared = True  # type: ignore[assignment]
    for stack in module.modules():
        if isinstance(stack, Blocks):
            for block in stack:
                own = OwnTokens(block, group)
                block.enter, block.leave = own.enter, own.leave  # type: ignore[assignment]


class OwnTokens:
    """A block's two regions, on the tokens of this process.

    The input of `enter` and the output of `leave` have all tokens. Between them, queries, keys and values have all
    tokens and only this process's heads, so attention and its caches work as on one device. What a block carries past
    its attention stays on the process that computed it. A column of its row numbers takes its place in the block, and
    `leave` finds the rows to use by the numbers that it receives.
    """

    def __init__(self, block: Any, group: Group):
        self.group = group
        self._enter: Callable[..., Any] = block.enter
        self._leave: Callable[..., Tensor] = block.leave
        self._regions: Mapping[str, Sequence[int]] = block.regions
        self._heads = Share([], 0)
        self._carried: Carried | None = None

    def enter(self, *given: Any) -> Any:
        """The block's `enter`. Its result is (queries, keys, values, *carried), or a list of those, one a stream."""
        streams = [self.group.share(len(x)) for x in listed(given[0])]
        results = self._enter(*self._own(given, "enter", streams))
        if isinstance(results, list):
            return [self._to_heads(qkv, stream) for qkv, stream in zip(results, streams)]
        q, k, v, *rest = results
        (tokens,) = streams
        self._carried = Carried(rest[0], tokens) if rest else None
        return *self._to_heads((q, k, v), tokens), *(torch.arange(sum(tokens.sizes))[:, None] for _ in rest)

    def leave(self, *given: Any) -> Tensor:
        """The block's `leave`. given: the block's input, the attention's output, and more."""
        streams = [self.group.share(len(x)) for x in listed(given[0])]
        if self._carried is not None:
            streams = [self._carried.kept(next(one for one in given if is_numbers(one)))]
        seen = [self._to_tokens(one, stream) for one, stream in zip(listed(given[1]), streams)]
        own = self._own(given, "leave", streams)
        own[1] = seen if isinstance(given[1], list | tuple) else seen[0]
        out = self._leave(*own)
        self._carried = None
        sizes = list(zip(*(stream.sizes for stream in streams)))  # by process, then by stream
        pieces = [rows.split(each) for rows, each in zip(self.group.gather(out, [*map(sum, sizes)]), sizes)]
        return torch.cat([piece for stream in zip(*pieces) for piece in stream])

    def _own(self, given: Sequence[Any], region: str, streams: Sequence[Share]) -> list[Any]:
        """The arguments of a region, cut to this process's tokens."""
        per_token = self._regions[region]
        modulation: Tensor = next(one for i, one in enumerate(given) if i not in per_token)

        def cut(one: Any, stream: Share) -> Any:
            if is_numbers(one):
                assert self._carried is not None
                return self._carried.rows(one[stream.own])
            if one is None and len(modulation) > 1:  # the tokens are equal runs, one for each row of modulation
                one = run_of_each([sum(stream.sizes) // len(modulation)] * len(modulation), modulation.device)
            return None if one is None else one[stream.own]

        own = list(given)
        for i in per_token:
            each = [cut(one, stream) for one, stream in zip(listed(given[i]), streams)]
            own[i] = each if isinstance(given[i], list | tuple) else each[0]
        return own

    def _to_heads(self, projected: Sequence[Tensor], tokens: Share) -> Sequence[Tensor]:
        """All-to-all: own tokens of all heads -> all tokens of own heads. projected: q, k and v, each (L, H, E)."""
        stacked = torch.stack(list(projected))
        three, _, heads, width = stacked.shape
        self._heads = self.group.share(heads)
        row = three * self._heads.count * width
        pieces = stacked.split(list(self._heads.sizes), dim=2)
        taken = self.group.exchange(pieces, [n * row for n in tokens.sizes])
        shape = (self._heads.count, width)
        return torch.cat([t.view(three, n, *shape) for t, n in zip(taken, tokens.sizes)], dim=1).unbind()

    def _to_tokens(self, seen: Tensor, tokens: Share) -> Tensor:
        """All-to-all: all tokens of own heads -> own tokens of all heads. seen and the result: (L, H, E) or (L, D)."""
        flat = seen.flatten(1)
        widths = [heads * flat.shape[1] // self._heads.count for heads in self._heads.sizes]
        taken = self.group.exchange(flat.split(list(tokens.sizes)), [tokens.count * width for width in widths])
        whole = torch.cat([t.view(tokens.count, width) for t, width in zip(taken, widths)], dim=1)
        return whole.unflatten(1, (-1, seen.shape[-1])) if seen.ndim == 3 else whole


@dataclass(frozen=True)
class Carried:
    """What a block carries past its attention, for this process's tokens."""

    own: Tensor  # (L, F)
    tokens: Share

    def kept(self, numbers: Tensor) -> Share:
        """How many of the rows with these numbers each process has. numbers: (M, 1), ascending."""
        ends = torch.searchsorted(numbers.flatten(), torch.tensor([*accumulate(self.tokens.sizes)])).tolist()
        return Share([end - start for start, end in zip([0, *ends], ends)], self.tokens.rank)

    def rows(self, numbers: Tensor) -> Tensor:
        """The rows with these numbers. numbers: (M, 1), all among this process's tokens."""
        if len(numbers) == len(self.own):
            return self.own
        return self.own[(numbers.flatten() - self.tokens.own.start).to(self.own.device)]


def listed(one: Any) -> Sequence[Any]:
    """One item for each stream of tokens: the list itself, or a list of the single item."""
    return one if isinstance(one, list | tuple) else [one]


def is_numbers(one: Any) -> bool:
    """Whether an argument is a column of row numbers, in place of what is carried. It is on the CPU: no host sync."""
    return isinstance(one, Tensor) and one.dtype == torch.int64 and one.ndim == 2


# Layers ---------------------------------------------------------------------------------------------------------------


def share_layers(module: nn.Module, group: Group) -> None:
    """Leaves this process its share of the layers of each block of a transformer; block outputs are all-reduced.

    Weights are cut in place, so that only the share of a mapped file is read. Raises InputError where packed weights
    cannot be cut at the boundary.
    """
    module.is_shared = True  # type: ignore[assignment]
    for stack in module.modules():
        if isinstance(stack, Blocks):
            for block in stack:
                share_block(block, group)


class Kept(NamedTuple):
    """What a process keeps of a layer. side: "out" or "in", what is shared out; runs: (start, stop) of each run."""

    side: str
    runs: tuple[tuple[int, int], ...]


def share_block(block: Any, group: Group) -> None:
    """`share_layers` for one block, which declares its layers in `shares`."""
    heads = heads_of(block)
    shares: Shares = block.shares
    for name, (side, *parts) in shares.items():
        layer: Any = block.get_submodule(name)
        size, dim = layer.out_features, layer.in_features
        if side == "in":
            size, dim = dim, size
        hidden = (size - dim * parts.count("heads")) // max(parts.count("hidden"), 1)
        runs, start = [], 0
        for part in parts:
            total, unit = (dim, dim // heads) if part == "heads" else (hidden, unit_of(hidden, group.count))
            own = group.share(total // unit).own
            runs.append((start + own.start * unit, start + own.stop * unit))
            start += total
        own_layer = cut_outputs(layer, runs) if side == "out" else sum_outputs(cut_inputs(layer, runs), group)
        own_layer.kept = Kept(side, tuple(runs))  # type: ignore[assignment]
        above, _, last = name.rpartition(".")
        setattr(block.get_submodule(above), last, own_layer)
    for inner in block.modules():
        if hasattr(inner, "heads"):
            inner.heads = group.share(heads).count  # type: ignore[assignment]


def unit_of(features: int, processes: int) -> int:
    """How many features stay together: a power of two that divides their number."""
    unit = math.gcd(features, UNIT)
    while unit > 1 and features // unit < FEWEST_UNITS * processes:
        unit //= 2
    return unit


def cut_outputs(layer: Any, runs: Sequence[tuple[int, int]]) -> nn.Module:
    """Cuts the layer to these runs of its outputs."""
    bias = None if layer.bias is None else frozen(take_rows(layer.bias, runs))
    if isinstance(layer, PackedLinear):
        return PackedLinear(take_rows(layer.packed, runs), bias, layer.dtype)
    layer.weight, layer.bias = frozen(take_rows(layer.weight, runs)), bias
    layer.out_features = len(layer.weight)
    return layer


def cut_inputs(layer: Any, runs: Sequence[tuple[int, int]]) -> nn.Module:
    """Cuts the layer to these runs of its inputs."""
    if isinstance(layer, PackedLinear):
        return PackedLinear(take_columns(layer.packed, runs), layer.bias, layer.dtype)
    layer.weight = frozen(take_columns(layer.weight, runs))
    layer.in_features = layer.weight.shape[1]
    return layer


def sum_outputs(layer: Any, group: Group) -> nn.Module:
    """Marks the layer for an all-reduce of its outputs in `linear`. Only rank 0 keeps the bias, so it is added once."""
    if group.rank:
        layer.bias = None
    layer.group = group
    return layer


def frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)
