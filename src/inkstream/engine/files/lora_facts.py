"""What an adapter's file says of itself: its header, and the files that other programs put beside it. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from inkstream.families.fits import Sizes, block_of
from inkstream.types import InputError, as_object
from inkstream.weights.header import read_raw_header
from inkstream.weights.lora.keys import BASES, TEXT, TRIGGERS, read_key

PREVIEWS = (".preview.png", ".png", ".preview.jpg", ".jpg", ".jpeg", ".preview.webp", ".webp")
"""Endings of a picture beside NAME.safetensors, the best first. A1111 and its relatives write them."""
THUMBNAIL = "modelspec.thumbnail"
"""The entry of the metadata with a picture, as a data URL."""
INPUTS = ("down", "hada_w1_b", "hada_w2_b", "diff", "set_weight")
"""Roles of tensors whose second size is the width of their layer's input."""
RANKS = ("down", "hada_w1_b", "hada_w2_b", "lokr_w1_b", "lokr_w2_b")
"""Roles of tensors whose first size is a rank."""
NO_SIZES = Sizes(frozenset(), frozenset(), {})
LONGEST = 300
"""The most characters of a text that is taken from the metadata."""


@dataclass(frozen=True)
class Facts:
    """What is known of an adapter's file. error: why it cannot be used, else empty; then nothing else is known.

    strength: the preferred one, from A1111's NAME.json. hint: a text about the use. sizes: which models it fits.
    """

    title: str = ""
    triggers: tuple[str, ...] = ()
    base: str = ""
    ranks: tuple[int, ...] = ()
    size: int = 0
    strength: float | None = None
    hint: str = ""
    sizes: Sizes = NO_SIZES
    has_preview: bool = False
    error: str = ""


def read_facts(file: Path) -> Facts:
    """Read what is known of a file. An unchanged file is read once. The facts and the error name no folder."""
    return _read(file, _stamp(file), _stamp(file.with_suffix(".json")), picture_beside(file))


def find_preview(file: Path) -> str | None:
    """The picture of an adapter, as a path or a data URL: the picture beside the file, or else that in its metadata."""
    if beside := picture_beside(file):
        return str(beside)
    given = read_raw_header(file).metadata.get(THUMBNAIL)
    return given if isinstance(given, str) and given.startswith("data:") else None


def picture_beside(file: Path) -> Path | None:
    """The picture beside a file."""
    pictures = (file.with_name(file.stem + ending) for ending in PREVIEWS)
    return next((picture for picture in pictures if picture.is_file()), None)


def _stamp(file: Path) -> tuple[int, int] | None:
    """Time of the last change in nanoseconds, and size in bytes; None without a file."""
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=4096)
def _read(
    file: Path, stamp: tuple[int, int] | None, beside: tuple[int, int] | None, picture: Path | None
) -> Facts:  # the stamps are part of the cache's key
    size = stamp[1] if stamp else 0
    try:
        entries, metadata, _ = read_raw_header(file)
        ranks, sizes = _measure(entries)
    except InputError as error:
        return Facts(file.stem, size=size, error=str(error).replace(str(file), file.name))
    told = _read_json(file.with_suffix(".json")) if beside else {}
    weight = told.get("preferred weight")
    return Facts(
        title=_first(metadata, ("modelspec.title", "ss_output_name")) or file.stem,
        triggers=_split(_first(metadata, TRIGGERS) or str(told.get("activation text") or "")),
        base=_last_name(_first(metadata, BASES)),
        ranks=ranks,
        size=size,
        strength=float(weight) if isinstance(weight, int | float) and weight and -10 <= weight <= 10 else None,
        hint=_first(metadata, ("modelspec.usage_hint",)),
        sizes=sizes,
        has_preview=picture is not None or _first(metadata, (THUMBNAIL,)).startswith("data:"),
    )


def _measure(entries: Mapping[str, Any]) -> tuple[tuple[int, ...], Sizes]:
    """The ranks and the sizes that a file's tensors have. Raises InputError if it has no tensors of an adapter."""
    ranks: set[int] = set()
    inputs: set[int] = set()
    inside: set[int] = set()
    blocks: dict[str, int] = {}
    known = 0
    for key, entry in entries.items():
        part, shape = read_key(key), entry["shape"]
        if not part.role or TEXT.match(key):
            continue
        known += part.role != "weight"
        block = block_of(part.path)
        if block:
            blocks[block[0]] = max(blocks.get(block[0], 0), block[1] + 1)
        if len(shape) >= 2 and part.role in RANKS:
            ranks.add(shape[0])
        if len(shape) >= 2 and part.role in INPUTS:
            inputs.add(shape[1])
            if block:
                inside.add(shape[1])
    if not known:
        raise InputError("the file holds no tensors of an adapter for a transformer: use another file")
    return tuple(sorted(ranks)), Sizes(frozenset(inputs), frozenset(inside), blocks)


def _first(metadata: Mapping[str, Any], keys: Iterable[str]) -> str:
    """The first entry of the metadata that is a text and not empty. Only a thumbnail is longer than LONGEST."""
    for key in keys:
        if isinstance(value := metadata.get(key), str) and value.strip():
            return value if key == THUMBNAIL else value.strip()[:LONGEST]
    return ""


def _split(text: str) -> tuple[str, ...]:
    """The trigger words of a text: its parts between commas, each once."""
    return tuple(dict.fromkeys(word for part in text[:LONGEST].split(",") if (word := part.strip())))


def _last_name(base: str) -> str:
    """A base model without the folders of the machine that trained the adapter."""
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(base).is_absolute() or base.startswith(("~", ".")):
            return kind(base).name
    return base


def _read_json(file: Path) -> dict[str, Any]:
    """A1111's facts about a file; empty if they cannot be read, because they are not needed."""
    try:
        return as_object(json.loads(file.read_bytes())) or {}
    except (OSError, ValueError, RecursionError):
        return {}
