"""Read and write GGUF files: named values, then tensors in ggml's formats, memory-mapped and left packed."""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inkstream.quant.packed import FORMATS, Packed, Weight
from inkstream.types import InputError

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = 32

PLAIN = {
    0: torch.float32, 1: torch.float16, 30: torch.bfloat16, 28: torch.float64,
    24: torch.int8, 25: torch.int16, 26: torch.int32, 27: torch.int64,
}  # fmt: skip
PACKED = {
    2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0",
    10: "q2_k", 11: "q3_k", 12: "q4_k", 13: "q5_k", 14: "q6_k", 20: "iq4_nl", 23: "iq4_xs",
}  # fmt: skip
OTHERS = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S",
    22: "IQ2_S", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}  # fmt: skip
"""ggml's numbers for tensor types: PLAIN are ordinary tensors, PACKED are packed ones, OTHERS are not supported."""

FILE_TYPES = {
    "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9,
    "q2_k": 10, "q3_k": 12, "q4_k": 14, "q5_k": 16, "q6_k": 18,
}  # fmt: skip
"""Value of `general.file_type` for a file that has most of its weights in the format."""

ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""Prefix of the values that hold a tensor's shape before it was flattened to fill blocks."""

_SIMPLE = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_SHORT = 16
"""Longest list that is read, in entries. Longer lists, such as a tokenizer's words, are skipped."""


@dataclass(frozen=True)
class Entry:
    """Shape, type and position of a tensor in a file."""

    shape: tuple[int, ...]
    kind: int  # a key of PLAIN or PACKED
    start: int  # offset in the file, in bytes
    size: int  # in bytes


@dataclass(frozen=True)
class Contents:
    """The header of a file: its named values and the position of each tensor."""

    values: dict[str, Any]
    entries: dict[str, Entry]


def read_gguf(path: Path, only: Collection[str] | None = None, on_meta: bool = False) -> dict[str, Weight]:
    """Return a file's tensors as views of the memory-mapped file, or on meta without data if `on_meta` is true.

    only: the names to read; all if it is None. Raises InputError, which names the file, if the file is cut short or
    damaged, or if it holds a format that is not supported.
    """
    entries = read_contents(path).entries
    if on_meta:
        return {name: _weight(torch.empty(e.size, dtype=torch.uint8, device="meta"), e) for name, e in entries.items()}
    mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    return {
        name: _weight(mapped[entry.start : entry.start + entry.size], entry)
        for name, entry in entries.items()
        if only is None or name in only
    }


def read_metadata(path: Path) -> dict[str, str]:
    """Return a file's values as text, without long lists. Raises InputError as `read_gguf` does."""
    return {name: str(value) for name, value in read_contents(path).values.items() if value is not None}


def read_contents(path: Path, whole: Collection[str] = ()) -> Contents:
    """Return the values and the tensors' positions, checked against the file's size. Raises as `read_gguf` does.

    whole: names of values that are read in full even if they are long lists.
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
            if start == b"version ":
                raise InputError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull`")
            if start[:4] != MAGIC or len(start) < 8:
                raise InputError(f"{path} is cut short or not a GGUF file: download it again")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, data, whole)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from error
    except (struct.error, ValueError, OverflowError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged or cut short ({error}): download it again") from error


class _Cursor:
    """Reads a file's header from start to end. Raises struct.error or ValueError if the header ends early."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 4

    def number(self, kind: str) -> Any:
        (value,) = struct.unpack_from("<" + kind, self.data, self.at)
        self.at += struct.calcsize("<" + kind)
        return value

    def skip(self, count: int) -> int:
        start, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise ValueError("the header ends early")
        return start

    def text(self) -> str:
        length = self.number("Q")
        start = self.skip(length)
        return self.data[start : start + length].decode("utf-8")

    def value(self, kind: int, whole: bool = False) -> Any:
        """Read a value. Returns None for a list of more than _SHORT entries, unless `whole` is true."""
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_known(_SIMPLE, kind))
        inner, count = self.number("I"), self.number("Q")
        if inner in _SIMPLE and (whole or count > _SHORT):
            start = self.skip(count * struct.calcsize("<" + _SIMPLE[inner]))
            return struct.unpack_from(f"<{count}{_SIMPLE[inner]}", self.data, start) if whole else None
        if inner == _STRING and count > _SHORT and not whole:
            for _ in range(count):
                self.skip(self.number("Q"))
            return None
        return tuple(self.value(inner) for _ in range(count))


def _parse(path: Path, data: mmap.mmap, whole: Collection[str] = ()) -> Contents:
    cursor = _Cursor(data)
    version = cursor.number("I")
    if version not in (2, 3):
        raise InputError(
            f"{path} is GGUF of version {version}: take a file of version 2 or 3 in little-endian byte order"
        )
    tensors, count = cursor.number("Q"), cursor.number("Q")
    values: dict[str, Any] = {}
    for _ in range(count):
        name = cursor.text()
        values[name] = cursor.value(cursor.number("I"), name in whole)
    alignment = values.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 8 or alignment % 8:
        raise ValueError(f"an alignment of {alignment!r}")
    found: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensors):
        name = cursor.text()
        axes = cursor.number("I")
        if axes > 8 or name in found:
            raise ValueError(f"{name} occurs twice" if name in found else f"{name} has {axes} axes")
        shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
        found[name] = (shape, cursor.number("I"), cursor.number("Q"))
    begin = -(-cursor.at // alignment) * alignment
    entries = {name: _entry(path, name, *place, begin, values) for name, place in found.items()}
    end = max((entry.start + entry.size for entry in entries.values()), default=0)
    if len(data) < end:
        raise InputError(f"{path} is cut short, it has {len(data):,} of {end:,} bytes: download it again")
    return Contents(values, entries)


def _entry(
    path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int, begin: int, values: Mapping[str, Any]
) -> Entry:
    if kind not in PLAIN and kind not in PACKED:
        title = OTHERS.get(kind, f"number {kind}")
        raise InputError(f"{path} holds {name} as {title}, which is not supported: take a Q8_0, Q6_K or Q4_K file")
    if offset % 8:
        raise ValueError(f"{name} has an offset of {offset}, which is not a multiple of 8")
    count = math.prod(shape)
    if count == 0:
        raise ValueError(f"{name} is {shape}, which holds no numbers")
    if kind in PLAIN:
        size = count * PLAIN[kind].itemsize
    else:
        form = FORMATS[PACKED[kind]]
        if not shape or shape[-1] % form.numbers:
            raise ValueError(f"{name} is {shape}, and its rows are not divisible into blocks of {form.numbers}")
        size = count // form.numbers * form.bytes
    original = values.get(ORIGINAL_SHAPE + name)
    if original is not None:
        if not isinstance(original, tuple) or math.prod(original) != count:
            raise ValueError(f"{name} is {shape}, which does not match its original shape {original}")
        shape = original
    return Entry(shape, kind, begin + offset, size)


def _weight(raw: Tensor, entry: Entry) -> Weight:
    """Return a weight as a view of its bytes. raw: (bytes,) uint8."""
    if entry.kind in PLAIN:
        return raw.view(PLAIN[entry.kind]).view(entry.shape)
    name = PACKED[entry.kind]
    rows = entry.shape[0] if entry.shape and entry.size % (entry.shape[0] * FORMATS[name].bytes) == 0 else 1
    return Packed(name, raw.view(rows, -1), entry.shape)


def _known(table: Mapping[int, str], kind: int) -> str:
    if kind not in table:
        raise ValueError(f"a value has the unknown type {kind}")
    return table[kind]


# Writing ------------------------------------------------------------------------------------------------------------


def write_gguf(
    path: Path,
    plan: Mapping[str, Weight],
    weights: Iterable[tuple[str, Weight]],
    values: Mapping[str, str | int],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a file one weight at a time.

    plan: name -> weight of the file, which may be on meta. weights: the same names with their data, in any order.
    progress: called with the size in bytes of each written weight. Raises ValueError if plan and weights differ, or if
    GGUF has no type for a format.
    """
    header = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(plan), len(values)))
    for name, value in values.items():
        header += _text(name)
        header += struct.pack("<I", 4 if isinstance(value, int) else _STRING)
        header += struct.pack("<I", value) if isinstance(value, int) else _text(value)
    places: dict[str, tuple[int, int]] = {}
    end = 0
    for name, weight in plan.items():
        header += _text(name) + struct.pack("<I", max(1, weight.ndim))
        header += b"".join(struct.pack("<Q", n) for n in (tuple(weight.shape) or (1,))[::-1])
        header += struct.pack("<IQ", _kind(name, weight), end)
        places[name] = (end, weight.nbytes)
        end += -(-weight.nbytes // ALIGNMENT) * ALIGNMENT
    begin = -(-len(header) // ALIGNMENT) * ALIGNMENT
    with path.open("wb") as file:
        file.write(header)
        for name, weight in weights:
            offset, size = places.pop(name)
            if weight.nbytes != size:
                raise ValueError(f"{name} has {weight.nbytes} bytes, {size} were planned")
            raw = weight.data if isinstance(weight, Packed) else weight.detach()
            file.seek(begin + offset)
            file.write(raw.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            if progress is not None:
                progress(size)
        file.truncate(begin + end)
    if places:
        raise ValueError(f"nothing was written for {', '.join(places)}")


def is_held(weight: Weight) -> bool:
    """Return whether GGUF has a type for the weight's format or dtype."""
    return _format(weight) in (*PLAIN.values(), *PACKED.values())


def _kind(name: str, weight: Weight) -> int:
    for kind, held in (*PLAIN.items(), *PACKED.items()):
        if held == _format(weight):
            return kind
    raise ValueError(f"{name} is {_format(weight)}, which GGUF has no type for")


def _format(weight: Weight) -> str | torch.dtype:
    return weight.format if isinstance(weight, Packed) else weight.dtype


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data
