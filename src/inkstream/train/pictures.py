"""Training data: numbered pictures with captions. The module does not import torch, so workers start fast."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
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
from inkstream.pocket.edits import Edit, instruction, sample_edit
from inkstream.pocket.grammar import Grammar, sample, stretch
from inkstream.pocket.scenes import Scene
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

    def references(self, index: int) -> list[Image.Image]:
        """Return the pictures, RGB, that a picture is drawn from. All pictures of a source have equally many."""
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
        return np.array(render(self.scene(index), *self.size(index)))

    def scene(self, index: int) -> Scene:
        """Return a picture's scene as it lies in a picture of its size."""
        return stretch(self._scene(index), *self.size(index))

    def captions(self, index: int, count: int) -> list[str]:
        scene = self._scene(index)
        if self.split == "held_out":
            return [caption(scene)]
        rng = Random(self.first + index)
        return [draw_caption(scene, self.wording, rng) for _ in range(count)]

    def references(self, index: int) -> list[Image.Image]:
        return []

    def key(self) -> Any:
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**own, "grammar": asdict(self.grammar), "wording": asdict(self.wording), "renderer": _renderer()}

    def _scene(self, index: int) -> Scene:
        return sample(self.grammar, self.first + index, self.split)


@dataclass(frozen=True)
class Edits(Scenes):
    """Scenes after an edit. The scene before it is the reference, and the captions are instructions."""

    def picture(self, index: int) -> np.ndarray:
        return np.array(self._draw(self._edit(index).after, index))

    def captions(self, index: int, count: int) -> list[str]:
        edit, rng = self._edit(index), Random(self.first + index)
        if self.split == "held_out":
            return [instruction(edit)]
        languages = rng.choices(("en", "zh"), (self.wording.english, 1 - self.wording.english), k=count)
        return [instruction(edit, language, rng) for language in languages]

    def references(self, index: int) -> list[Image.Image]:
        return [self._draw(self._edit(index).before, index)]

    def _draw(self, scene: Scene, index: int) -> Image.Image:
        return render(stretch(scene, *self.size(index)), *self.size(index))

    def _edit(self, index: int) -> Edit:
        return sample_edit(self.grammar, self.first + index, self.split)


@dataclass(frozen=True)
class Folder:
    """Pictures of a folder. NAME.txt beside NAME.png has the caption, or a .jsonl or .csv file with names and texts."""

    files: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    places: tuple[Size, ...]  # each picture's training size
    stamps: tuple[tuple[int, int], ...]  # size in bytes and modification time in ns
    repeats: tuple[int, ...]  # how often each picture comes in an epoch
    weights: tuple[float, ...]  # of each picture's loss
    prior: tuple[bool, ...]  # whether a picture is of the folder `prior`
    masks: tuple[str, ...]  # each picture's mask: a file, "alpha" for its own transparency, or "" for none
    others: tuple[tuple[str, ...], ...]  # files of the references of each picture

    def size(self, index: int) -> Size:
        return self.places[index]

    def picture(self, index: int) -> np.ndarray:
        """Return the picture, scaled to cover its training size and cropped around the centre."""
        return np.array(self._fit(self.files[index], "RGB", self.places[index]))

    def mask(self, index: int, grid: Size) -> np.ndarray:
        """Return where the loss counts, (h, w) float32 in [0, 1]. grid: width and height of the latents."""
        width, height = grid
        mask = self.masks[index]
        if not mask:
            return np.ones((height, width), np.float32)
        if mask == "alpha":
            fitted = self._fit(self.files[index], "RGBA", self.places[index]).getchannel("A")
        else:
            fitted = self._fit(mask, "L", self.places[index])
        return np.array(fitted.resize(grid, Image.Resampling.BOX), np.float32) / 255

    def _fit(self, file: str, mode: str, size: Size) -> Image.Image:
        return ImageOps.fit(open_upright(file, mode), size, Image.Resampling.LANCZOS)

    def captions(self, index: int, count: int) -> list[str]:
        return list(self.texts[index][:count])

    def references(self, index: int) -> list[Image.Image]:
        return [open_upright(file, "RGB") for file in self.others[index]]

    def key(self) -> Any:
        stamps = [[_stamp(file) for file in files] for files in self.others]
        own = {"references": [self.others, stamps]} if any(self.others) else {}
        return {**own, "files": self.files, "texts": self.texts, "places": self.places, "stamps": self.stamps}

    def __len__(self) -> int:
        return len(self.files)

    def chosen(self, rows: Sequence[int]) -> Folder:
        """Return some of the pictures."""
        return Folder(*(tuple(getattr(self, f.name)[i] for i in rows) for f in fields(Folder)))

    def joined(self, other: Folder) -> Folder:
        """Return the pictures of both."""
        return Folder(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Folder)))


SCENES = {"scenes": Scenes, "edits": Edits}
"""Values of [data] source that name what the renderer draws. Others are folders."""


def open_source(data: recipes.Data, split: Split = "train", hold_out: bool = False) -> tuple[Source, int]:
    """Return a recipe's pictures and their number; 0 means endless. Raises InputError if there are none.

    hold_out: hold out one picture in twenty of a folder, chosen by the hash of its name. Pictures of `prior` are all
    for training.
    """
    if kind := SCENES.get(data.source):
        scenes = kind(
            data.sizes, Grammar.from_table(data.grammar), _wording(data.wording),
            data.first if split == "train" else HELD_OUT_FROM, split,
        )  # fmt: skip
        scenes.picture(0)  # raises now if the grammar is wrong
        return scenes, data.count
    once = replace(data, repeats=1) if split == "held_out" else data
    folder = _open_folder(Path(data.source).expanduser(), once, "source")
    chosen = [i for i, name in enumerate(folder.files) if not hold_out or _is_held_out(name) == (split == "held_out")]
    if not chosen:
        raise InputError(f"{data.source} has too few pictures to hold some out: set [run] held_out = 0")
    folder = folder.chosen(chosen)
    if data.prior and split == "train":
        alike = replace(data, trigger="", repeats=1, mask="")
        folder = folder.joined(_open_folder(Path(data.prior).expanduser(), alike, "prior"))
    return folder, len(folder)


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


def _open_folder(root: Path, data: recipes.Data, key: Literal["source", "prior"]) -> Folder:
    if not root.is_dir():
        raise InputError(f"[data] {key} = {str(root)!r} is not a folder: give a folder of pictures")
    listed = _listed(root)
    masks = data.mask and data.mask != "alpha" and Path(data.mask).expanduser()
    others = [Path(folder).expanduser() for folder in data.references]
    beside_it = [*others, *([masks] if masks else [])]
    rows = []
    for path in sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES):
        if any(path.is_relative_to(folder) for folder in beside_it):
            continue
        beside = path.with_suffix(".txt")
        text = [beside.read_text("utf-8").strip()] if beside.is_file() else listed.get(path.resolve(), [])
        if not text and key == "prior" and data.prior_caption:
            text = [data.prior_caption]
        if not text and not data.trigger:
            raise InputError(
                f"{path} has no caption: write it into {beside.name} beside it, into a .jsonl or .csv file, or name "
                f"what all pictures show in [data] {'trigger' if key == 'source' else 'prior_caption'}"
            )
        try:
            with Image.open(path) as image:
                shape = ImageOps.exif_transpose(image).size if image.getexif() else image.size
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read as a picture ({error}): remove it or save it again") from error
        if data.buckets and min(shape) < data.buckets:
            size = f"{shape[0]}x{shape[1]}"
            raise InputError(f"{path} is {size}, smaller than [data] buckets = {data.buckets}: remove it or lower this")
        place = bucket_size(shape, data.sizes[0], data.buckets) if data.buckets else nearest_size(shape, data.sizes)
        texts = tuple(with_trigger(one, data.trigger) for one in text or [""])
        weight = 1.0 if key == "source" else data.prior_weight
        mask = namesake(path, masks, "mask") if masks else data.mask
        seen = tuple(namesake(path, folder, "references") for folder in others)
        rows.append((str(path), texts, place, _stamp(path), data.repeats, weight, key == "prior", mask, seen))
    if not rows:
        raise InputError(f"{root} holds no picture: add {', '.join(SUFFIXES)} files")
    return Folder(*map(tuple, zip(*rows)))


def namesake(picture: Path, folder: Path, key: Literal["mask", "references", "map"]) -> str:
    """Return the file in another folder that has a picture's name. Raises InputError if it is not there."""
    found = next((file for s in SUFFIXES if (file := folder / f"{picture.stem}{s}").is_file()), None)
    if found is None:
        what = {
            "mask": "white where it counts",
            "references": f"the picture that {picture.name} is drawn from",
            "map": f"the control picture of {picture.name}",
        }[key]
        table = "control" if key == "map" else "data"
        raise InputError(f"[{table}] {key} = {str(folder)!r} holds no {picture.stem}.png: add it, {what}")
    return str(found)


def open_upright(file: str, mode: str) -> Image.Image:
    """Return the picture in a file, upright. Raises InputError if it cannot be read."""
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert(mode)
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read as a picture ({error}): remove it or save it again") from error


def _stamp(file: Path | str) -> tuple[int, int]:
    stat = Path(file).stat()
    return stat.st_size, stat.st_mtime_ns


def with_trigger(caption: str, trigger: str) -> str:
    """Return a caption with the trigger in the place of [trigger], or before it if it is not in the caption yet."""
    if "[trigger]" in caption:
        return caption.replace("[trigger]", trigger)
    if not trigger or trigger.lower() in caption.lower():
        return caption
    return f"{trigger}, {caption}" if caption else trigger


NAMES, TEXTS = ("file_name", "image", "file", "path"), ("text", "caption", "prompt")
"""Names of the columns of .jsonl and .csv files: imagefolder's, DiffSynth's and kohya's."""


def _listed(root: Path) -> dict[Path, list[str]]:
    """Return the captions in the folder's .jsonl and .csv files, by picture path."""
    found: dict[Path, list[str]] = {}
    for file in sorted([*root.glob("*.jsonl"), *root.glob("*.csv")]):
        for number, row in _rows(file):
            name, text = (next((row[k] for k in names if row.get(k)), None) for names in (NAMES, TEXTS))
            if not isinstance(name, str) or not isinstance(text, str):
                raise InputError(f"{file} line {number} has no {NAMES[0]} and {TEXTS[0]}: add both")
            found.setdefault((root / name).resolve(), []).append(text)
    return found


def _rows(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yield the rows of a .jsonl or .csv file with their line numbers. Raises InputError for what is not a row."""
    text = file.read_text("utf-8-sig")
    if file.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        yield from ((reader.line_num, row) for row in reader)
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InputError(f"{file} line {number} is not JSON ({error}): correct it") from error
        yield number, row if isinstance(row, dict) else {}


def bucket_size(shape: Size, most: Size, step: int) -> Size:
    """Return the training size of a picture: the nearest aspect ratio, then the most pixels.

    Its sides are multiples of `step`, none is longer than the picture's, and it has at most the pixels of `most`.
    shape: of the picture, both sides at least `step`.
    """
    width, height = shape
    area = most[0] * most[1]
    scale = min(1.0, (area / (width * height)) ** 0.5)

    def sides(length: int) -> list[int]:
        low = max(int(length * scale) // step, 1) * step
        return [side for side in (low, low + step) if side <= length]

    sizes = [(w, h) for w in sides(width) for h in sides(height) if w * h <= area] or [(step, step)]
    return min(sizes, key=lambda size: (round(abs(np.log(size[0] / size[1] * height / width)), 6), -size[0] * size[1]))


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
