"""Key tables translate the weight names of a published layout into the names of our modules, and back.

A table is a sequence of rules; `translate` applies it in either direction. A pattern is a dotted prefix of a key that
ends at a segment boundary. `{}` matches one segment. The rest of the key (such as `.weight`) is kept. A key that no
rule matches keeps its name, so the strict check of the result reports it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from inkstream.quant.packed import Packed, Weight, cut, join, reorder, unpack
from inkstream.types import InputError

Shape = Literal["same", "swap", "row", "conv1x1", "columns", "interleaved"]

HEAD = 128
"""Rows of a head of attention, where a rule's shape is "interleaved"."""


@dataclass(frozen=True)
class Rule:
    """The tensors of the patterns `theirs`, concatenated along the rows, equal the concatenated tensors of `ours`.

    At least one side has exactly one pattern. An empty `ours` means: these keys are dropped when a file is read, and
    not written back.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    shape: Shape = "same"
    heights: tuple[int, ...] = ()  # relative heights of the row blocks; empty: all blocks have the same height


def rename(
    theirs: str,
    ours: str,
    swap: bool = False,
    row: bool = False,
    conv1x1: bool = False,
    interleaved: bool = False,
) -> Rule:
    """Return a rule that renames a tensor.

    swap: the two halves of the rows change places. row: their tensor is (D,) or (1, D), ours is (1, D) and is written
    as (1, D). conv1x1: their tensor is the weight of a 1x1 convolution (O, I, 1, 1), ours is the weight of a linear
    layer (O, I); biases do not change. interleaved: rows of the two halves of each head of 128 alternate in theirs.
    """
    shape: Shape = "swap" if swap else "row" if row else "conv1x1" if conv1x1 else "same"
    shape = "interleaved" if interleaved else shape
    return Rule((theirs,), (ours,), shape)


def fuse(*theirs: str, ours: str, heights: Sequence[int] = ()) -> Rule:
    """Return a rule that joins several of their tensors along the rows, in this order, into one of ours.

    heights: relative heights of the row blocks; all blocks have the same height if it is empty.
    """
    return Rule(theirs, (ours,), heights=tuple(heights))


def fuse_columns(*theirs: str, ours: str, widths: Sequence[int]) -> Rule:
    """Return a rule that joins several of their layers into one that reads their inputs side by side.

    Weights are joined along the columns, and biases are added. widths: relative widths of the columns.
    """
    return Rule(theirs, (ours,), "columns", tuple(widths))


def split(theirs: str, ours: Sequence[str]) -> Rule:
    """Return a rule that splits one of their tensors into several of ours: row blocks of equal height, in order."""
    return Rule((theirs,), tuple(ours))


def drop(theirs: str) -> Rule:
    """Return a rule that ignores their tensor, because nothing here uses it."""
    return Rule((theirs,), ())


def translate(rules: Sequence[Rule], state: Mapping[str, Weight], back: bool = False) -> dict[str, Weight]:
    """Translate a state dict from their names to ours; with `back`, from ours to theirs. Works on meta tensors too.

    Renaming and splitting return views; fusing and swapping copy; packed weights stay packed. Raises InputError if a
    part of a fused tensor is missing, if the shapes of the parts do not match, or if two keys get the same name.
    """
    out: dict[str, Weight] = {}
    origin: dict[str, str] = {}  # our key -> the key it came from; for a fused key, the first part found
    gathered: dict[str, dict[str, Weight | None]] = {}  # fused key -> its parts, in order
    rule_of: dict[str, Rule] = {}  # fused key -> its rule

    def put(name: str, tensor: Weight, key: str) -> None:
        if name in origin:
            raise InputError(f"{origin[name]} and {key} are both {name}: keep only one of the two")
        out[name], origin[name] = tensor, key

    for key, tensor in state.items():
        hit = _find(rules, key, back)
        if hit is None:
            put(key, tensor, key)
            continue
        rule, words, rest = hit
        sources, targets = (
            [pattern.format(*words) + rest for pattern in patterns]
            for patterns in ((rule.ours, rule.theirs) if back else (rule.theirs, rule.ours))
        )
        if len(sources) > 1:
            (name,) = targets
            if name not in gathered:
                put(name, tensor, key)  # a placeholder keeps the position in the order until all parts are found
                gathered[name], rule_of[name] = dict.fromkeys(sources), rule
            gathered[name][key] = tensor
        elif len(targets) > 1:
            cut = _cut_columns if rule.shape == "columns" else _cut
            for name, part in zip(targets, cut(key, tensor, rule.heights or (1,) * len(targets))):
                put(name, part, key)
        elif targets:
            put(targets[0], _reshape(key, tensor, rule.shape, back), key)
    for name, parts in gathered.items():
        rule = rule_of[name]
        whole = _complete(name, parts)
        out[name] = _fuse_columns(whole) if rule.shape == "columns" else _fuse(name, whole, rule.heights)
    return out


def becomes(rules: Sequence[Rule], key: str, back: bool = False) -> list[str]:
    """Return the names that `translate` gives to a key's tensor or to its parts; empty if the key is dropped."""
    hit = _find(rules, key, back)
    if hit is None:
        return [key]
    rule, words, rest = hit
    return [pattern.format(*words) + rest for pattern in (rule.theirs if back else rule.ours)]


def matches(pattern: str, key: str) -> bool:
    """Return whether a pattern of a key table matches a key."""
    return _compiled(pattern).fullmatch(key) is not None


def _complete(name: str, parts: Mapping[str, Weight | None]) -> dict[str, Weight]:
    missing = [key for key, part in parts.items() if part is None]
    if missing:
        raise InputError(
            f"{name} is made of {len(parts)} parts and {', '.join(missing)} is missing: take a complete file"
        )
    return {key: part for key, part in parts.items() if part is not None}


def _fuse_columns(parts: Mapping[str, Weight]) -> Tensor:
    tensors = [part if isinstance(part, Tensor) else unpack(part, torch.bfloat16) for part in parts.values()]
    first = tensors[0]
    if len({part.shape[:1] for part in tensors}) > 1 or len({part.ndim for part in tensors}) > 1:
        shapes = ", ".join(f"{key} {tuple(part.shape)}" for key, part in parts.items())
        raise InputError(f"layers that are one have outputs of different sizes: {shapes}; take another file")
    if first.ndim < 2:
        return torch.stack(tensors).sum(0) if not first.is_meta else first
    if first.is_meta:  # without torch.cat, which would import torch's tracer
        return first.new_empty(len(first), sum(part.shape[1] for part in tensors))
    return torch.cat(tensors, 1)


def _cut_columns(key: str, tensor: Weight, widths: Sequence[int]) -> tuple[Weight, ...]:
    """Cut a weight along the columns; of a bias, the first layer gets all."""
    full = tensor if isinstance(tensor, Tensor) else unpack(tensor, torch.bfloat16)
    if full.ndim < 2:
        return (full, *(torch.zeros_like(full) for _ in widths[1:]))
    if full.shape[1] % sum(widths):
        raise InputError(f"{key} is {tuple(full.shape)}: columns of widths {widths} were expected; take another file")
    return full.split([full.shape[1] // sum(widths) * width for width in widths], 1)


def _fuse(name: str, parts: Mapping[str, Weight], heights: Sequence[int]) -> Weight:
    heights = heights or (1,) * len(parts)
    tensors = list(parts.values())
    # The shape of each part divided by its relative height; None if the rows are not divisible by the height.
    units = {
        None if part.ndim == 0 or len(part) % height else (len(part) // height, *part.shape[1:])
        for part, height in zip(tensors, heights)
    }
    if len(units) > 1 or None in units:
        shapes = ", ".join(f"{key} {tuple(part.shape)}" for key, part in zip(parts, tensors))
        raise InputError(
            f"{name} is made of parts that are not of {_proportions(heights)}: {shapes}; take another file"
        )
    return join(tensors)


def _cut(key: str, tensor: Weight, heights: Sequence[int]) -> tuple[Weight, ...]:
    """Cut a tensor along the rows into views with these relative heights."""
    if tensor.ndim == 0 or len(tensor) % sum(heights):
        shape = tuple(tensor.shape)
        raise InputError(
            f"{key} is {shape}: {len(heights)} parts of {_proportions(heights)} were expected; take another file"
        )
    return cut(tensor, [len(tensor) // sum(heights) * height for height in heights])


def _proportions(heights: Sequence[int]) -> str:
    return "equal height" if len(set(heights)) == 1 else f"heights {':'.join(map(str, heights))}"


def _reshape(key: str, tensor: Weight, shape: Shape, back: bool) -> Weight:
    if shape == "swap":
        return join(_cut(key, tensor, (1, 1))[::-1])
    if shape == "interleaved":
        if len(tensor) % HEAD:
            raise InputError(f"{key} has {len(tensor)} rows, which are not heads of {HEAD}: take another file")
        order = torch.arange(len(tensor)).view(-1, *((2, HEAD // 2) if back else (HEAD // 2, 2))).transpose(1, 2)
        return reorder(tensor, order.flatten())
    if isinstance(tensor, Packed):
        return tensor if shape == "same" else _reshape(key, unpack(tensor), shape, back)
    if shape == "row" and not back:
        return tensor.reshape(1, -1)
    if shape == "conv1x1" and back and tensor.ndim == 2:
        return tensor[:, :, None, None]
    if shape == "conv1x1" and not back and tensor.shape[2:] == (1, 1):
        return tensor[:, :, 0, 0]
    return tensor


def _find(rules: Sequence[Rule], key: str, back: bool) -> tuple[Rule, tuple[str, ...], str] | None:
    """Return the first rule that matches the key, the segments that `{}` matched, and the rest of the key."""
    for rule in rules:
        for pattern in rule.ours if back else rule.theirs:
            if match := _compiled(pattern).fullmatch(key):
                *words, rest = match.groups()
                return rule, tuple(words), rest
    return None


@lru_cache(None)
def _compiled(pattern: str) -> re.Pattern[str]:
    segments = [r"([^.]+)" if s == "{}" else re.escape(s) for s in pattern.split(".")]
    return re.compile(r"\.".join(segments) + r"((?:\..*)?)")
