"""One transformer on several devices: around its blocks, each process computes a share and tells the others.

`share_tokens`: every process has all weights. Before and behind attention each has a run of the tokens, in attention a
run of the heads (DeepSpeed-Ulysses, arXiv 2309.14509); where numbers do not divide evenly, runs differ by one.
`share_layers`: every process has a run of each block's heads and of its feed-forward's features, with the weights of
these alone, and what blocks add is summed over all (Megatron-LM, arXiv 1909.08053).

Blocks know of neither. They say which of what their regions take has a row for each token (`regions`), and what the
outputs or inputs of their layers are (`shares`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from inkstream.nn.layers import run_of_each
from inkstream.nn.quant import PackedLinear
from inkstream.nn.stack import Blocks
from inkstream.quant.packed import take_columns, take_rows

Shares = Mapping[str, tuple[str, ...]]
"""Of a block: a layer's name -> "out" or "in", whether its outputs or its inputs are shared out, and of what these are,
one after the other: "heads", of all of them, or "hidden", features of a width of their own."""
UNIT = 256
"""Features that stay together, if there are many: kernels like it, and packed weights are cut between blocks only."""
FEWEST_UNITS = 4
"""For each process, so that their shares differ by less than a quarter."""


@dataclass(frozen=True)
class Share:
    """How many of something each process has, run after run, and which run is this one's."""

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
    """The processes that compute one forward together, of which this is number `rank`.

    Everything here is done by all of them, with tensors of the same shapes. Tensors on meta are not sent: what comes
    back is of the shapes that it would be.
    """

    rank: int
    count: int
    members: dist.ProcessGroup | None = None  # None: all there are

    def share(self, total: int) -> Share:
        """So many, as evenly as they go."""
        return Share([total // self.count + (i < total % self.count) for i in range(self.count)], self.rank)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of what all give, in the same memory."""
        if not x.is_meta:
            dist.all_reduce(x, group=self.members)
        return x

    def exchange(self, pieces: Sequence[Tensor], sizes: Sequence[int]) -> Sequence[Tensor]:
        """Give each process one of the pieces; what each gives back, flat and of these sizes."""
        given = torch.cat([piece.reshape(-1) for piece in pieces])
        taken = given.new_empty(sum(sizes))
        if not given.is_meta:
            dist.all_to_all_single(taken, given, list(sizes), [p.numel() for p in pieces], group=self.members)
        return taken.split(list(sizes))

    def gather(self, rows: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Every process's rows. rows: (sizes[rank], D); they are sent as if all had as many as the one with most."""
        most = max(sizes)
        if len(rows) < most:
            rows = torch.cat((rows, rows.new_empty(most - len(rows), *rows.shape[1:])))
        taken = [torch.empty_like(rows) for _ in sizes]
        if not rows.is_meta:
            dist.all_gather(taken, rows.contiguous(), group=self.members)
        return [theirs[:size] for theirs, size in zip(taken, sizes)]


def heads_of(module: nn.Module) -> int:
    """The heads of a transformer's attention."""
    return next(heads for layer in module.modules() if isinstance(heads := getattr(layer, "heads", None), int))


# Tokens ---------------------------------------------------------------------------------------------------------------


def share_tokens(module: nn.Module, group: Group) -> None:
    """From now on the processes of a group share the tokens of each block of a transformer."""
    module.is_shared = True  # type: ignore[assignment]
    for stack in module.modules():
        if isinstance(stack, Blocks):
            for block in stack:
                own = OwnTokens(block, group)
                block.enter, block.leave = own.enter, own.leave  # type: ignore[assignment]


class OwnTokens:
    """A block's two regions, on the tokens of this process.

    What goes into `enter` and comes out of `leave` is of all tokens. Between them are queries, keys and values of all
    tokens and of this process's heads, so that whatever attention does with sequences, or remembers, is as ever. What
    a block carries past its attention stays where it was computed: the numbers of its rows go along in its stead,
    and those that arrive at `leave` say which rows it goes on with.
    """

    def __init__(self, block: Any, group: Group):
        self.group = group
        self._enter: Callable[..., Any] = block.enter
        self._leave: Callable[..., Tensor] = block.leave
        self._regions: Mapping[str, Sequence[int]] = block.regions
        self._heads = Share([], 0)
        self._carried: Carried | None = None

    def enter(self, *given: Any) -> Any:
        """As the block's own, whose results are queries, keys, values and what is carried; of each stream, if there are
        several."""
        streams = [self.group.share(len(x)) for x in listed(given[0])]
        results = self._enter(*self._own(given, "enter", streams))
        if isinstance(results, list):
            return [self._to_heads(qkv, stream) for qkv, stream in zip(results, streams)]
        q, k, v, *rest = results
        (tokens,) = streams
        self._carried = Carried(rest[0], tokens) if rest else None
        return *self._to_heads((q, k, v), tokens), *(torch.arange(sum(tokens.sizes))[:, None] for _ in rest)

    def leave(self, *given: Any) -> Tensor:
        """As the block's own, which is given what came in, what attention saw, and more."""
        streams = [self.group.share(len(x)) for x in listed(given[0])]
        if self._carried is not None:
            streams = [self._carried.kept(next(one for one in given if is_numbers(one)))]
        seen = [self._to_tokens(one, stream) for one, stream in zip(listed(given[1]), streams)]
        own = self._own(given, "leave", streams)
        own[1] = seen if isinstance(given[1], list | tuple) else seen[0]
        out = self._leave(*own)
        self._carried = None
        sizes = list(zip(*(stream.sizes for stream in streams)))  # of each process, of each stream
        pieces = [rows.split(each) for rows, each in zip(self.group.gather(out, [*map(sum, sizes)]), sizes)]
        return torch.cat([piece for stream in zip(*pieces) for piece in stream])

    def _own(self, given: Sequence[Any], region: str, streams: Sequence[Share]) -> list[Any]:
        """What a region is given, of this process's tokens."""
        per_token = self._regions[region]
        modulation: Tensor = next(one for i, one in enumerate(given) if i not in per_token)

        def cut(one: Any, stream: Share) -> Any:
            if is_numbers(one):
                assert self._carried is not None
                return self._carried.rows(one[stream.own])
            if one is None and len(modulation) > 1:  # tokens of as many equal runs, each with a row of it
                one = run_of_each([sum(stream.sizes) // len(modulation)] * len(modulation), modulation.device)
            return None if one is None else one[stream.own]

        own = list(given)
        for i in per_token:
            each = [cut(one, stream) for one, stream in zip(listed(given[i]), streams)]
            own[i] = each if isinstance(given[i], list | tuple) else each[0]
        return own

    def _to_heads(self, projected: Sequence[Tensor], tokens: Share) -> Sequence[Tensor]:
        """Own tokens of all heads -> all tokens of own heads. projected: queries, keys and values, each (L, H, E)."""
        stacked = torch.stack(list(projected))
        three, _, heads, width = stacked.shape
        self._heads = self.group.share(heads)
        row = three * self._heads.count * width
        pieces = stacked.split(list(self._heads.sizes), dim=2)
        taken = self.group.exchange(pieces, [n * row for n in tokens.sizes])
        shape = (self._heads.count, width)
        return torch.cat([t.view(three, n, *shape) for t, n in zip(taken, tokens.sizes)], dim=1).unbind()

    def _to_tokens(self, seen: Tensor, tokens: Share) -> Tensor:
        """All tokens of own heads -> own tokens of all heads. seen: (L, H, E) or (L, D), and so is what comes back."""
        flat = seen.flatten(1)
        widths = [heads * flat.shape[1] // self._heads.count for heads in self._heads.sizes]
        taken = self.group.exchange(flat.split(list(tokens.sizes)), [tokens.count * width for width in widths])
        whole = torch.cat([t.view(tokens.count, width) for t, width in zip(taken, widths)], dim=1)
        return whole.unflatten(1, (-1, seen.shape[-1])) if seen.ndim == 3 else whole


@dataclass(frozen=True)
class Carried:
    """What a block carries past its attention, of this process's tokens."""

    own: Tensor  # (L, F)
    tokens: Share

    def kept(self, numbers: Tensor) -> Share:
        """Rows of these numbers, each with the process that has it. numbers: (M, 1), ascending."""
        ends = torch.searchsorted(numbers.flatten(), torch.tensor([*accumulate(self.tokens.sizes)])).tolist()
        return Share([end - start for start, end in zip([0, *ends], ends)], self.tokens.rank)

    def rows(self, numbers: Tensor) -> Tensor:
        """Those rows. numbers: (M, 1), all of this process's tokens."""
        if len(numbers) == len(self.own):
            return self.own
        return self.own[(numbers.flatten() - self.tokens.own.start).to(self.own.device)]


def listed(one: Any) -> Sequence[Any]:
    """Of each stream of tokens, where there are several, else of the one."""
    return one if isinstance(one, list | tuple) else [one]


def is_numbers(one: Any) -> bool:
    """Whether it stands for what is carried: a column of row numbers. On the CPU: nothing waits for the device."""
    return isinstance(one, Tensor) and one.dtype == torch.int64 and one.ndim == 2


# Layers ---------------------------------------------------------------------------------------------------------------


def share_layers(module: nn.Module, group: Group) -> None:
    """Leave this process its share of the layers of each block of a transformer; all of them add up what blocks add.

    Weights are cut where they are, so that of those in a mapped file only the share is read. InputError where packed
    weights cannot be cut there.
    """
    module.is_shared = True  # type: ignore[assignment]
    for stack in module.modules():
        if isinstance(stack, Blocks):
            for block in stack:
                share_block(block, group)


def share_block(block: Any, group: Group) -> None:
    """The same for one block, which tells of its layers in `shares`."""
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
        above, _, last = name.rpartition(".")
        setattr(block.get_submodule(above), last, own_layer)
    for inner in block.modules():
        if hasattr(inner, "heads"):
            inner.heads = group.share(heads).count  # type: ignore[assignment]


def unit_of(features: int, processes: int) -> int:
    """How many of so many features stay together: a power of two that divides them."""
    unit = math.gcd(features, UNIT)
    while unit > 1 and features // unit < FEWEST_UNITS * processes:
        unit //= 2
    return unit


def cut_outputs(layer: Any, runs: Sequence[tuple[int, int]]) -> nn.Module:
    """The layer, giving these runs of its outputs alone."""
    bias = None if layer.bias is None else frozen(take_rows(layer.bias, runs))
    if isinstance(layer, PackedLinear):
        return PackedLinear(take_rows(layer.packed, runs), bias, layer.dtype)
    layer.weight, layer.bias = frozen(take_rows(layer.weight, runs)), bias
    layer.out_features = len(layer.weight)
    return layer


def cut_inputs(layer: Any, runs: Sequence[tuple[int, int]]) -> nn.Module:
    """The layer, taking these runs of its inputs alone."""
    if isinstance(layer, PackedLinear):
        return PackedLinear(take_columns(layer.packed, runs), layer.bias, layer.dtype)
    layer.weight = frozen(take_columns(layer.weight, runs))
    layer.in_features = layer.weight.shape[1]
    return layer


def sum_outputs(layer: Any, group: Group) -> nn.Module:
    """The layer, whose outputs `linear` sums over all processes. Its bias is in that once."""
    if group.rank:
        layer.bias = None
    layer.group = group
    return layer


def frozen(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight, requires_grad=False)
