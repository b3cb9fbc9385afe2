"""Training data: numbered pictures with captions. The module does not import torch, so workers start fast."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from pathlib import Path
from random import Random
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image, ImageOps

from inkstream.pocket.captions import Wording, caption, draw_caption
from inkstream.pocket.draw import render
from inkstream.pocket.grammar import Grammar, sample, stretch
from inkstream.train import recipe as recipes
from inkstream.types import InputError

Size = tuple[int, int]  # width, height
Split = Literal["train", "held_out"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
HELD_OUT_FROM = 1 << 40
"""Index of the first held-out scene. All training scenes have lower indices."""
CHUNK = 64
"""Pictures that a worker returns in one message."""


class Source(Protocol):
    """Numbered pictures. All results are functions of the index, and a source can be pickled."""

    def size(self, index: int) -> Size:
        """Return width and height of a picture in pixels."""
        ...

    def picture(self, index: int) -> np.ndarray:
        """Return the picture, (H, W, 3) uint8."""
        ...

    def captions(self, index: int, count: int) -> list[str]:
        """Return 1 to `count` captions of a picture."""
        ...

    def key(self) -> Any:
        """Return JSON-like data that changes when the pictures change. It is the cache key."""
        ...


@dataclass(frozen=True)
class Scenes:
    """Scenes of a grammar with generated captions."""

    sizes: tuple[Size, ...]
    grammar: Grammar
    wording: Wording
    first: int = 0
    split: Split = "train"

    def size(self, index: int) -> Size:
        return self.sizes[index % len(self.sizes)]

    def picture(self, index: int) -> np.ndarray:
        return np.array(render(stretch(self._scene(index), *self.size(index)), *self.size(index)))

    def captions(self, index: int, count: int) -> list[str]:
        scene = self._scene(index)
        if self.split == "held_out":
            return [caption(scene)]
        rng = Random(self.first + index)
        return [draw_caption(scene, self.wording, rng) for _ in range(count)]

    def key(self) -> Any:
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**own, "grammar": asdict(self.grammar), "wording": asdict(self.wording), "renderer": _renderer()}

    def _scene(self, index: int) -> Any:
        return sample(self.grammar, self.first + index, self.split)


@dataclass(frozen=True)
class Folder:
    """Pictures of a folder. NAME.txt beside NAME.png has the caption, or a .jsonl file with `file_name` and `text`."""

    files: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    places: tuple[Size, ...]  # each picture's training size
    stamps: tuple[tuple[int, int], ...]  # size in bytes and modification time in ns

    def size(self, index: int) -> Size:
        return self.places[index]

    def picture(self, index: int) -> np.ndarray:
        """Return the picture, scaled to cover its training size and cropped around the centre."""
        with Image.open(self.files[index]) as image:
            upright = ImageOps.exif_transpose(image).convert("RGB")
        return np.array(ImageOps.fit(upright, self.places[index], Image.Resampling.LANCZOS))

    def captions(self, index: int, count: int) -> list[str]:
        return list(self.texts[index][:count])

    def key(self) -> Any:
        return asdict(self)

    def __len__(self) -> int:
        return len(self.files)


def open_source(data: recipes.Data, split: Split = "train", hold_out: bool = False) -> tuple[Source, int]:
    """Return a recipe's pictures and their number; 0 means endless. Raises InputError if there are none.

    hold_out: hold out one picture in twenty of a folder, chosen by the hash of its name.
    """
    if data.source == "scenes":
        scenes = Scenes(
            data.sizes, Grammar.from_table(data.grammar), _wording(data.wording),
            data.first if split == "train" else HELD_OUT_FROM, split,
        )  # fmt: skip
        scenes.picture(0)  # raises now if the grammar is wrong
        return scenes, data.count
    folder = _open_folder(Path(data.source).expanduser(), data.sizes)
    chosen = [i for i, name in enumerate(folder.files) if not hold_out or _is_held_out(name) == (split == "held_out")]
    if not chosen:
        raise InputError(f"{data.source} has too few pictures to hold some out: set [run] held_out = 0")
    picked = {f.name: tuple(getattr(folder, f.name)[i] for i in chosen) for f in fields(Folder)}
    return replace(folder, **picked), len(chosen)


def draw_all(source: Source, indices: Sequence[int], workers: int) -> Iterator[np.ndarray]:
    """Yield the pictures of the indices, in order. workers: processes that draw; 0 draws in this process."""
    chunks = [indices[i : i + CHUNK] for i in range(0, len(indices), CHUNK)]
    draw = partial(_draw_chunk, source)
    if workers == 0 or len(chunks) < 2:
        for chunk in chunks:
            yield from draw(chunk)
        return
    with multiprocessing.get_context("spawn").Pool(min(workers, len(chunks))) as pool:
        for pictures in pool.imap(draw, chunks):
            yield from pictures


def _draw_chunk(source: Source, indices: Sequence[int]) -> list[np.ndarray]:
    return [source.picture(index) for index in indices]


def _wording(table: dict[str, Any]) -> Wording:
    known = {f.name for f in fields(Wording)}
    for name, value in table.items():
        if name not in known:
            raise InputError(f"[data.wording] has no key {name}: it takes {', '.join(sorted(known))}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise InputError(f"[data.wording] {name} = {value!r}: give a share from 0 to 1")
    return Wording(**table)


def _open_folder(root: Path, sizes: Sequence[Size]) -> Folder:
    if not root.is_dir():
        raise InputError(f"[data] source = {str(root)!r} is not a folder: give a folder of pictures, or scenes")
    listed = _listed(root)
    rows = []
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES):
        beside = path.with_suffix(".txt")
        text = [beside.read_text("utf-8").strip()] if beside.is_file() else listed.get(path.resolve(), [])
        if not text:
            raise InputError(f"{path} has no caption: write it into {beside.name} beside it, or into a .jsonl file")
        try:
            with Image.open(path) as image:
                shape = ImageOps.exif_transpose(image).size if image.getexif() else image.size
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read as a picture ({error}): remove it or save it again") from error
        stat = path.stat()
        rows.append((str(path), tuple(text), nearest_size(shape, sizes), (stat.st_size, stat.st_mtime_ns)))
    if not rows:
        raise InputError(f"{root} holds no picture: add {', '.join(SUFFIXES)} files")
    return Folder(*map(tuple, zip(*rows)))


def _listed(root: Path) -> dict[Path, list[str]]:
    """Return the captions in the folder's .jsonl files, by picture path."""
    found: dict[Path, list[str]] = {}
    for file in sorted(root.glob("*.jsonl")):
        for number, line in enumerate(file.read_text("utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                found.setdefault((root / row["file_name"]).resolve(), []).append(str(row["text"]))
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{file} line {number} has no file_name and text ({error})") from error
    return found


def nearest_size(shape: Size, sizes: Sequence[Size]) -> Size:
    """Return the size with the nearest aspect ratio.

    Among equal aspect ratios, it is the largest size that needs no upscaling, or else the smallest size.
    """

    def distance(size: Size) -> float:
        return round(abs(np.log((size[0] / size[1]) / (shape[0] / shape[1]))), 3)

    near = min(map(distance, sizes))
    alike = sorted((s for s in sizes if distance(s) == near), key=lambda s: s[0] * s[1])
    fitting = [s for s in alike if s[0] <= shape[0] and s[1] <= shape[1]]
    return fitting[-1] if fitting else alike[0]


def _is_held_out(name: str) -> bool:
    return hashlib.sha256(Path(name).name.encode()).digest()[0] < 13


@lru_cache(maxsize=1)
def _renderer() -> str:
    """Return a hash of Pocket's code and data, which draw and describe scenes."""
    import inkstream.pocket

    digest = hashlib.sha256()
    root = Path(inkstream.pocket.__path__[0])
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".toml", ".png", ".json", ".npz", ".webp")):
        if "weights" not in path.parts:
            with suppress(OSError):
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
