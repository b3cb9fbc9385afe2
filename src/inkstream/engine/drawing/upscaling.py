"""Enlarging pictures: by a network in overlapping tiles, by Lanczos resampling, or by both."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from inkstream.engine.files.upscalers import find_upscaler
from inkstream.families.upscalers import Upscaler, build_upscaler
from inkstream.sampling.windows import firsts_of
from inkstream.types import InputError
from inkstream.weights import torch_file
from inkstream.weights.files import read_tensors
from inkstream.weights.torch_file import read_torch_file

TILE = 256
"""The side of a tile in pixels of the smaller picture. ESRGAN needs 0.8 GiB for it beside its weights."""
OVERLAP = 48
"""Pixels that neighbouring tiles have in common, at least. They fade over the middle half, and the rest is context."""
LARGEST = 2**28
"""A larger picture is refused, in pixels."""

Enlarging = Generator[tuple[int, int], None, Image.Image]
"""Yields the number of tiles that are done, and of all. Returns the picture."""


@dataclass(frozen=True)
class Loaded:
    """An upscaling model. name: as the user gave it; architecture: a name in `families.upscalers.ARCHITECTURES`."""

    name: str
    architecture: str
    network: Upscaler
    device: torch.device


class Upscalers:
    """The upscaling models of a folder. The one that was used last is kept, in float32.

    folder: where models are that requests name. device: where they compute.
    """

    def __init__(self, folder: Path, device: torch.device):
        self.folder = folder
        self.device = device
        self._held: tuple[tuple[object, ...], Loaded] | None = None

    def get(self, name: str) -> Loaded:
        """Return a model, read if need be. Raises InputError if it is not there or cannot be used."""
        path = find_upscaler(name, self.folder)
        stat = path.stat()
        key = (path, stat.st_mtime_ns, stat.st_size)
        if self._held is None or self._held[0] != key:
            self._held = None
            self._held = key, read_upscaler(path, name, self.device)
        return self._held[1]

    def forget(self) -> None:
        """Free the model's memory."""
        self._held = None


def read_upscaler(path: Path, name: str, device: torch.device) -> Loaded:
    """Read a file of an upscaling model. Raises InputError if it is damaged, or no model that is known here."""
    state = read_torch_file(path) if path.suffix in torch_file.SUFFIXES else read_tensors(path)
    try:
        architecture, network = build_upscaler(state)
    except InputError as error:
        raise InputError(f"{path} {error}") from None
    network: Any = network.to(device)
    return Loaded(name, architecture, network, device)


def enlarge(
    image: Image.Image, size: tuple[int, int], loaded: Loaded | None, tile: int = TILE, overlap: int = OVERLAP
) -> Enlarging:
    """Return an RGB picture at another size. Another aspect ratio is scaled to cover it, then cropped.

    A network enlarges the picture as often as it takes, and Lanczos resampling makes the exact size. Without one, all
    is Lanczos resampling. A network that does not enlarge is used once, before.
    """
    grows = 1 if loaded is None else loaded.network.scale
    check_area(*size)
    check_area(image.width * grows, image.height * grows)
    first = True
    while loaded is not None and (first if grows == 1 else missing(image.size, size) > 1):
        share = missing(image.size, size) / grows
        if not first and share < 1:  # the first time, nothing is thrown away
            image = image.resize((math.ceil(image.width * share), math.ceil(image.height * share)), LANCZOS)
        image, first = (yield from in_tiles(image, loaded, tile, overlap)), False
    return image if image.size == size else ImageOps.fit(image, size, LANCZOS)


LANCZOS = Image.Resampling.LANCZOS


def with_alpha(image: Image.Image, alpha: Image.Image | None) -> Image.Image:
    """A picture with the alpha (mode L) of a smaller one, by Lanczos resampling. None: it stays opaque."""
    if alpha is not None:
        image.putalpha(alpha if alpha.size == image.size else ImageOps.fit(alpha, image.size, LANCZOS))
    return image


def missing(own: tuple[int, int], wanted: tuple[int, int]) -> float:
    """The factor by which a picture must grow to cover a size."""
    return max(wanted[0] / own[0], wanted[1] / own[1])


def check_area(width: int, height: int) -> None:
    """Raises InputError for a picture that is too large."""
    if width * height > LARGEST:
        raise InputError(
            f"the picture would have {width}x{height} pixels, more than the limit of {LARGEST >> 20} megapixels: "
            "take a smaller scale, or a smaller picture"
        )


@torch.inference_mode()
def in_tiles(image: Image.Image, loaded: Loaded, tile: int = TILE, overlap: int = OVERLAP) -> Enlarging:
    """Return what a network makes of an RGB picture. Beside the picture, a row of tiles is in memory.

    Where tiles overlap, they fade into each other over the middle half. So each pixel has a quarter of the overlap as
    context at least, and half of it on average. tile, overlap: in pixels of `image`; the overlap is a third of a tile
    at most.
    """
    network, scale = loaded.network, loaded.network.scale
    pixels = np.asarray(image.convert("RGB"))
    height, width = pixels.shape[:2]
    high, wide, overlap = min(height, tile), min(width, tile), min(overlap, tile // 3)
    rows, columns = firsts_of(height, high, overlap), firsts_of(width, wide, overlap)
    downs, acrosses = (
        [fade(first, side, firsts, scale) for first in firsts] for firsts, side in ((rows, high), (columns, wide))
    )
    out = np.empty((height * scale, width * scale, 3), np.uint8)
    begun = torch.empty(3, 0, width * scale)  # the part of the last row of tiles that this one fades into
    done, total = 0, len(rows) * len(columns)
    yield done, total
    for top, bottom, down in zip(rows, (*rows[1:], height), downs):
        strip = torch.zeros(3, high * scale, width * scale)
        strip[:, : begun.shape[1]] = begun
        for left, across in zip(columns, acrosses):
            piece = to_pixels(pixels[top : top + high, left : left + wide]).to(loaded.device)
            result = network(piece[None])[0].cpu()
            strip[:, :, left * scale : (left + wide) * scale] += result.mul_(down[:, None]).mul_(across)
            done += 1
            yield done, total
        whole = (bottom - top) * scale
        out[top * scale : bottom * scale] = to_bytes(strip[:, :whole])
        begun = strip[:, whole:]
    return Image.fromarray(out)


def weights_of(loaded: Loaded | None) -> Tensor | None:
    """As many bytes on meta as a model's weights have: what they count in a plan."""
    module: Any = None if loaded is None else loaded.network
    if module is None:
        return None
    return torch.empty(sum(weight.nbytes for weight in module.state_dict().values()), dtype=torch.uint8, device="meta")


def work_of(loaded: Loaded, width: int) -> None:
    """Compute on meta what `in_tiles` computes at once, for a picture of this width. The model is on meta."""
    side, scale = min(TILE, width), loaded.network.scale
    strip = torch.empty(3, side * scale, width * scale, device="meta")
    loaded.network(torch.empty(1, 3, side, side, device="meta"))
    del strip


def to_pixels(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> Tensor:
    """(h, w, 3) bytes -> (3, h, w) float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float() / 255  # pyright: ignore


def to_bytes(pixels: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(3, h, w) in [0, 1] -> (h, w, 3) bytes. Values outside are clipped."""
    if not torch.isfinite(pixels).all():
        raise InputError("the upscaling model gave numbers that are not finite: its file is damaged, take another")
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def fade(first: int, side: int, firsts: Sequence[int], scale: int) -> Tensor:
    """The weights of a tile along one axis, (side * scale,). At each position, the weights of all tiles sum to 1."""
    positions = (torch.arange(first * scale, (first + side) * scale) + 0.5) / scale

    def slope(own: int) -> Tensor:
        """0 outside the tile, 1 in its middle, with a ramp in the middle half of what it shares with a neighbour."""
        index, weights = firsts.index(own), ((positions >= own) & (positions < own + side)).float()
        if index > 0:
            weights = weights * ramp((positions - own) / (firsts[index - 1] + side - own))
        if index + 1 < len(firsts):
            weights = weights * ramp((own + side - positions) / (own + side - firsts[index + 1]))
        return weights

    return slope(first) / sum(slope(other) for other in firsts)


def ramp(share: Tensor) -> Tensor:
    """0 up to a quarter, 1 from three quarters."""
    return ((share - 0.25) * 2).clamp(0, 1)
