"""Contact sheets: the places of pictures, marks, labels and captions."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from inkstream.engine.pictures.sheet import (
    FAINT,
    GRAY,
    GREEN,
    INK,
    LINES,
    RED,
    TILE,
    Tile,
    contact_sheet,
    edge_of,
    font,
    wrapped,
)

BLUE = Image.new("RGB", (32, 32), "blue")
EDGE, ACROSS = edge_of(TILE), TILE + 2 * edge_of(TILE)


def pixels(sheet: Image.Image) -> np.ndarray:
    return np.asarray(sheet).astype(int)


def count(area: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((area == colour).all(-1).sum())


def test_marks_colour_the_frame_and_stand_before_the_caption():
    sheet = pixels(contact_sheet([Tile(BLUE, "a blue picture", mark) for mark in ("right", "wrong", "unknown")]))
    assert sheet.shape[1] == 3 * ACROSS
    for i, colour in enumerate((GREEN, RED, GRAY)):
        tile = sheet[:, i * ACROSS : (i + 1) * ACROSS]
        assert tuple(tile[EDGE - 2, ACROSS // 2]) == colour
        assert tuple(tile[EDGE + 5, ACROSS // 2]) == (0, 0, 255)
        words = tile[TILE + EDGE + 4 :]
        assert (words.max(-1) < 90).sum() > 30  # dark letters
        assert count(words, colour) > 5  # the mark


def test_a_label_stands_below_its_picture_and_covers_nothing_of_it():
    sheet = pixels(contact_sheet([Tile(BLUE, "seed 7", label="12")], size=320))
    edge = edge_of(320)
    assert count(sheet[edge : edge + 320, edge : edge + 320], (0, 0, 255)) == 320 * 320
    below = sheet[edge + 322 :]
    plate = (below == INK).all(-1)
    assert plate.sum() > 300
    assert count(below[:, : plate.any(0).nonzero()[0].max()], (255, 255, 255)) > 20  # white digits
    assert count(below[:, plate.any(0).nonzero()[0].max() :], FAINT) > 20  # the seed


def test_pictures_are_in_rows_under_the_heading():
    tiles = [Tile(Image.new("RGB", (64, 32), (0, 0, 250 - i)), "") for i in range(5)]
    plain, headed = (contact_sheet(tiles, 2, 320, heading, "z-image") for heading in ("", "a fox " * 60))
    assert plain.width == headed.width == 2 * (320 + 2 * edge_of(320))
    assert headed.height - plain.height == 3 * (max(11, 320 * 3 // 2 // 20) * 14 // 11)
    shown = pixels(headed)
    tops = [int((shown == (0, 0, 250 - i)).all(-1).any(1).argmax()) for i in range(5)]
    lefts = [int((shown == (0, 0, 250 - i)).all(-1).any(0).argmax()) for i in range(5)]
    assert tops[0] == tops[1] < tops[2] == tops[3] < tops[4]
    assert lefts[0] == lefts[2] == lefts[4] == edge_of(320) < lefts[1] == lefts[3]


def test_portrait_pictures_have_narrow_tiles():
    sheet = contact_sheet([Tile(Image.new("RGB", (32, 64)), "", label=str(i)) for i in range(3)], size=320)
    assert sheet.width == 3 * (160 + 2 * edge_of(320))


def test_a_sheet_without_pictures_is_white():
    assert pixels(contact_sheet([])).min() == 255


@pytest.mark.parametrize("prompt", ["a very " * 60, "x" * 300, "写着春天" * 40], ids=["words", "a word", "Hanzi"])
def test_long_captions_are_cut_to_their_tile(prompt):
    lines = wrapped(prompt, TILE, TILE, indent=14)
    assert len(lines) == LINES
    assert lines[-1].endswith("…")
    assert all(font(TILE).getlength(line) <= TILE + 8 for line in lines)


def test_short_captions_stay_on_one_line():
    assert wrapped("a red circle", TILE, TILE) == ["a red circle"]
