"""Weights packed on their way from one file to another, one at a time, so that memory holds the largest and no more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch

from inkstream.engine.files.sources import PREFIXES, Found
from inkstream.families import Part
from inkstream.quant import QuantName
from inkstream.quant.pack import fits, pack
from inkstream.quant.packed import GGUF, Packed, Weight, unpack
from inkstream.weights.dialects import is_spelt
from inkstream.weights.files import read_header, read_state, strip_prefix
from inkstream.weights.gguf import is_held
from inkstream.weights.keymap import Rule, becomes, matches, translate


@dataclass(frozen=True)
class Quant:
    """What `--quant` asks for."""

    formats: tuple[str, ...]  # the first that a weight fits is taken; none: it stays, or takes `dtype`
    dynamic: bool = False
    dtype: torch.dtype | None = None  # of weights in full
    gguf: bool = False


BATCH = 1 << 28
"""Bytes of weights that are read before they are written, if no single one is larger."""

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
    """The nearest of those that safetensors files hold, for parts that have no name in GGUF."""
    return quant if not quant.gguf else QUANTS["int8" if quant.formats[0] in ("q8_0", "q6_k") else "nf4"]


def plan(found: Found, part: Part, quant: Quant | None, rules: Sequence[Rule]) -> dict[str, Weight]:
    """What `weights` will give, on meta."""
    return translate(rules, prepare(found.tensors, part, quant), back=True)


def weights(found: Found, part: Part, quant: Quant | None, rules: Sequence[Rule]) -> Iterator[tuple[str, Weight]]:
    """All of a part's weights in another layout, those that no module reads too, packed as asked for.

    The files are mapped anew for each few, so that what is done with leaves memory.
    """
    tensors = read_header(found.path).tensors
    raw = strip_prefix({name: name for name in tensors}, PREFIXES)
    sizes = {name: tensors[key].nbytes for name, key in raw.items()}
    for names in _batches(_groups(raw, found.rules, rules), sizes):
        state = read_state(found.path, {raw[name] for name in names})
        ours = translate(found.rules, {name: state[raw[name]] for name in names})
        yield from translate(rules, prepare(ours, part, quant), back=True).items()


def _batches(groups: Sequence[Sequence[str]], sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Groups of names together, up to BATCH bytes where there are several."""
    batch, size = [], 0
    for names in groups:
        own = sum(sizes[name] for name in names)
        if batch and size + own > BATCH:
            yield batch
            batch, size = [], 0
        batch, size = [*batch, *names], size + own
    if batch:
        yield batch


def _groups(names: Iterable[str], into: Sequence[Rule], out: Sequence[Rule]) -> list[list[str]]:
    """Names in the file, together where they can only be translated so, into ours and out of them again."""
    groups: list[tuple[list[str], set[str]]] = []  # and all names that these become
    for name in names:
        ours = becomes(into, name)
        passed = {*ours, *(f"out: {theirs}" for key in ours for theirs in becomes(out, key, back=True))}
        tied = [group for group in groups if group[1] & passed]
        groups = [group for group in groups if not group[1] & passed]
        groups.append(([*(n for group in tied for n in group[0]), name], passed.union(*(group[1] for group in tied))))
    return [group for group, _ in groups]


def prepare(state: Mapping[str, Weight], part: Part, quant: Quant | None) -> dict[str, Weight]:
    """Our names -> weights, packed as asked for."""
    if quant is None:
        return dict(state)
    return {name: _pack(name, weight, part, quant) for name, weight in state.items()}


def _pack(name: str, weight: Weight, part: Part, quant: Quant) -> Weight:
    """One weight as it is to be written."""
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
