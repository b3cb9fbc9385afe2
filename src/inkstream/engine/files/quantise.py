"""Packs weights on the way from one file to another. Memory holds at most BATCH bytes, or the largest single weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch

from inkstream.engine.files.parts import Found
from inkstream.families import Part
from inkstream.quant import QuantName
from inkstream.quant.pack import fits, pack
from inkstream.quant.packed import GGUF, Packed, Weight, unpack
from inkstream.weights.dialects import is_spelt
from inkstream.weights.files import in_section, read_header, read_state
from inkstream.weights.gguf import is_held
from inkstream.weights.keymap import Rule, becomes, matches, translate
from inkstream.weights.lora.merge import Merge


@dataclass(frozen=True)
class Quant:
    """How `--quant` packs weights."""

    formats: tuple[str, ...]  # in order of preference; a weight that fits none is not packed
    dynamic: bool = False  # activations are quantised at run time too, where the hardware can multiply the format
    dtype: torch.dtype | None = None  # of weights that are not packed; None keeps theirs
    gguf: bool = False  # written as a GGUF file


BATCH = 1 << 28
"""The most bytes of weights that are read before they are written, unless a single weight is larger."""

QUANTS: dict[str, Quant] = {
    "fp8": Quant(("e4m3",), dynamic=True),
    "int8": Quant(("int8",)),
    "w8a8": Quant(("int8",), dynamic=True),
    "nf4": Quant(("nf4", "int8")),
    "int4": Quant(("int4", "int8")),
    **{name: Quant((name, "q8_0"), gguf=True) for name in GGUF},
    "bf16": Quant((), dtype=torch.bfloat16),
    "fp16": Quant((), dtype=torch.float16),
}
assert set(QUANTS) == set(get_args(QuantName))


def in_safetensors(quant: Quant) -> Quant:
    """The nearest precision for safetensors files. A part without a GGUF architecture takes it."""
    return quant if not quant.gguf else QUANTS["int8" if quant.formats[0] in ("q8_0", "q6_k") else "nf4"]


def plan(
    found: Found, part: Part, quant: Quant | None, rules: Sequence[Rule], merge: Merge | None = None
) -> dict[str, Weight]:
    """The weights that `weights` will yield, on meta."""
    return translate(rules, prepare(found.tensors, part, quant, merge), back=True)


def weights(
    found: Found, part: Part, quant: Quant | None, rules: Sequence[Rule], merge: Merge | None = None
) -> Iterator[tuple[str, Weight]]:
    """All of a part's weights in another layout, packed. Weights that no module reads are included.

    merge: adapters that change the weights before they are packed.
    The files are mapped again for every batch, so that the batches already written leave memory.
    """
    tensors = read_header(found.path).tensors
    raw = in_section({name: name for name in tensors}, found.section)
    sizes = {name: tensors[key].nbytes for name, key in raw.items()}
    for names in _batches(_groups(raw, found.rules, rules), sizes):
        state = read_state(found.path, {raw[name] for name in names})
        ours = translate(found.rules, {name: state[raw[name]] for name in names})
        yield from translate(rules, prepare(ours, part, quant, merge), back=True).items()


def _batches(groups: Sequence[Sequence[str]], sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Joins groups of names into batches of at most BATCH bytes. A larger group is a batch of its own."""
    batch: list[str] = []
    size = 0
    for names in groups:
        own = sum(sizes[name] for name in names)
        if batch and size + own > BATCH:
            yield batch
            batch, size = [], 0
        batch, size = [*batch, *names], size + own
    if batch:
        yield batch


def _groups(names: Iterable[str], into: Sequence[Rule], out: Sequence[Rule]) -> list[list[str]]:
    """Groups the file's names: names that a rule joins or splits, on the way in or out, are in one group."""
    groups: list[tuple[list[str], set[str]]] = []  # names in the file, all names that they become
    for name in names:
        ours = becomes(into, name)
        passed = {*ours, *(f"out: {theirs}" for key in ours for theirs in becomes(out, key, back=True))}
        tied = [group for group in groups if group[1] & passed]
        groups = [group for group in groups if not group[1] & passed]
        groups.append(([*(n for group in tied for n in group[0]), name], passed.union(*(group[1] for group in tied))))
    return [group for group, _ in groups]


def prepare(
    state: Mapping[str, Weight], part: Part, quant: Quant | None, merge: Merge | None = None
) -> dict[str, Weight]:
    """Packs a state dict in our names. quant: None keeps the weights. merge: adapters that change them first."""

    def packed(name: str, weight: Weight) -> Weight:
        return weight if quant is None else _pack(name, weight, part, quant)

    def changed(name: str, weight: Weight) -> Weight:
        if merge is None or name not in merge.names:
            return packed(name, weight)
        return merge.change(name, weight, packed(name, weight.to("meta")))

    return {name: changed(name, weight) for name, weight in state.items()}


def _pack(name: str, weight: Weight, part: Part, quant: Quant) -> Weight:
    """One weight in the precision in which it is written."""
    is_packed = isinstance(weight, Packed)
    if name.endswith(".weight") and any(matches(pattern, name) for pattern in part.packs):
        form = next((form for form in quant.formats if fits(form, tuple(weight.shape))), None)
        if form is not None:
            is_same = is_packed and (weight.format, weight.dynamic) == (form, quant.dynamic)
            return weight if is_same else pack(form, unpack(weight) if is_packed else weight, quant.dynamic)
    if quant.formats and weight.ndim > 1 and (is_held(weight) if quant.gguf else is_spelt(weight)):
        return weight
    full = torch.float32 if quant.gguf and weight.ndim < 2 else quant.dtype or torch.bfloat16
    if is_packed:
        return unpack(weight, full)
    return weight if not quant.gguf and quant.dtype is None else weight.to(full)
