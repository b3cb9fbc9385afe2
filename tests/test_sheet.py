"""Contact sheets: the places of pictures, marks, labels and captions."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from inkstream.engine.pictures import sheet as sheets
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
    em_of,
    font,
    length_of,
    wrapped,
)
from inkstream.evaluate.suites import FILES, open_suite
from inkstream.pocket.atlas import glyph, load_atlas
from inkstream.pocket.letters import BASELINE, EM, characters, letter

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
    assert all(length_of(line, TILE) <= TILE + 8 for line in lines)


@pytest.fixture
def no_system_font(monkeypatch):
    monkeypatch.setattr(sheets, "FACES", {})
    for cached in (sheets.font, sheets._system_font):
        cached.cache_clear()
    yield
    for cached in (sheets.font, sheets._system_font):
        cached.cache_clear()


def test_hanzi_of_captions_are_drawn_without_a_font_of_the_system(no_system_font):
    spring, summer, boxes = (
        pixels(contact_sheet([Tile(BLUE, words, label="")], size=320))[320:] for words in ("春", "夏", "\U0001f600")
    )
    em = em_of(320)
    assert em == EM  # so the mask is drawn as it is
    mask = np.asarray(letter("春")).astype(float) / 255
    top = 320 + edge_of(320) + 4 + font(320).getbbox("H")[3] - BASELINE - 320
    drawn = spring[top : top + em, edge_of(320) : edge_of(320) + em]
    assert drawn == pytest.approx(255 + mask[..., None] * (np.array(FAINT) - 255), abs=1)
    assert (spring != summer).any()
    assert (spring != boxes).any()
    assert length_of("写着 open", 320) == 2 * em + font(320).getlength(" open")


def test_letters_hold_every_character_of_the_suites_and_look_like_pockets_glyphs():
    prompts = "".join(case.prompt for name in FILES for case in open_suite(name))
    assert {char for char in prompts if "\u3000" <= char <= "\uffef"} <= characters().keys()
    chars = "春夏秋冬福喜山水火木人口中国"

    def ink(mask: Image.Image) -> np.ndarray:
        values = np.asarray(mask.crop(mask.getbbox()).resize((EM, EM), Image.Resampling.BOX)).astype(float)
        return (values - values.mean()).ravel() / values.std()

    ours = np.stack([ink(letter(char)) for char in chars])
    theirs = np.stack([ink(glyph(load_atlas(), "sans", char).mask) for char in chars])
    assert ((ours @ theirs.T).argmax(1) == np.arange(len(chars))).all()


def test_short_captions_stay_on_one_line():
    assert wrapped("a red circle", TILE, TILE) == ["a red circle"]
