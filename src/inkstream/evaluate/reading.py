"""Reads text in pictures: it splits the ink into glyphs and matches each with the templates of the atlas.

The reader knows the faces and the alphabet, but not the wanted text. A line has one colour. Its glyphs agree on an em
and a baseline, which distinguishes an O from an o. The reader needs at least LEGIBLE pixels an em.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from inkstream.evaluate.seeing import NEAR, Floats, Region, Seen, apart, bounds_of, regions_of, see, things_of
from inkstream.pocket.atlas import PAD, glyph, load_atlas
from inkstream.pocket.colours import lab
from inkstream.pocket.scenes import SPACE, TRACKING
from inkstream.pocket.vocabulary import EMOJI

UNKNOWN = "\ufffd"
"""Character for ink that matches no glyph."""

LEGIBLE = {"latin": 9.0, "hanzi": 16.0}
"""Smallest readable font size of each script, in pixels an em."""

N = 24  # side of a template
LEVELS = (9, 12, 16, 22, 30, 42, 60)  # pixels an em at which the templates are drawn
PLAIN = 0.6  # smallest likeness at which ink is read as its best matching glyph
OTHER_FACE = 0.04  # penalty in likeness for a glyph of another face than the line's
EM_SLACK = 0.1  # deviation of a glyph's size, or of its baseline in em, with a penalty of 0.05 in likeness
SPECK = 0.002  # smallest share of a line's ink that a glyph must have
FRAGMENT = 0.75  # likeness of an unreadable part of a line, when parts are compared with the joined line
LEAST = 0.06  # smallest extent of a line, as a share of the picture's shorter side
MANY = 0.012  # penalty for each glyph of a line
KEPT = 10  # number of best glyphs that are kept for each face


@dataclass(frozen=True)
class Line:
    """A line of text. box: left, top, right, bottom as shares of width and height; likeness: mean over its ink."""

    text: str
    box: tuple[float, float, float, float]
    likeness: float
    regions: tuple[Region, ...]


def read(picture: Image.Image | NDArray[np.uint8]) -> list[tuple[str, tuple[float, float, float, float]]]:
    """Return the lines of a picture from top to bottom: text, (left, top, right, bottom) as shares of the picture."""
    return [(line.text, line.box) for line in lines_of(see(picture))]


def lines_of(seen: Seen) -> list[Line]:
    """Return the lines of text in the foreground, from top to bottom."""
    found = []
    for layer, colour in _layers(seen):
        found += _partition(seen, _rows(layer), colour)
    return sorted(found, key=lambda line: (line.box[1], line.box[0]))


# Finding lines


def _layers(seen: Seen) -> list[tuple[list[Region], Floats]]:
    """Group regions by colour. Thin regions also match if their colour is mixed with the background."""
    layers: list[tuple[list[Region], Floats]] = []
    for region in sorted(seen.regions, key=lambda r: -len(r.rows)):
        own, ground = seen.pixels[region.rows, region.columns], seen.ground[region.rows, region.columns]
        away = np.linalg.norm(own - ground, axis=-1)
        strong = away >= np.quantile(away, 0.8)
        colour, below = np.median(own[strong], axis=0), ground[strong].mean(0)
        thin = len(own) / max(region.right - region.left, region.bottom - region.top) < 3.5
        for layer, ink in layers:
            way = ink - below
            share = float((colour - below) @ way / max(float(way @ way), 1))
            mixed = below + min(share, 1) * way
            if share > (0.4 if thin else 0.75) and np.linalg.norm(lab(colour) - lab(mixed)) < 28:
                layer.append(region)
                break
        else:
            layers.append(([region], colour))
    return layers


def _rows(layer: Sequence[Region]) -> list[list[Region]]:
    """Group regions with overlapping pixel rows, from top to bottom."""
    rows: list[list[Region]] = []
    for region in sorted(layer, key=lambda r: r.top):
        if rows and region.top < max(r.bottom for r in rows[-1]):
            rows[-1].append(region)
        else:
            rows.append([region])
    return rows


def _partition(seen: Seen, rows: Sequence[list[Region]], colour: Floats) -> list[Line]:
    """Read rows of ink as lines. Close rows become one line if it reads about as well as its parts (二, i)."""
    alone = [_line(seen, row, colour) for row in rows]
    area = [sum(len(r.rows) for r in row) for row in rows]
    lines: list[Line] = []
    i = 0
    while i < len(rows):
        best, used, group = alone[i], 1, list(rows[i])
        for j in range(i + 1, min(i + 4, len(rows))):
            gap = min(r.top for r in rows[j]) - max(r.bottom for r in group)
            group = group + rows[j]
            if gap > 0.65 * (max(r.bottom for r in group) - min(r.top for r in group)):
                break
            fragments = [line.likeness if line else FRAGMENT for line in alone[i : j + 1]]
            joined = _line(seen, group, colour)
            if joined and joined.likeness > np.average(fragments, weights=area[i : j + 1]) - 0.05:
                best, used = joined, j + 1 - i
        if best:
            lines.append(best)
        i += used
    return lines


def _line(seen: Seen, regions: Sequence[Region], colour: Floats) -> Line | None:
    """Read regions as a line. Returns None if they are not readable or match things better."""
    left, top, right, bottom = bounds_of(regions)
    height, width = seen.pixels.shape[:2]
    if max(right - left, bottom - top) < LEAST * seen.side:
        return None
    found = _read_ink(_ink(seen, regions, colour, (left, top, right, bottom)))
    if found is None:
        return None
    text, likeness, known = found
    if known < 0.5 or not any(char.isalnum() for char in text):
        return None
    if len(text) <= 2 or likeness < 0.85:
        things = things_of(seen, regions)
        if things and sum(thing.likeness for thing in things) / len(things) > likeness:
            return None
    beside = [r for r in seen.regions if r not in regions and any(apart(r, o) <= NEAR * seen.side for o in regions)]
    if beside and any(t.name in EMOJI and t.likeness > likeness for t in things_of(seen, [*regions, *beside])):
        return None
    return Line(text, (left / width, top / height, right / width, bottom / height), likeness, tuple(regions))


def _ink(seen: Seen, regions: Sequence[Region], colour: Floats, box: tuple[int, int, int, int]) -> Floats:
    """Return the ink of a box and 2 pixels around it: 0 is background, 1 is the colour. (h, w) float32."""
    left, top, right, bottom = box
    near = np.zeros((bottom - top + 4, right - left + 4), bool)
    for region in regions:
        near[region.rows - top + 2, region.columns - left + 2] = True
    near[1:] |= near[:-1].copy()
    near[:-1] |= near[1:].copy()
    near[:, 1:] |= near[:, :-1].copy()
    near[:, :-1] |= near[:, 1:].copy()
    height, width = seen.pixels.shape[:2]
    rows = np.clip(np.arange(top - 2, bottom + 2), 0, height - 1)[:, None]
    columns = np.clip(np.arange(left - 2, right + 2), 0, width - 1)
    ground = seen.ground[rows, columns]
    way = colour - ground
    share = ((seen.pixels[rows, columns] - ground) * way).sum(-1) / np.maximum((way**2).sum(-1), 1)
    return np.clip(share, 0, 1).astype(np.float32) * near


# One line


def _read_ink(ink: Floats) -> tuple[str, float, float] | None:
    """Read a line. ink: (h, w). Returns the text, its likeness, and the share of ink in known glyphs; or None."""
    height = ink.shape[0] - 4
    cuts, owner = _cuts(ink)
    spans, box, mass, pictures = _segments(ink, owner, cuts, _spans(cuts, height))
    if not spans:
        return None
    table = _table(_level(height))
    likeness = pictures @ table.pictures.T  # (S, G)
    size = np.maximum(box[:, 2] - box[:, 0], box[:, 3] - box[:, 1])  # (S,)
    best, reading = -1.0, None
    for face in range(len(table.faces)):
        own = likeness - OTHER_FACE * (table.face != face)
        order = np.argpartition(-own, KEPT, axis=1)[:, :KEPT]  # (S, K)
        score = np.take_along_axis(own, order, 1)
        em = (size[:, None] / table.size[order]).astype(np.float32)
        baseline = (box[:, 3:] - table.bottom[order] * em).astype(np.float32)
        for guess in _guesses(score, em, baseline, mass):
            off = (np.log(em / guess[0]) / EM_SLACK) ** 2 + ((baseline - guess[1]) / guess[0] / EM_SLACK) ** 2
            value = score - np.minimum(0.05 * off, 0.4)
            pick = value.argmax(1)
            value = value.max(1)
            total, path = _best_path(spans, len(cuts), value, mass)
            if total > best:
                best = total
                reading = [(s, int(order[s, pick[s]]), float(value[s])) for s in path], guess[0]
    return _spell(*reading, box, mass, table) if reading else None


def _spell(
    path: Sequence[tuple[int, int, float]], em: float, box: Floats, mass: Floats, table: Table
) -> tuple[str, float, float]:
    """Join the glyphs of spans to a text, with a space at each wide gap. Returns text, likeness, share of known ink."""
    text, pen, known, likeness = "", None, 0.0, 0.0
    for span, g, value in path:
        if value < PLAIN:
            text, pen, likeness = text + UNKNOWN, None, likeness + PLAIN * float(mass[span])
            continue
        known, likeness = known + float(mass[span]), likeness + value * float(mass[span])
        if pen is not None and box[span, 0] - table.left[g] * em - pen > (SPACE + TRACKING) / 2 * em:
            text += " "
        text += table.chars[g]
        pen = box[span, 2] + (table.advance[g] - table.right[g] + TRACKING) * em
    return text, likeness, known


@dataclass(frozen=True)
class Cut:
    """A possible glyph boundary: a glyph ends before column `end` in piece `before`, the next starts at column `start`
    in piece `after`."""

    end: int
    start: int
    before: int
    after: int


def _cuts(ink: Floats) -> tuple[list[Cut], NDArray[np.intp]]:
    """Return the cuts, between pieces of ink and at thin columns inside pieces, and the piece of each pixel."""
    height, width = ink.shape[0] - 4, ink.shape[1]
    owner = np.full(ink.shape, -1)
    blank = np.concatenate([[True], ink.sum(0) < 0.3, [True]])
    edges = np.flatnonzero(blank[1:] != blank[:-1]).tolist()
    pieces: list[tuple[int, int]] = []
    for start, end in zip(edges[::2], edges[1::2]):
        parts = _parts(ink[:, start:end])
        for part in parts:
            columns = np.flatnonzero((part & (ink[:, start:end] > 0.25)).any(0))
            owner[:, start:end][part] = len(pieces)
            pieces.append((start + int(columns[0]), start + int(columns[-1]) + 1) if len(parts) > 1 else (start, end))
    cuts, before, last = [], 0, 0
    for i, (start, end) in enumerate(pieces):
        cuts.append(Cut(last, start, before, i))
        profile = np.where(owner[:, start:end] == i, ink[:, start:end], 0).sum(0)
        least = max(2, round(0.12 * height))
        if end - start > 0.3 * height:
            for x in range(least, len(profile) - least):
                if profile[x] <= profile[x - 1] and profile[x] < profile[x + 1] and profile[x] < 0.4 * height:
                    cuts.append(Cut(start + x, start + x, i, i))
        before, last = i, end
    return [*cuts, Cut(last, width, before, len(pieces))], owner


def _parts(ink: Floats) -> list[NDArray[np.bool_]]:
    """Split ink without a blank column into separate parts, in order. Their columns may overlap a little (LJ)."""
    regions = regions_of(ink > 0.4)
    groups: list[list[Region]] = []
    for region in sorted(regions, key=lambda r: r.left):
        for group in groups:
            right, left = max(r.right for r in group), min(r.left for r in group)
            shared = min(right, region.right) - region.left
            if shared > 0.35 * min(right - left, region.right - region.left):
                group.append(region)
                break
        else:
            groups.append([region])
    if len(groups) < 2:
        return [np.ones(ink.shape, bool)]
    owner = np.full((ink.shape[0] + 2, ink.shape[1] + 2), -1)
    for i, group in enumerate(groups):
        for region in group:
            owner[region.rows + 1, region.columns + 1] = i
    for _ in range(3):  # faint pixels join the part that they touch
        beside = [owner[:-2, 1:-1], owner[2:, 1:-1], owner[1:-1, :-2], owner[1:-1, 2:]]
        owner[1:-1, 1:-1] = np.where(owner[1:-1, 1:-1] < 0, np.max(beside, axis=0), owner[1:-1, 1:-1])
    return [owner[1:-1, 1:-1] == i for i in range(len(groups))]


def _spans(cuts: Sequence[Cut], height: int) -> list[tuple[int, int]]:
    """Return pairs of cuts that may enclose a glyph. A span has a maximum width, unless it is a whole piece."""
    return [
        (a, b)
        for a in range(len(cuts) - 1)
        for b in range(a + 1, len(cuts))
        if cuts[b].end - cuts[a].start <= max(1.6 * height, 6) or (cuts[a].after == cuts[b].before and b == a + 1)
    ]


def _best_path(spans: Sequence[tuple[int, int]], count: int, value: Floats, mass: Floats) -> tuple[float, list[int]]:
    """Find the spans with the best total of likeness times ink, by dynamic programming. Returns total and spans."""
    gain = np.where(mass < SPECK, 0, np.maximum(value, PLAIN) * mass - MANY).tolist()
    best, back = [0.0] * count, [(k - 1, -1) for k in range(count)]
    s = 0
    for a in range(count):
        if a and best[a - 1] > best[a]:  # skipped ink scores 0
            best[a], back[a] = best[a - 1], (a - 1, -1)
        while s < len(spans) and spans[s][0] == a:
            b = spans[s][1]
            if best[a] + gain[s] > best[b]:
                best[b], back[b] = best[a] + gain[s], (a, s)
            s += 1
    path, at = [], count - 1
    while at > 0:
        at, s = back[at]
        if s >= 0 and mass[s] >= SPECK:
            path.append(s)
    return best[-1], path[::-1]


def _guesses(score: Floats, em: Floats, baseline: Floats, mass: Floats) -> list[tuple[float, float]]:
    """Return up to 4 pairs (em, baseline) that most ink agrees on."""
    weight = (np.maximum(score - PLAIN, 0) * mass[:, None]).ravel()
    if not weight.any():
        return []
    ems, baselines = em.ravel(), baseline.ravel()
    likely = np.argsort(-weight)[:64]
    off = (np.log(ems[likely][:, None] / ems) / EM_SLACK) ** 2
    off += ((baselines[likely][:, None] - baselines) / ems[likely][:, None] / EM_SLACK) ** 2
    votes = (np.exp(-off / 2) * weight).sum(1)
    guesses: list[tuple[float, float]] = []
    for i in np.argsort(-votes):
        guess = float(ems[likely[i]]), float(baselines[likely[i]])
        if all(abs(np.log(guess[0] / e)) > 0.07 or abs(guess[1] - b) > 0.07 * e for e, b in guesses):
            guesses.append(guess)
        if len(guesses) == 4:
            break
    return guesses


def _segments(
    ink: Floats, owner: NDArray[np.intp], cuts: Sequence[Cut], spans: Sequence[tuple[int, int]]
) -> tuple[list[tuple[int, int]], Floats, Floats, Floats]:
    """Return the S spans with ink, their boxes in pixels (S, 4), shares of ink (S,), and pictures (S, N N)."""
    kept, boxes, masses, pictures = [], [], [], []
    total = float(ink.sum())
    for a, b in spans:
        start, end = cuts[a], cuts[b]
        part = ink[:, start.start : end.end]
        whose = owner[:, start.start : end.end]
        part = np.where((whose >= start.after) & (whose <= end.before), part, 0)
        box = _box_of(part)
        if box is not None:
            kept.append((a, b))
            boxes.append((box[0] + start.start, box[1], box[2] + start.start, box[3]))
            masses.append(part.sum() / total)
            pictures.append(_square(part, box))
    return (
        kept, np.array(boxes, np.float32).reshape(-1, 4), np.array(masses, np.float32),
        _standard(np.array(pictures, np.float32).reshape(-1, N * N)),
    )  # fmt: skip


def _box_of(ink: Floats) -> tuple[float, float, float, float] | None:
    """Return the box of ink with sub-pixel precision, from partly covered edge pixels. None if there is too little."""
    down, across = ink.max(1), ink.max(0)
    rows, columns = np.flatnonzero(down > 0.25), np.flatnonzero(across > 0.25)
    if not len(rows) or not len(columns):
        return None
    left, right = _ends(across, columns[0], columns[-1])
    top, bottom = _ends(down, rows[0], rows[-1])
    return left, top, right, bottom


def _ends(cover: Floats, first: int, last: int) -> tuple[float, float]:
    if first == last:
        return first + 0.5 - float(cover[first]) / 2, first + 0.5 + float(cover[first]) / 2
    return first + 1 - float(cover[first]), last + float(cover[last])


def _square(ink: Floats, box: tuple[float, float, float, float]) -> Floats:
    """Resample a box, centred in a square with a small border, to N x N."""
    half = max(box[2] - box[0], box[3] - box[1]) * 0.55 + 0.25
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    pad = int(half) + 3
    padded = np.zeros((ink.shape[0] + 2 * pad, ink.shape[1] + 2 * pad), np.float32)
    padded[pad:-pad, pad:-pad] = ink
    around = (x - half + pad, y - half + pad, x + half + pad, y + half + pad)
    return np.asarray(Image.fromarray(padded).resize((N, N), Image.Resampling.BILINEAR, around)).ravel()


def _standard(pictures: Floats) -> Floats:
    """Normalise pictures to mean 0 and norm 1: their products are then correlations. pictures: (S, N N)."""
    pictures = pictures - pictures.mean(1, keepdims=True)
    return pictures / np.maximum(np.linalg.norm(pictures, axis=1, keepdims=True), 1e-6)


@dataclass(frozen=True, eq=False)
class Table:
    """The templates of all G glyphs of all faces, with their metrics in em relative to the pen, each (G,)."""

    faces: tuple[str, ...]
    chars: str  # G characters
    face: NDArray[np.intp]  # (G,) index of the face
    pictures: Floats  # (G, N N)
    size: Floats  # longer side of the ink
    bottom: Floats
    left: Floats
    right: Floats
    advance: Floats


@lru_cache(maxsize=len(LEVELS))
def _table(level: int) -> Table:
    """Return the templates at `level` pixels an em, the resolution of the line that is read."""
    atlas = load_atlas()
    faces = tuple(atlas.glyphs)
    of = [(i, char, glyph(atlas, face, char)) for i, face in enumerate(faces) for char in atlas.glyphs[face]]
    pictures = []
    for _, _, found in of:
        inner = found.mask.width - 2 * PAD, found.mask.height - 2 * PAD
        across, down = found.width * level, found.height * level  # pixels
        size = int(across) + 3, int(down) + 3
        x, y = inner[0] / across, inner[1] / down  # mask pixels per pixel
        box = (PAD - x, PAD - y, PAD + (size[0] - 1) * x, PAD + (size[1] - 1) * y)
        drawn = found.mask.resize(size, Image.Resampling.BOX, box)
        ink = np.asarray(drawn).astype(np.float32) / np.float32(255)
        pictures.append(_square(ink, _box_of(ink) or (1, 1, 1 + across, 1 + down)))
    metric = np.array(
        [(max(g.width, g.height), g.top + g.height, g.left, g.left + g.width, g.advance) for _, _, g in of], np.float32
    )
    return Table(
        faces, "".join(char for _, char, _ in of), np.array([i for i, _, _ in of]),
        _standard(np.array(pictures, np.float32)), *metric.T,
    )  # fmt: skip


def _level(height: float) -> int:
    """Return the best level of LEVELS for a line with ink of this height in pixels."""
    return min(LEVELS, key=lambda level: abs(np.log(level * 0.82 / height)))
