"""Drawings of people as OpenPose makes them: coloured limbs and joints on black. Facts: OpenPose's JSON output."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

from PIL import Image, ImageDraw

from inkstream.engine.pictures.inputs import LONGEST, MAX_AREA
from inkstream.types import InputError, as_object

Point = tuple[float, float]
Points = list[Point | None]  # None: not seen
Colour = tuple[int, int, int]

SIDE = 512
"""The shorter side at which limbs are 8 pixels wide."""
PEOPLE = 200
"""More people than this are refused."""
SMOOTH = 2
"""The drawing is made this many times larger, then scaled down."""

LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0),
    (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
"""Pairs of the 18 keypoints: nose, neck, right arm, left arm, right leg, left leg, eyes, ears."""
COLOURS: tuple[Colour, ...] = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85),
    (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255),
    (255, 0, 170), (255, 0, 85),
)  # fmt: skip
"""Of each keypoint, and of each limb."""
LAYOUTS = {
    18: range(18),
    25: (*range(8), 9, 10, 11, 12, 13, 14, 15, 16, 17, 18),  # BODY_25 has the middle of the hips, and feet
    17: (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3),  # COCO has no neck
}
"""Number of keypoints of a body -> the place of each of the 18; None: the neck, between the shoulders."""
FINGERS = [(0 if i % 4 == 0 else i, i + 1) for i in range(20)]


def pose(frame: dict[str, Any], size: tuple[int, int] | None, least: float) -> Image.Image:
    """The people of a frame of keypoints, at `size`, or at the size of the frame's canvas.

    Coordinates are pixels of the canvas, or shares of it if none is above 1. least: the confidence of keypoints.
    """
    people = cast("list[Any]", frame["people"])
    if len(people) > PEOPLE:
        raise InputError(f"{len(people)} people are more than {PEOPLE}: leave some out of the keypoints")
    bodies = [as_object(person) or {} for person in people]
    parts = [{name: _read(person.get(name), name, least) for name in _NAMES} for person in bodies]
    canvas = _canvas(frame, size, parts)
    size = size or canvas
    ratio = SMOOTH * max(size[0] / canvas[0], size[1] / canvas[1])  # covers, as a start picture does
    offset = tuple((side * SMOOTH - own * ratio) / 2 for side, own in zip(size, canvas))
    every = [point for person in parts for points in person.values() for point in points if point is not None]
    unit = canvas if every and max(max(point) for point in every) <= 1 else (1, 1)

    def place(points: Points) -> Points:
        return [
            None if p is None else tuple(v * u * ratio + o for v, u, o in zip(p, unit, offset))  # type: ignore[misc]
            for p in points
        ]

    page = Image.new("RGB", (size[0] * SMOOTH, size[1] * SMOOTH))
    pen, width = ImageDraw.Draw(page), 4 * SMOOTH * min(size) / SIDE
    for person in parts:
        _draw_body(pen, place(_body(person["pose_keypoints_2d"])), width)
        for name in ("hand_left_keypoints_2d", "hand_right_keypoints_2d"):
            _draw_hand(pen, place(person[name]), width)
        for point in place(person["face_keypoints_2d"]):
            _dot(pen, point, width * 0.75, (255, 255, 255))
    return page.resize(size, Image.Resampling.BOX)


_NAMES = ("pose_keypoints_2d", "face_keypoints_2d", "hand_left_keypoints_2d", "hand_right_keypoints_2d")


def _read(values: Any, name: str, least: float) -> Points:
    """Keypoints from a flat list x, y, confidence, ... A point at 0, 0, or far outside, is not seen."""
    if values is None:
        return []
    flat: list[Any] = cast("list[Any]", values) if isinstance(values, list) else [None]
    if len(flat) % 3 or not all(isinstance(value, int | float) and abs(value) < 1e6 for value in flat):
        raise InputError(f"{name} is no list of x, y, confidence for each keypoint: write it as OpenPose does")
    triples = [flat[i : i + 3] for i in range(0, len(flat), 3)]
    return [None if c < least or (x == 0 and y == 0) else (float(x), float(y)) for x, y, c in triples]


def _canvas(frame: dict[str, Any], size: tuple[int, int] | None, parts: Sequence[dict[str, Points]]) -> tuple[int, int]:
    """The frame's canvas; without one, `size`; without that, a canvas that holds all keypoints."""
    given: list[Any] = [frame.get("canvas_width"), frame.get("canvas_height")]
    if all(isinstance(side, int) and 1 <= side <= LONGEST for side in given):
        width, height = int(given[0]), int(given[1])
        if size is None and width * height > 4 * MAX_AREA:
            raise InputError(f"a canvas of {width}x{height} is too large: take one of up to 4096x4096 pixels")
        return width, height
    if given != [None, None]:
        shown = "x".join(str(side)[:20] for side in given)
        raise InputError(f"a canvas of {shown} is no size: take canvas_width and canvas_height up to {LONGEST} pixels")
    if size is not None:
        return size
    points = [point for person in parts for some in person.values() for point in some if point is not None]
    far = [max((point[axis] for point in points), default=0) for axis in (0, 1)]
    if max(far) <= 1:
        return 1024, 1024
    width, height = (min(4096, max(64, math.ceil(side * 1.1))) for side in far)
    return width, height


def _body(points: Points) -> Points:
    """The 18 keypoints of a body."""
    if not points:
        return []
    layout = LAYOUTS.get(len(points))
    if layout is None:
        raise InputError(
            f"a body of {len(points)} keypoints is not known: give 18 (OpenPose), 25 (BODY_25) or 17 (COCO)"
        )
    right, left = (points[6], points[5]) if len(points) == 17 else (None, None)
    neck = None if right is None or left is None else ((right[0] + left[0]) / 2, (right[1] + left[1]) / 2)
    return [neck if place is None else points[place] for place in layout]


def _draw_body(pen: ImageDraw.ImageDraw, points: Points, width: float) -> None:
    if not points:
        return
    for (a, b), colour in zip(LIMBS, COLOURS):
        if (start := points[a]) is not None and (end := points[b]) is not None:
            pen.polygon(list(_ellipse(start, end, width)), fill=tuple(int(value * 0.6) for value in colour))
    for point, colour in zip(points, COLOURS):
        _dot(pen, point, width, colour)


def _draw_hand(pen: ImageDraw.ImageDraw, points: Points, width: float) -> None:
    if points and len(points) != 21:
        raise InputError(f"a hand of {len(points)} keypoints is not known: give 21, as OpenPose does")
    for i, (a, b) in enumerate(FINGERS if points else ()):
        if (start := points[a]) is not None and (end := points[b]) is not None:
            red, green, blue = colorsys.hsv_to_rgb(i / len(FINGERS), 1, 1)
            colour = round(red * 255), round(green * 255), round(blue * 255)
            pen.line([*start, *end], fill=colour, width=max(1, round(width / 2)))
    for point in points:
        _dot(pen, point, width * 0.75, (0, 0, 255))


def _ellipse(start: Point, end: Point, width: float) -> Iterator[Point]:
    """An ellipse from one joint to another."""
    dx, dy = (end[0] - start[0]) / 2, (end[1] - start[1]) / 2
    length = math.hypot(dx, dy) or 1
    for step in range(36):
        along, across = math.cos(step * math.tau / 36), math.sin(step * math.tau / 36) * width / length
        yield start[0] + dx + dx * along - dy * across, start[1] + dy + dy * along + dx * across


def _dot(pen: ImageDraw.ImageDraw, point: Point | None, radius: float, colour: Colour) -> None:
    if point is not None:
        x, y = point
        pen.ellipse([x - radius, y - radius, x + radius, y + radius], fill=colour)
