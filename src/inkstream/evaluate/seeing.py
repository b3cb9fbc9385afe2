"""Recognises a picture's background and things by colours, regions and templates, without a model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from inkstream.pocket.atlas import PAD, emoji, load_atlas, shapes
from inkstream.pocket.colours import lab, nearest_colour
from inkstream.pocket.scenes import Background, Size, place_of
from inkstream.pocket.vocabulary import EMOJI, SHAPES

Floats = NDArray[np.float32]
Box = tuple[float, float, float, float]  # left, top, right, bottom

FAR = 14.0  # smallest Lab distance of a foreground pixel from the background
NEAR = 0.035  # largest gap between parts of one thing, as a share of the shorter side
HIDDEN = 0.08  # largest gap between parts of an emoji whose body has the background's colour
LEAST = 0.09  # smallest extent of a thing, as a share of the shorter side
KNOWN = 0.7  # smallest likeness at which a thing gets the name of its best template
SURE = 0.95  # below this likeness, emoji with invisible parts are tried
N = 32  # side of a template
LEVELS = (10, 14, 20, 28, 40)  # resolutions of templates: pixels of a thing's longer side
BLURS = (0.0, 1.0, 2.0)  # blur of templates in pixels, because models' pictures are blurred
AROUND = 1.125  # side of a template divided by the longer side of its thing
NAMES = (*SHAPES, *EMOJI)


@dataclass(frozen=True, eq=False)
class Region:
    """Connected foreground pixels: their box in pixels (right and bottom exclusive), and their rows and columns."""

    left: int
    top: int
    right: int
    bottom: int
    rows: NDArray[np.intp]
    columns: NDArray[np.intp]


@dataclass(frozen=True)
class Seen:
    """A segmented picture. pixels, ground: (H, W, 3) float32 in 0..255; ground: the background without foreground."""

    pixels: Floats
    ground: Floats
    background: Background
    regions: tuple[Region, ...]

    @property
    def side(self) -> int:
        return min(self.pixels.shape[:2])


@dataclass(frozen=True)
class SeenThing:
    """A recognised thing. name: None if it matches no template; x, y: centre as shares of width and height."""

    name: str | None
    colour: str | None  # None for an emoji
    size: Size
    x: float
    y: float
    likeness: float

    @property
    def place(self) -> str:
        return place_of(self.x, self.y)


def see(picture: Image.Image | NDArray[np.uint8]) -> Seen:
    """Segment a picture into its background and connected foreground regions."""
    pixels = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture).astype(np.float32)
    background, ground, seam = _background(pixels)
    far = np.linalg.norm(lab(pixels) - lab(ground), axis=-1) > FAR
    if seam is not None:  # at the seam of a split, both colours and their mixtures are background
        far &= ~seam
    return Seen(pixels, ground, background, tuple(regions_of(far)))


def things_of(seen: Seen, regions: Sequence[Region] | None = None) -> list[SeenThing]:
    """Return the things in the foreground, highest likeness first. Parts with small gaps may be one thing."""
    parts = seen.regions if regions is None else regions
    groups = _together(parts, NEAR * seen.side)
    found = [(group, things) for group in groups if (things := _things_of_group(seen, group))]
    unknown = [group for group, things in found if _worst(things) < KNOWN]
    for wide in _together(parts, HIDDEN * seen.side) if unknown else []:
        inside = [(group, things) for group, things in found if group[0] in wide]
        if len(wide) > 1 and any(group in unknown for group, _ in inside):  # maybe an emoji with an invisible body
            whole = _recognise(seen, wide)
            if whole.name in EMOJI:
                found = [one for one in found if one not in inside] + [(wide, [whole])]
    return sorted((thing for _, things in found for thing in things), key=lambda thing: -thing.likeness)


def finds(seen: Seen, sprite: Image.Image) -> bool:
    """Return whether a thing in the foreground is a sprite: it is more like the sprite than like all known things.

    sprite: RGBA, cropped to what is visible, of any size.
    """
    padded = Image.new("RGBA", (sprite.width + 2 * PAD, sprite.height + 2 * PAD))
    padded.paste(sprite, (PAD, PAD))
    pixels = np.asarray(padded, np.float32)
    alpha = (pixels[..., 3] / 255).astype(np.float32)
    paint = (pixels[..., :3] * alpha[..., None]).astype(np.float32)
    groups = [group for near in (NEAR, HIDDEN) for group in _together(seen.regions, near * seen.side)]
    groups += [firm for group in groups for firm in _together(_without_halo(seen, group), NEAR * seen.side)]
    for group in groups:
        if _extent(group) >= LEAST * seen.side:
            cover, _ = _cover(seen, group)
            left, top, right, bottom = bounds_of(group)
            tight = _bounds(cover[top:bottom, left:right], left, top)
            under = np.concatenate([seen.ground[region.rows, region.columns] for region in group]).mean(0)
            mask, colours = (_at_level(picture, LEVELS[-1], 0) for picture in (alpha, paint))
            likeness = 0.0
            for box in filter(None, (_square(*tight), _fit(mask, colours, under, tight))):
                away, ground = _cut_out(seen, cover, box)
                for blur in BLURS:
                    mask, colours = (_at_level(picture, _level(box), blur) for picture in (alpha, paint))
                    adds = (colours.reshape(-1, 3) - mask.reshape(-1, 1) * ground).astype(np.float32)
                    likeness = max(likeness, _alike(adds, away))
            if likeness >= KNOWN and likeness > _recognise(seen, group).likeness:
                return True
    return False


def _at_level(picture: Floats, level: int, blur: float) -> Floats:
    """Return a padded picture as a template: see `_templates`. picture: (h, w) or (h, w, 3)."""
    drawn = _template(np.ascontiguousarray(picture), level)
    return _blurred(drawn[None], blur * N / AROUND / level)[0] if blur else drawn


def _things_of_group(seen: Seen, group: Sequence[Region]) -> list[SeenThing]:
    return _recognise_group(seen, group) if _extent(group) >= LEAST * seen.side else []


# Background


def _background(pixels: Floats) -> tuple[Background, Floats, NDArray[np.bool_] | None]:
    """Fit a flat, gradient or split background to the picture's border. Returns it, its pixels, and a split's seam."""
    height, width, _ = pixels.shape
    depth = max(2, round(0.03 * min(height, width)))
    edge = np.ones((height, width), bool)
    edge[depth:-depth, depth:-depth] = False
    rows, columns = (axis[:: max(1, edge.sum() // 1000)] for axis in np.nonzero(edge))
    colours = pixels[rows, columns]  # (P, 3)
    seen = lab(colours)

    def cost(explained: Floats) -> float:
        return float(np.minimum(np.linalg.norm(seen - lab(explained), axis=-1), 40).mean())

    flat = np.median(colours, axis=0)
    best, lowest = (Background("flat", (nearest_colour(flat),)), np.broadcast_to(flat, pixels.shape), None), cost(flat)
    lowest -= 2.5  # flat is preferred unless another kind is clearly better
    for across in (False, True):
        place = ((columns + 0.5) / width if across else (rows + 0.5) / height).astype(np.float32)
        length = width if across else height
        along = (np.arange(length, dtype=np.float32) + 0.5) / length
        start, slope = _line(place, colours)
        first, second = (np.median(colours[part], axis=0) for part in (place < 0.42, place > 0.58))
        split = first + (second - first) * (along > 0.5)[:, None]
        fade = np.clip(start + slope * along[:, None], 0, 255)
        candidates: list[tuple[Literal["gradient", "split"], Floats, tuple[Floats, Floats]]]
        candidates = [("gradient", fade, (start, start + slope)), ("split", split, (first, second))]
        for kind, line, ends in candidates:
            if (found := cost(line[(place * length).astype(int)])) < lowest:
                names = nearest_colour(np.clip(ends[0], 0, 255)), nearest_colour(np.clip(ends[1], 0, 255))
                ground = np.broadcast_to(line[None, :] if across else line[:, None], pixels.shape)
                seam = _seam(pixels, first, second, across) if kind == "split" else None
                best, lowest = (Background(kind, names, across), ground, seam), found
    return best[0], np.ascontiguousarray(best[1], np.float32), best[2]


def _line(place: Floats, colours: Floats) -> tuple[Floats, Floats]:
    """Fit colour as a linear function of place by least squares. The second of two rounds leaves out outliers."""
    weight = np.ones(len(place), np.float32)
    start = slope = np.zeros(3, np.float32)
    for _ in range(2):
        total = weight.sum()
        mean_place, mean_colour = (weight * place).sum() / total, (weight[:, None] * colours).sum(0) / total
        away = weight * (place - mean_place)
        slope = (away[:, None] * (colours - mean_colour)).sum(0) / (away * (place - mean_place)).sum()
        start = mean_colour - slope * mean_place
        error = np.abs(colours - start - slope * place[:, None]).max(-1)
        weight = (error <= np.median(error) * 3 + 4).astype(np.float32)
    return start, slope


def _seam(pixels: Floats, first: Floats, second: Floats, across: bool) -> NDArray[np.bool_]:
    """Return the pixels near the middle that are mixtures of both colours."""
    length = pixels.shape[1] if across else pixels.shape[0]
    near = np.flatnonzero(abs((np.arange(length) + 0.5) / length - 0.5) < 0.03)
    band = pixels[:, near] if across else pixels[near]
    way = second - first
    share = np.clip((band - first) @ way / max(float(way @ way), 1), 0, 1)
    seam = np.zeros(pixels.shape[:2], bool)
    seam[(slice(None), near) if across else near] = np.abs(band - first - share[..., None] * way).max(-1) < 24
    return seam


# Regions


def regions_of(mask: NDArray[np.bool_]) -> list[Region]:
    """Return the 8-connected regions of a mask with at least 3 pixels, by union-find over the runs of each row."""
    padded = np.pad(mask, ((0, 0), (1, 1))).astype(np.int8)
    steps = np.diff(padded, axis=1)
    row, start = np.nonzero(steps == 1)
    end = np.nonzero(steps == -1)[1]
    parent = list(range(len(row)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first = np.searchsorted(row, np.arange(mask.shape[0] + 1)).tolist()
    starts, ends = start.tolist(), end.tolist()
    for y in range(1, mask.shape[0]):
        above, below = first[y - 1], first[y]
        while above < first[y] and below < first[y + 1]:
            if starts[above] <= ends[below] and starts[below] <= ends[above]:
                parent[root(above)] = root(below)
            if ends[above] < ends[below]:
                above += 1
            else:
                below += 1
    members: dict[int, list[int]] = {}
    for i in range(len(parent)):
        members.setdefault(root(i), []).append(i)
    regions = []
    for runs in members.values():
        if sum(ends[i] - starts[i] for i in runs) < 3:
            continue
        columns = np.concatenate([np.arange(starts[i], ends[i]) for i in runs])
        rows = np.repeat(row[runs], end[runs] - start[runs])
        left, right = int(columns.min()), int(columns.max()) + 1
        regions.append(Region(left, int(rows[0]), right, int(rows.max()) + 1, rows, columns))
    return regions


def bounds_of(regions: Sequence[Region]) -> tuple[int, int, int, int]:
    return (
        min(r.left for r in regions), min(r.top for r in regions), max(r.right for r in regions),
        max(r.bottom for r in regions),
    )  # fmt: skip


def _extent(regions: Sequence[Region]) -> int:
    left, top, right, bottom = bounds_of(regions)
    return max(right - left, bottom - top)


def _together(regions: Sequence[Region], near: float) -> list[list[Region]]:
    """Group regions whose boxes are at most `near` pixels apart, directly or through other regions."""
    groups: list[list[Region]] = []
    for region in sorted(regions, key=lambda r: -len(r.rows)):
        close = [g for g in groups if any(apart(region, other) <= near for other in g)]
        groups = [g for g in groups if g not in close] + [[region, *(r for g in close for r in g)]]
    return groups


def apart(a: Region, b: Region) -> float:
    """Return the distance of two boxes: the larger gap of both axes; negative if they overlap."""
    return max(a.left - b.right, b.left - a.right, a.top - b.bottom, b.top - a.bottom)


# Things


def _recognise_group(seen: Seen, group: Sequence[Region]) -> list[SeenThing]:
    """Recognise a group of regions as one thing, or as several things that a halo or a narrow gap joined."""
    best = [_recognise(seen, group)]
    if best[0].likeness >= SURE:
        return best
    firm = _without_halo(seen, group)
    for groups in (_together(firm, NEAR * seen.side), [[region] for region in firm]):
        groups = [g for g in groups if _extent(g) >= LEAST * seen.side]
        things = [_recognise(seen, g) for g in groups]
        if _worst(things) > max(_worst(best), KNOWN):
            best = things
    return best


def _worst(things: Sequence[SeenThing]) -> float:
    return min((thing.likeness for thing in things), default=0)


def _without_halo(seen: Seen, group: Sequence[Region]) -> list[Region]:
    """Return the regions of a group without its faint pixels, which are much closer to the background than most."""
    rows, columns = (np.concatenate([getattr(r, axis) for r in group]) for axis in ("rows", "columns"))
    away = np.linalg.norm(lab(seen.pixels[rows, columns]) - lab(seen.ground[rows, columns]), axis=-1)
    mask = np.zeros(seen.pixels.shape[:2], bool)
    firm = away > 0.45 * np.quantile(away, 0.8)
    mask[rows[firm], columns[firm]] = True
    return regions_of(mask)


def _recognise(seen: Seen, group: Sequence[Region]) -> SeenThing:
    left, top, right, bottom = bounds_of(group)
    height, width, _ = seen.pixels.shape
    rows, columns = (np.concatenate([getattr(r, axis) for r in group]) for axis in ("rows", "columns"))
    cover, away = _cover(seen, group)
    colour = np.median(seen.pixels[rows, columns][away >= np.median(away)], axis=0)
    tight = _bounds(cover[top:bottom, left:right], left, top)
    box = _square(*tight)
    away, below = _cut_out(seen, cover, box)
    likeness = np.max([_likenesses(colour, away, below, _templates(_level(box), blur)) for blur in BLURS], axis=0)
    best = int(likeness.argmax())
    if likeness[best] < SURE:  # maybe an emoji with parts in the background's colour
        ground, table = seen.ground[rows, columns].mean(0), _templates(LEVELS[-1])
        for emoji_index in np.argsort(-likeness[len(SHAPES) :])[:8] + len(SHAPES):
            sprite = table.alpha[emoji_index].reshape(N, N), table.paint[emoji_index - len(SHAPES)].reshape(N, N, 3)
            fitted = _fit(*sprite, ground, tight) if likeness[emoji_index] > 0.5 * KNOWN else None
            if fitted:
                found = _likeness_of_emoji(int(emoji_index), *_cut_out(seen, cover, fitted), _templates(_level(fitted)))
                if found > likeness.max():
                    likeness[emoji_index], best, box = found, int(emoji_index), fitted
    name = NAMES[best] if likeness[best] >= KNOWN else None
    side = (box[2] - box[0]) / AROUND / seen.side
    size: Size = "small" if side < 0.21 else "medium" if side < 0.335 else "large"
    return SeenThing(
        name, None if name in EMOJI else nearest_colour(colour), size, float((box[0] + box[2]) / 2 / width),
        float((box[1] + box[3]) / 2 / height), float(likeness[best]),
    )  # fmt: skip


def _cover(seen: Seen, group: Sequence[Region]) -> tuple[Floats, Floats]:
    """Return how far a group covers each pixel, (H, W), and its pixels' distances from the background, (P,)."""
    rows, columns = (np.concatenate([getattr(r, axis) for r in group]) for axis in ("rows", "columns"))
    away = np.linalg.norm(lab(seen.pixels[rows, columns]) - lab(seen.ground[rows, columns]), axis=-1)
    cover = np.zeros(seen.pixels.shape[:2], np.float32)
    cover[rows, columns] = np.minimum(away / max(float(np.median(away)), 1), 1)
    return cover, away


def _bounds(cover: Floats, left: int, top: int) -> Box:
    """Return a thing's box with sub-pixel precision, from partly covered edge pixels. cover: (h, w) at (left, top)."""
    bottom, right = top + cover.shape[0], left + cover.shape[1]
    return (
        left + 1 - float(cover[:, 0].max()), top + 1 - float(cover[0].max()),
        right - 1 + float(cover[:, -1].max()), bottom - 1 + float(cover[-1].max()),
    )  # fmt: skip


def _square(left: float, top: float, right: float, bottom: float) -> Box:
    """Return the square around a box's centre. Its side is AROUND times the box's longer side."""
    half = max(right - left, bottom - top) * AROUND / 2
    x, y = (left + right) / 2, (top + bottom) / 2
    return x - half, y - half, x + half, y + half


def _cut(array: Floats, box: Box) -> Floats:
    """Resample a square of a picture to N x N. Outside, edge pixels repeat. array: (H, W) or (H, W, 3) float32."""
    height, width = array.shape[:2]
    x0, y0, x1, y1 = math.floor(box[0]) - 2, math.floor(box[1]) - 2, math.ceil(box[2]) + 2, math.ceil(box[3]) + 2
    rows, columns = np.clip(np.arange(y0, y1), 0, height - 1), np.clip(np.arange(x0, x1), 0, width - 1)
    inside = (box[0] - x0, box[1] - y0, box[2] - x0, box[3] - y0)
    part = array[rows[:, None], columns]
    return _resized(part, (N, N), Image.Resampling.BILINEAR, inside)


def _resized(array: Floats, size: tuple[int, int], how: Image.Resampling, box: Box) -> Floats:
    channels = [array] if array.ndim == 2 else [np.ascontiguousarray(array[..., c]) for c in range(array.shape[-1])]
    parts = [np.asarray(Image.fromarray(c).resize(size, how, box)) for c in channels]
    return parts[0] if array.ndim == 2 else np.stack(parts, -1)


def _cut_out(seen: Seen, cover: Floats, box: Box) -> tuple[Floats, Floats]:
    """Return the difference of a square of the picture to the background, and the background, both (N N, 3)."""
    ground = _cut(seen.ground, box)
    away = (_cut(seen.pixels, box) - ground) * (_cut(cover, box) > 0.02)[..., None]
    return away.reshape(-1, 3), ground.reshape(-1, 3)


def _likenesses(colour: Floats, away: Floats, ground: Floats, table: Templates) -> Floats:
    """Return the likeness of a square of the picture to each of NAMES, at most 1. Shapes have the seen colour.

    A template adds a = alpha (paint - ground) to the background. The picture adds b. The likeness is
    2 <a, b> / (|a|^2 + |b|^2), which is 1 only for equal pictures. The product is expanded, so a is never computed.
    """
    shape, sprite = table.alpha[: len(SHAPES)], table.alpha[len(SHAPES) :]
    inner = shape @ (away * (colour - ground)).sum(-1)
    norm = shape**2 @ ((colour - ground) ** 2).sum(-1)
    inner = np.append(inner, table.paint @ away.reshape(-1) - sprite @ (away * ground).sum(-1))
    norm = np.append(norm, table.squared - 2 * table.crossed @ ground.reshape(-1) + sprite**2 @ (ground**2).sum(-1))
    return (2 * inner / (norm + float((away**2).sum()) + 1e-6)).astype(np.float32)


def _likeness_of_emoji(index: int, away: Floats, ground: Floats, table: Templates) -> float:
    """Return the likeness, as in `_likenesses`, of one emoji."""
    return _alike(table.paint[index - len(SHAPES)].reshape(-1, 3) - table.alpha[index][:, None] * ground, away)


def _alike(adds: Floats, away: Floats) -> float:
    """Return the likeness of what a template adds to the background and what the picture adds, both (N N, 3)."""
    return float(2 * (adds * away).sum() / ((adds**2).sum() + (away**2).sum() + 1e-6))


def _fit(alpha: Floats, paint: Floats, ground: Floats, bounds: Box) -> Box | None:
    """Return the square of a sprite whose visible part on this ground fills the bounds; None if too little shows.

    alpha: (N, N), paint: (N, N, 3), as in Templates.
    """
    pixels = paint + (1 - alpha[..., None]) * ground
    visible = (np.linalg.norm(lab(pixels) - lab(ground), axis=-1) > FAR) & (alpha > 0.3)
    rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
    if len(rows) < N / 4 or len(columns) < N / 4:
        return None
    u, v = (columns[0] + columns[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2
    left, top, right, bottom = bounds
    scale = max((right - left) / (columns[-1] + 1 - columns[0]), (bottom - top) / (rows[-1] + 1 - rows[0]))
    x, y = (left + right) / 2 - (u - N / 2) * scale, (top + bottom) / 2 - (v - N / 2) * scale
    return x - N / 2 * scale, y - N / 2 * scale, x + N / 2 * scale, y + N / 2 * scale


@dataclass(frozen=True, eq=False)
class Templates:
    """The templates of S shapes and E emoji, in the terms of `_likenesses`."""

    alpha: Floats  # (S + E, N N), in the order of NAMES
    paint: Floats  # (E, 3 N N), only emoji: colour times alpha
    crossed: Floats  # (E, 3 N N): paint times alpha
    squared: Floats  # (E,): |paint|^2


@lru_cache(maxsize=len(LEVELS) * len(BLURS))
def _templates(level: int, blur: float = 0.0) -> Templates:
    """Return the templates at a resolution. level: pixels of a thing's longer side; blur: sigma in such pixels."""
    atlas = load_atlas()
    sprites = [np.asarray(emoji(atlas, name), np.float32) for name in EMOJI]
    masks = [np.asarray(shapes()[name], np.float32) for name in SHAPES] + [sprite[..., 3] for sprite in sprites]
    alpha = np.stack([_template((mask / 255).astype(np.float32), level) for mask in masks])
    paint = np.stack([_template((s[..., :3] * s[..., 3:] / 255).astype(np.float32), level) for s in sprites])
    if blur:
        alpha, paint = (_blurred(pictures, blur * N / AROUND / level) for pictures in (alpha, paint))
    crossed = (paint * alpha[len(SHAPES) :, ..., None]).reshape(len(paint), -1)
    paint = paint.reshape(len(paint), -1)
    return Templates(alpha.reshape(len(alpha), -1), paint, crossed, (paint**2).sum(-1))


def _template(padded: Floats, level: int) -> Floats:
    """Resample a padded mask to `level` pixels, then to N x N. padded: (h, w) or (h, w, 3)."""
    height, width = padded.shape[0] - 2 * PAD, padded.shape[1] - 2 * PAD
    pixel = max(height, width) / level
    more = max(0, math.ceil(3 * pixel) - PAD)
    padded = np.pad(padded, ((more, more), (more, more), (0, 0))[: padded.ndim])
    size = math.ceil(width / pixel) + 4, math.ceil(height / pixel) + 4
    left, top = (2 + (size[0] - 4 - width / pixel) / 2), (2 + (size[1] - 4 - height / pixel) / 2)  # transparent pixels
    x, y = PAD + more - left * pixel, PAD + more - top * pixel
    drawn = _resized(padded, size, Image.Resampling.BOX, (x, y, x + size[0] * pixel, y + size[1] * pixel))
    return _cut(drawn, _square(left, top, left + width / pixel, top + height / pixel))


def _blurred(pictures: Floats, sigma: float) -> Floats:
    """Apply a Gaussian blur along both axes, with zeros outside. pictures: (P, N, N) or (P, N, N, 3)."""
    reach = math.ceil(3 * sigma)
    weights = np.exp(-(np.arange(-reach, reach + 1, dtype=np.float32) ** 2) / (2 * sigma**2))
    for axis in (1, 2):
        room = [(reach, reach) if i == axis else (0, 0) for i in range(pictures.ndim)]
        wide = np.pad(pictures, room)
        shifts = [np.take(wide, range(i, i + N), axis) for i in range(2 * reach + 1)]
        pictures = sum(weight * shift for weight, shift in zip(weights / weights.sum(), shifts))  # type: ignore[assignment]
    return pictures


def _level(box: Box) -> int:
    """Return the best level of LEVELS for a thing in this square."""
    side = (box[2] - box[0]) / AROUND
    return min(LEVELS, key=lambda level: abs(math.log(level / side)))
