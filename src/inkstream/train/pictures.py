"""What is learnt from, as numbered pictures with captions. Torch-free, so that workers start at once."""

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
"""The number of the first scene that is held out: beyond all that are trained on."""
CHUNK = 64
"""Pictures that a worker hands over at once."""


class Source(Protocol):
    """Numbered pictures. Everything is a function of the number, and a source can be sent to another process."""

    def size(self, index: int) -> Size:
        """The width and height that picture `index` is drawn at."""
        ...

    def picture(self, index: int) -> np.ndarray:
        """(H, W, 3) uint8."""
        ...

    def captions(self, index: int, count: int) -> list[str]:
        """At least one and up to `count` captions; the first is the plain one."""
        ...

    def key(self) -> Any:
        """JSON that changes when the pictures do."""
        ...


@dataclass(frozen=True)
class Scenes:
    """Scenes of a grammar, drawn and described."""

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
    """Pictures of a folder: captions stand in NAME.txt beside NAME.png, or in a .jsonl with `file_name` and `text`."""

    files: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    places: tuple[Size, ...]  # the size that each is brought to
    stamps: tuple[tuple[int, int], ...]  # bytes and time of change

    def size(self, index: int) -> Size:
        return self.places[index]

    def picture(self, index: int) -> np.ndarray:
        """Scaled to cover its size, then cut to it around the middle."""
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
    """The pictures of a recipe and how many there are; 0 is no end. InputError where there are none.

    hold_out: of a folder, one picture in twenty by the hash of its name is not trained on.
    """
    if data.source == "scenes":
        scenes = Scenes(
            data.sizes, Grammar.from_table(data.grammar), _wording(data.wording),
            data.first if split == "train" else HELD_OUT_FROM, split,
        )  # fmt: skip
        scenes.picture(0)  # says at once what is wrong with a grammar
        return scenes, data.count
    folder = _open_folder(Path(data.source).expanduser(), data.sizes)
    chosen = [i for i, name in enumerate(folder.files) if not hold_out or _is_held_out(name) == (split == "held_out")]
    if not chosen:
        raise InputError(f"{data.source} has too few pictures to hold some out: set [run] held_out = 0")
    picked = {f.name: tuple(getattr(folder, f.name)[i] for i in chosen) for f in fields(Folder)}
    return replace(folder, **picked), len(chosen)


def draw_all(source: Source, indices: Sequence[int], workers: int) -> Iterator[np.ndarray]:
    """The pictures of these numbers, in order, drawn by so many processes; 0 draws them here."""
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
        raise InputError(f"[data] source = {str(root)!r} is no folder: give one that holds pictures, or scenes")
    listed = _listed(root)
    rows = []
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES):
        beside = path.with_suffix(".txt")
        text = [beside.read_text("utf-8").strip()] if beside.is_file() else listed.get(path.resolve(), [])
        if not text:
            raise InputError(f"{path} has no caption: write it into {beside.name} beside it, or into a .jsonl")
        try:
            with Image.open(path) as image:
                shape = ImageOps.exif_transpose(image).size if image.getexif() else image.size
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read as a picture ({error}): remove it or save it again") from error
        stat = path.stat()
        rows.append((str(path), tuple(text), nearest_size(shape, sizes), (stat.st_size, stat.st_mtime_ns)))
    if not rows:
        raise InputError(f"{root} holds no picture ({', '.join(SUFFIXES)})")
    return Folder(*map(tuple, zip(*rows)))


def _listed(root: Path) -> dict[Path, list[str]]:
    """Captions of the folder's .jsonl files."""
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
    """Of the sizes the one of the nearest aspect; of those the largest that needs no enlarging, else the smallest."""

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
    """A hash of the code and the data that scenes are drawn and described by."""
    import inkstream.pocket

    digest = hashlib.sha256()
    root = Path(inkstream.pocket.__path__[0])
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".toml", ".png", ".json", ".npz", ".webp")):
        if "weights" not in path.parts:
            with suppress(OSError):
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
