"""Plots the curves of a run as a PNG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

from PIL import Image, ImageDraw

WIDTH, HEIGHT, LEFT, BOTTOM, EDGE, RIGHT = 900, 420, 70, 36, 16, 210
INKS = ((36, 84, 166), (200, 80, 30), (40, 130, 70), (130, 60, 150), (20, 150, 170), (150, 120, 20), (90, 90, 90))
Curves = Mapping[str, Sequence[tuple[int, float]]]
"""Points (step, value) of each curve, by name."""


def plot(losses: Curves, shares: Curves, path: Path) -> None:
    """Write curves as a PNG: positive losses on a logarithmic axis (left), shares on a percent axis (right)."""
    losses = {name: [(x, y) for x, y in points if y > 0 and math.isfinite(y)] for name, points in losses.items()}
    losses = {name: smoothed(points) for name, points in losses.items() if points}
    if not losses:
        return
    last = max(1, *(x for points in (*losses.values(), *shares.values()) for x, _ in points))
    ys = [y for points in losses.values() for _, y in points]
    low, high = math.log10(min(ys)) - 0.02, math.log10(max(ys)) + 0.02
    right = WIDTH - RIGHT
    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)

    def at(x: float, up: float) -> tuple[float, float]:
        return LEFT + x / last * (right - LEFT), HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - EDGE)

    for i in range(6):
        x, y = at(last * i / 5, i / 5)
        draw.line([(LEFT, y), (right, y)], fill=(225, 225, 225))
        draw.text((8, y - 6), f"{10 ** (low + (high - low) * i / 5):.3g}", fill=(80, 80, 80))
        if shares:
            draw.text((right + 6, y - 6), f"{20 * i}%", fill=(80, 80, 80))
        draw.text((x - 12, HEIGHT - BOTTOM + 10), str(round(last * i / 5)), fill=(80, 80, 80))
    risen = {name: [(x, (math.log10(y) - low) / (high - low)) for x, y in points] for name, points in losses.items()}
    for row, ((name, points), ink) in enumerate(zip([*risen.items(), *shares.items()], cycle(INKS))):
        places = [at(x, up) for x, up in points]
        draw.line(places, fill=ink, width=2) if len(places) > 1 else draw.point(places, fill=ink)
        draw.text((right + 50, EDGE + 4 + 14 * row), name, fill=ink)
    image.save(path)


def smoothed(points: Sequence[tuple[int, float]], most: int = 300) -> list[tuple[int, float]]:
    """Reduce a curve to at most `most` points by means of neighbours."""
    size = -(-len(points) // most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]
