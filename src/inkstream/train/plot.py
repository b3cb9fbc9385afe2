"""The curve of a loss as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

WIDTH, HEIGHT, LEFT, BOTTOM, EDGE = 900, 420, 70, 36, 16
INKS = ((36, 84, 166), (200, 80, 30), (40, 130, 70), (130, 60, 150))


def plot(curves: dict[str, Sequence[tuple[int, float]]], path: Path) -> None:
    """Write curves, points (step, value) by name, as a PNG; values above 0 on a logarithmic axis."""
    curves = {name: [(x, y) for x, y in points if y > 0 and math.isfinite(y)] for name, points in curves.items()}
    curves = {name: smoothed(points) for name, points in curves.items() if points}
    if not curves:
        return
    xs = [x for points in curves.values() for x, _ in points]
    ys = [y for points in curves.values() for _, y in points]
    first, last = 0, max(max(xs), 1)
    low, high = math.log10(min(ys)) - 0.02, math.log10(max(ys)) + 0.02
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first)
        up = (math.log10(y) - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - EDGE), HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - EDGE)

    for i in range(6):
        value = 10 ** (low + (high - low) * i / 5)
        _, y = at(0, value)
        draw.line([(LEFT, y), (WIDTH - EDGE, y)], fill=(225, 225, 225))
        draw.text((8, y - 6), f"{value:.3g}", fill=(80, 80, 80))
        step = round(first + (last - first) * i / 5)
        draw.text((at(step, value)[0] - 12, HEIGHT - BOTTOM + 10), str(step), fill=(80, 80, 80))
    for (name, points), ink, row in zip(curves.items(), INKS, range(len(curves))):
        places = [at(x, y) for x, y in points]
        draw.line(places, fill=ink, width=2) if len(places) > 1 else draw.point(places, fill=ink)
        draw.text((WIDTH - 190, EDGE + 4 + 14 * row), name, fill=ink)
    image.save(path)


def smoothed(points: Sequence[tuple[int, float]], most: int = 300) -> list[tuple[int, float]]:
    """At most so many points: means of neighbours."""
    size = -(-len(points) // most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
