"""Key tables: how a published layout names, splits and orders the weights that our modules hold.

A table is a sequence of rules; `translate` applies it, towards our names or back. A pattern is a dotted prefix of a key
that ends at a segment boundary, `{}` standing for one segment; the rest of the key (`.weight`) is carried along. Keys
that no rule names keep their name, so that an unknown one is met, and named, by whoever checks the result.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from inkstream.quant.packed import Packed, Weight, cut, join, unpack
from inkstream.types import InputError

Shape = Literal["same", "swap", "row", "conv1x1"]


@dataclass(frozen=True)
class Rule:
    """Tensors under the patterns `theirs` are, one after the other along the rows, those under `ours`.

    One side has one pattern. No `ours`: the keys are dropped on the way in and not written on the way back.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    shape: Shape = "same"
    heights: tuple[int, ...] = ()  # of the row blocks, in proportion to each other; empty: all are equal


def rename(theirs: str, ours: str, swap: bool = False, row: bool = False, conv1x1: bool = False) -> Rule:
    """The same tensor under another name.

    swap: its two row halves change places. row: theirs may be (D,), ours is (1, D), and so it is written.
    conv1x1: theirs is the weight of a 1x1 convolution (O, I, 1, 1), ours of a linear layer (O, I); biases pass.
    """
    shape: Shape = "swap" if swap else "row" if row else "conv1x1" if conv1x1 else "same"
    return Rule((theirs,), (ours,), shape)


def fuse(*theirs: str, ours: str, heights: Sequence[int] = ()) -> Rule:
    """Several of theirs are one of ours, row blocks in this order: of equal height, or of these proportions."""
    return Rule(theirs, (ours,), heights=tuple(heights))


def split(theirs: str, ours: Sequence[str]) -> Rule:
    """One of theirs is several of ours, row blocks of equal height in this order."""
    return Rule((theirs,), tuple(ours))


def drop(theirs: str) -> Rule:
    """Theirs has what nothing here reads."""
    return Rule((theirs,), ())


def translate(rules: Sequence[Rule], state: Mapping[str, Weight], back: bool = False) -> dict[str, Weight]:
    """State dict in their names -> in ours; with `back`, from ours to theirs. Works on meta tensors too.

    Renaming and splitting give views; fusing and swapping copy; packed weights stay so. InputError where a fused tensor
    lacks a part, where parts do not fit each other, and where two keys would become one.
    """
    out: dict[str, Weight] = {}
    origin: dict[str, str] = {}  # our key -> the one it came from; of a fused one, the first part met
    gathered: dict[str, dict[str, Weight | None]] = {}  # a fused key -> its parts, in their order
    heights: dict[str, tuple[int, ...]] = {}  # a fused key -> its parts' proportions

    def put(name: str, tensor: Weight, key: str) -> None:
        if name in origin:
            raise InputError(f"{origin[name]} and {key} are both {name}: keep one of the two")
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
                put(name, tensor, key)  # holds its place in the order until all parts are there
                gathered[name], heights[name] = dict.fromkeys(sources), rule.heights or (1,) * len(sources)
            gathered[name][key] = tensor
        elif len(targets) > 1:
            for name, part in zip(targets, _cut(key, tensor, rule.heights or (1,) * len(targets))):
                put(name, part, key)
        elif targets:
            put(targets[0], _reshape(key, tensor, rule.shape, back), key)
    for name, parts in gathered.items():
        out[name] = _fuse(name, parts, heights[name])
    return out


def becomes(rules: Sequence[Rule], key: str, back: bool = False) -> list[str]:
    """The names that `translate` gives to what lies under a key, in part or whole; none where it is dropped."""
    hit = _find(rules, key, back)
    if hit is None:
        return [key]
    rule, words, rest = hit
    return [pattern.format(*words) + rest for pattern in (rule.theirs if back else rule.ours)]


def matches(pattern: str, key: str) -> bool:
    """Whether a pattern of a key table names a key."""
    return _compiled(pattern).fullmatch(key) is not None


def _fuse(name: str, parts: Mapping[str, Weight | None], heights: Sequence[int]) -> Weight:
    missing = [key for key, part in parts.items() if part is None]
    if missing:
        raise InputError(f"{name} is made of {len(parts)} parts and {', '.join(missing)} is missing")
    tensors = [part for part in parts.values() if part is not None]
    # What every part's shape would be at a height of one; None where it cannot be cut so.
    units = {
        None if part.ndim == 0 or len(part) % height else (len(part) // height, *part.shape[1:])
        for part, height in zip(tensors, heights)
    }
    if len(units) > 1 or None in units:
        shapes = ", ".join(f"{key} {tuple(part.shape)}" for key, part in zip(parts, tensors))
        raise InputError(f"{name} is made of parts that are not of {_proportions(heights)}: {shapes}")
    return join(tensors)


def _cut(key: str, tensor: Weight, heights: Sequence[int]) -> tuple[Weight, ...]:
    """Views of heights in these proportions."""
    if tensor.ndim == 0 or len(tensor) % sum(heights):
        shape = tuple(tensor.shape)
        raise InputError(f"{key} is {shape}: {len(heights)} parts of {_proportions(heights)} were expected")
    return cut(tensor, [len(tensor) // sum(heights) * height for height in heights])


def _proportions(heights: Sequence[int]) -> str:
    return "equal height" if len(set(heights)) == 1 else f"heights {':'.join(map(str, heights))}"


def _reshape(key: str, tensor: Weight, shape: Shape, back: bool) -> Weight:
    if shape == "swap":
        return join(_cut(key, tensor, (1, 1))[::-1])
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
    """The first rule that names the key, the words in its braces and what is carried."""
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
