"""Batches are a function of seed and number: samples, captions and crops. Pictures, latents and tokens are cached."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inkstream.disk import whole_file, whole_folder
from inkstream.families import Family, Pictures
from inkstream.nn.offload import where_it_computes
from inkstream.train.objectives import Batch
from inkstream.train.pictures import Folder, Size, Source, draw_all
from inkstream.types import Conditioning, InputError

FORMAT = 1
"""Version of the caches' format. A new number makes all caches invalid."""
ENCODED_AT_ONCE = 32
"""Captions, or small pictures, in one encoder call."""
PIXELS_AT_ONCE = 1 << 21
"""Pixels in one encoder call, unless a single picture has more."""


@dataclass(frozen=True)
class Preparing:
    """A progress message from the preparation before the first step."""

    what: str
    done: int = 0
    total: int = 0


@dataclass(frozen=True)
class Captions:
    """Tokens of all captions, concatenated. The last caption is the empty one."""

    tokens: np.ndarray  # (T,) int32
    ends: np.ndarray  # (E,) end of each caption in `tokens`
    firsts: np.ndarray  # (N + 1,) index of each picture's first caption; the last item is the empty caption's index

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.ends, prepend=0)

    def span(self, index: int) -> slice:
        """Return the slice of `tokens` that holds one caption."""
        return slice(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))

    def __getitem__(self, index: int) -> tuple[int, ...]:
        return tuple(self.tokens[self.span(index)].tolist())


@dataclass(frozen=True)
class States:
    """Cached outputs of frozen text encoders for all captions. A caption may have more states than tokens."""

    bits: np.ndarray  # (T, D) bfloat16 stored as int16, all captions concatenated, memory-mapped
    ends: np.ndarray  # (E,) end of each caption's states in `bits`
    pooled: np.ndarray | None  # (E, P) float32 vector of each caption, in families that use a pooled vector

    def __getitem__(self, index: int) -> Conditioning:
        bits = self.bits[int(self.ends[index - 1]) if index else 0 : int(self.ends[index])]
        tokens = torch.from_numpy(bits.copy()).view(torch.bfloat16).float()
        pooled = None if self.pooled is None else torch.from_numpy(self.pooled[index : index + 1].copy())
        return Conditioning(tokens, (len(tokens),), pooled)


@dataclass(frozen=True)
class Kept:
    """Cached tensors of all pictures of a source, such as latents of references. Each picture has equally many."""

    values: np.ndarray  # (V,) float16, all one after the other, memory-mapped
    shapes: np.ndarray  # (N, R, 3) shape (C, h, w) of each picture's tensors

    @cached_property
    def ends(self) -> np.ndarray:
        return np.cumsum(self.shapes.prod(-1).reshape(-1))

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        each = self.shapes.shape[1]
        found = []
        for number, shape in enumerate(self.shapes[index], index * each):
            end = int(self.ends[number])
            found.append(torch.from_numpy(self.values[end - shape.prod() : end].reshape(shape).astype(np.float32)))
        return tuple(found)


@dataclass(frozen=True)
class Samples:
    """Pictures of one size. images: (N, H, W, 3) uint8 pixels, or (N, C, h, w) float16 latents."""

    size: Size
    indices: np.ndarray  # (N,) index of each picture in the source
    images: np.ndarray


@dataclass(frozen=True)
class Place:
    """The contents of one batch, as indices."""

    samples: int  # index of the size in Data.samples
    rows: np.ndarray  # (B,) rows of that size's images
    captions: np.ndarray  # (B,) caption of each image


@dataclass(frozen=True)
class Order:
    """How batches are formed: each picture once an epoch, sorted by caption length inside a pool of batches."""

    batch: int  # batch size in samples of the first size
    pieces: int  # equal pieces of a batch (gradient accumulation and processes)
    pool: int  # batches in a pool
    seed: int
    dropout: float  # share of captions replaced by the empty one


@dataclass(frozen=True)
class Stress:
    """How much the loss counts: for each picture of the source, and inside it. None: everywhere the same."""

    repeats: np.ndarray  # (N,) how often each picture comes in an epoch
    weights: np.ndarray  # (N,) float32, of each picture's loss
    prior: np.ndarray  # (N,) bool, whether a picture is of the folder `prior`
    masks: Sequence[np.ndarray] | None = None  # of each picture, (h, w) float32, over its latents


class Data:
    """All samples of a run. `place(n)` returns the indices of batch n; `load` reads the batch or a piece of it."""

    def __init__(
        self, samples: Sequence[Samples], captions: Captions | None, order: Order, cond: States | None = None,
        stress: Stress | None = None, references: Kept | None = None,
        seen: Kept | None = None,
    ):  # fmt: skip
        self.samples = samples
        self.captions = captions
        self.order = order
        self.cond = cond
        self.stress = stress
        self.references = references
        self.seen = seen
        self._epoch = lru_cache(2)(self._epoch)

    def place(self, number: int) -> Place:
        epoch, at = divmod(number, len(self))
        return self._epoch(epoch)[at]

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self._epoch(0))

    def load(self, place: Place, piece: slice = slice(None)) -> Batch:
        """Return float32 latents, or pixels in [-1, 1], with the tokens or the encoded states of their captions."""
        images = torch.from_numpy(self.samples[place.samples].images[place.rows[piece]])
        images = as_pixels(images) if images.dtype == torch.uint8 else images.float()
        if self.captions is None:
            return Batch(images)
        chosen = place.captions[piece]
        weights = masks = prior = None
        pictures = self.samples[place.samples].indices[place.rows[piece]]
        beside = [() if kept is None else [kept[i] for i in pictures] for kept in (self.seen, self.references)]
        if self.stress is not None:
            weights, prior = (torch.from_numpy(each[pictures]) for each in (self.stress.weights, self.stress.prior))
            if self.stress.masks is not None:
                masks = torch.from_numpy(np.stack([self.stress.masks[i] for i in pictures]))
        if self.cond is None:
            return Batch(images, [self.captions[i] for i in chosen], None, weights, masks, prior, *beside)
        return Batch(images, (), Conditioning.pack([self.cond[i] for i in chosen]), weights, masks, prior, *beside)

    def batch_size(self, samples: Samples) -> int:
        """Return the batch size of a size: about as many tokens as a batch of the first size, in equal pieces."""
        first = self.samples[0].images[0].size
        wanted = self.order.batch * first // samples.images[0].size
        return max(wanted // self.order.pieces, 1) * self.order.pieces

    def _epoch(self, number: int) -> list[Place]:
        """Return an epoch's batches, shuffled. Each picture occurs once, or `repeats` times, with one of its captions
        or the empty one."""
        rng = np.random.default_rng([self.order.seed, number])
        places = []
        for which, samples in enumerate(self.samples):
            size = self.batch_size(samples)
            every = np.arange(len(samples.indices))
            if self.stress is not None:
                every = np.repeat(every, self.stress.repeats[samples.indices])
            rows = rng.permutation(every)
            chosen = self._choose(samples.indices[rows], rng)
            if short := -len(rows) % size:  # pad the last batch with the first rows
                rows, chosen = np.resize(rows, len(rows) + short), np.resize(chosen, len(rows) + short)
            for start in range(0, len(rows), size * self.order.pool):
                here = slice(start, start + size * self.order.pool)
                sort = self._sorted(chosen[here])
                cuts = len(sort) // size
                pairs = zip(np.split(rows[here][sort], cuts), np.split(chosen[here][sort], cuts))
                places += [Place(which, *pair) for pair in pairs]
        return [places[i] for i in rng.permutation(len(places))]

    def _choose(self, pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Draw one caption for each picture, or the empty caption with probability `dropout`."""
        if self.captions is None:
            return np.zeros(len(pictures), int)
        first, end = self.captions.firsts[pictures], self.captions.firsts[pictures + 1]
        chosen = first + (rng.random(len(pictures)) * (end - first)).astype(int)
        return np.where(rng.random(len(pictures)) < self.order.dropout, self.captions.firsts[-1], chosen)

    def _sorted(self, captions: np.ndarray) -> np.ndarray:
        """Return the order that sorts captions by length."""
        if self.captions is None:
            return np.arange(len(captions))
        return np.argsort(self.captions.lengths[captions], kind="stable")


class Endless:
    """An endless source: every batch draws new pictures, and nothing is cached."""

    captions = None
    cond = None

    def __init__(self, source: Source, order: Order):
        self.source = source
        self.order = order

    def place(self, number: int) -> Place:
        size = self.order.batch
        return Place(0, np.arange(number * size, (number + 1) * size), np.zeros(size, int))

    def load(self, place: Place, piece: slice = slice(None)) -> Batch:
        pictures = [self.source.picture(int(i)) for i in place.rows[piece]]
        return Batch(as_pixels(torch.from_numpy(np.stack(pictures))))


def as_pixels(images: Tensor) -> Tensor:
    """Convert (B, H, W, 3) uint8 to (B, 3, H, W) float32 in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def crop(pixels: Tensor, side: int, seeds: Sequence[int], tries: int = 3) -> Tensor:
    """Cut a random square from each picture, by its seed. A square of almost one colour is drawn again.

    pixels: (B, 3, H, W); seeds: one for each picture; tries: most draws. Returns (B, 3, side, side).
    """
    height, width = pixels.shape[2:]
    side = min(side, height, width)
    cut = []
    for picture, seed in zip(pixels, seeds, strict=True):
        rng, piece = np.random.default_rng(seed), picture
        for _ in range(tries):
            y, x = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
            piece = picture[:, y : y + side, x : x + side]
            if piece.std() > 0.06:
                break
        cut.append(piece)
    return torch.stack(cut)


def stress_of(source: Source, count: int, family: Family, floor: float) -> Stress | None:
    """Return how much the loss counts on a source's pictures; None if everywhere the same. floor: of a black mask."""
    if not isinstance(source, Folder):
        return None
    plain = set(source.repeats) == {1} and set(source.weights) == {1.0} and not any(source.prior)
    masks = None
    if any(source.masks):
        grids = [family.latent_shape(*source.size(i))[1:] for i in range(count)]
        masks = [floor + (1 - floor) * source.mask(i, (w, h)) for i, (h, w) in enumerate(grids)]
        if empty := [i for i, mask in enumerate(masks) if mask.sum() == 0]:
            raise InputError(f"the mask of {source.files[empty[0]]} is black everywhere: remove the picture")
    if plain and masks is None:
        return None
    repeats, weights, prior = (np.array(each) for each in (source.repeats, source.weights, source.prior))
    return Stress(repeats, weights.astype(np.float32), prior, masks)


# Caches -------------------------------------------------------------------------------------------------------------


def keep_pixels(source: Source, count: int, folder: Path, workers: int) -> Iterator[Preparing | list[Samples]]:
    """Draw all pictures as uint8 into the cache, or read the cache. Yields Preparing messages, then the samples."""
    key = cache_key("pixels", source.key(), count)
    shapes = {size: (size[1], size[0], 3) for size in _sizes(source, count)}

    def draw(files: dict[Size, np.ndarray]) -> Iterator[int]:
        yield from _fill(source, count, workers, files, lambda pictures, size: np.stack(pictures))

    yield from _kept(source, count, folder / f"pixels-{key}", shapes, np.uint8, "drawing pictures", draw)


def keep_latents(
    source: Source, count: int, folder: Path, workers: int, family: Family, vae_key: str
) -> Iterator[Preparing | list[Samples]]:
    """Draw and encode all pictures as float16 latents into the cache, or read the cache.

    The latents are the autoencoder's means, shifted and scaled for the transformer. Yields Preparing messages, then the
    samples.
    """
    key = cache_key("latents", source.key(), count, vae_key)
    shapes = {size: family.latent_shape(*size) for size in _sizes(source, count)}
    device, _ = where_it_computes(family.vae)  # type: ignore[attr-defined]

    def encode(pictures: list[np.ndarray], size: Size) -> np.ndarray:
        pixels = torch.from_numpy(np.stack(pictures)).to(device).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            return family.encode_image(pixels).half().cpu().numpy()

    def draw(files: dict[Size, np.ndarray]) -> Iterator[int]:
        yield from _fill(source, count, workers, files, encode)

    yield from _kept(source, count, folder / f"latents-{key}", shapes, np.float16, "encoding pictures", draw)


def keep_captions(
    source: Source, count: int, each: int, folder: Path, family: Family, words_key: str, references: int = 0
) -> Iterator[Preparing | Captions]:
    """Tokenize up to `each` captions of each picture, or read the cache. Yields Preparing messages, then Captions.

    references: the number of reference pictures of each picture.
    """
    path = folder / f"captions-{cache_key(source.key(), count, each, words_key)}.npz"
    if not path.is_file():
        tokens: list[tuple[int, ...]] = []
        firsts = [0]
        for index in range(count):
            if index % 500 == 0:
                yield Preparing("reading captions", index, count)
            tokens += [family.tokens(text, references) for text in source.captions(index, each)]
            firsts.append(len(tokens))
        tokens.append(family.tokens("", references))
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary, temporary.open("wb") as file:
            np.savez(
                file, tokens=np.array([i for ids in tokens for i in ids], np.int32),
                ends=np.cumsum([len(ids) for ids in tokens]), firsts=np.array(firsts),
            )  # fmt: skip
    with np.load(path, allow_pickle=False) as file:
        yield Captions(file["tokens"], file["ends"], file["firsts"])


def keep_seen(
    what: str, source: Source, count: int, folder: Path, see: Callable[[int], Sequence[Tensor]], key: Any
) -> Iterator[Preparing | Kept]:
    """Keep what a model sees of each picture beside it, or read the cache. Yields Preparing messages, then Kept.

    see: index of a picture -> tensors (C, h, w). key: what they depend on, beside the source.
    """
    path = folder / f"{what}-{cache_key(source.key(), count, key)}"
    if not path.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        with whole_folder(path) as temporary:
            shapes = []
            with (temporary / "values.bin").open("wb") as file:
                for index in range(count):
                    with torch.no_grad():
                        seen = [tensor.to("cpu", torch.float16).contiguous() for tensor in see(index)]
                    shapes.append([tensor.shape for tensor in seen])
                    for tensor in seen:
                        tensor.numpy().tofile(file)
                    if index % ENCODED_AT_ONCE == 0:
                        yield Preparing(f"encoding {what}", index, count)
            np.save(temporary / "shapes.npy", np.array(shapes))
    yield Kept(np.memmap(path / "values.bin", np.float16, "r"), np.load(path / "shapes.npy"))


def look_at(source: Source, family: Family, index: int) -> Sequence[Tensor]:
    """Return the latents of a picture's references, as drawing sees them.

    Raises InputError if the family does not read references as latents.
    """
    pictures = Pictures(*source.size(index), source.references(index))
    seen = family.look(family.encode(""), pictures).references
    if not seen:
        raise InputError(f"{family.spec.name} does not read references as latents: take a model that does")
    return seen


def keep_states(
    source: Source, count: int, captions: Captions, folder: Path, family: Family, encoder_key: Any
) -> Iterator[Preparing | States]:
    """Encode all captions with the text encoders, or read the cache. Yields Preparing messages, then States."""
    path = folder / f"states-{cache_key(source.key(), count, encoder_key)}"
    number = len(captions.ends)
    if not path.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        lengths: list[int] = []
        pooled: list[np.ndarray] = []
        with whole_folder(path) as temporary:
            with (temporary / "tokens.bin").open("wb") as file:  # appended: the number of rows is unknown
                for start in range(0, number, ENCODED_AT_ONCE):
                    some = range(start, min(start + ENCODED_AT_ONCE, number))
                    with torch.no_grad():
                        cond = family.encode_tokens([captions[i] for i in some])
                    cond.tokens.to("cpu", torch.bfloat16).view(torch.int16).numpy().tofile(file)
                    lengths += cond.lengths
                    if cond.pooled is not None:
                        pooled.append(cond.pooled.float().cpu().numpy())
                    yield Preparing("encoding captions", some[-1] + 1, number)
            np.save(temporary / "ends.npy", np.cumsum(lengths))
            if pooled:
                np.save(temporary / "pooled.npy", np.concatenate(pooled))
    ends, vectors = np.load(path / "ends.npy"), path / "pooled.npy"
    bits = np.memmap(path / "tokens.bin", np.int16, "r").reshape(int(ends[-1]), -1)
    yield States(bits, ends, np.load(vectors) if vectors.is_file() else None)


def cache_key(*parts: Any) -> str:
    """Return a hash of everything that a cache depends on."""
    text = json.dumps([FORMAT, *parts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_key(state: dict[str, Tensor], config: Any) -> str:
    """Return a hash of a part's weights and config."""
    digest = hashlib.sha256(repr(config).encode())
    for name in sorted(state):
        digest.update(name.encode() + state[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _sizes(source: Source, count: int) -> dict[Size, list[int]]:
    """Group the pictures' indices by size, in the order of each size's first picture."""
    found: dict[Size, list[int]] = {}
    for index in range(count):
        found.setdefault(source.size(index), []).append(index)
    return found


def _fill(
    source: Source, count: int, workers: int, files: dict[Size, np.ndarray],
    encode: Callable[[list[np.ndarray], Size], np.ndarray],
) -> Iterator[int]:  # fmt: skip
    """Draw and encode the pictures of each size in chunks and write them into its file. Yields the number done."""
    done = 0
    for size, indices in _sizes(source, count).items():
        waiting: list[np.ndarray] = []
        at, most = 0, max(1, min(ENCODED_AT_ONCE, PIXELS_AT_ONCE // (size[0] * size[1])))
        for picture in draw_all(source, indices, workers):
            waiting.append(picture)
            if len(waiting) == most or at + len(waiting) == len(indices):
                files[size][at : at + len(waiting)] = encode(waiting, size)
                at, done = at + len(waiting), done + len(waiting)
                waiting = []
                yield done


def _kept(
    source: Source, count: int, folder: Path, shapes: dict[Size, tuple[int, ...]], dtype: Any, what: str,
    draw: Callable[[dict[Size, np.ndarray]], Iterator[int]],
) -> Iterator[Preparing | list[Samples]]:  # fmt: skip
    """Read a cache folder with one array for each size, or build it. The folder is renamed into place when complete."""
    sizes = _sizes(source, count)
    names = {size: f"{size[0]}x{size[1]}.npy" for size in sizes}
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(folder) as temporary:
            files: dict[Size, Any] = {
                size: np.lib.format.open_memmap(
                    temporary / names[size], "w+", dtype, shape=(len(sizes[size]), *shapes[size])
                )
                for size in sizes
            }
            for done in draw(files):
                yield Preparing(what, done, count)
            for file in files.values():
                file.flush()
    yield [Samples(size, np.array(sizes[size]), np.load(folder / names[size], mmap_mode="r")) for size in sizes]
