"""Measure how often `inkstream verify` is right: on true pictures, and on pictures with one thing wrong.

    python scripts/measure_verify.py --date 2026-11-30 [--texts 200] [--colours 100] [--scenes 100] [--record NAME]

Half of the texts are English and half Chinese, four lines a poster of 512 pixels in two faces of Pocket's atlas. A
wrong text has one character replaced, left out, added or swapped with its neighbour. Colours are hex codes of a shape
on a ground of another colour; a wrong one is 12 to 30 deltaE2000 away. Scenes are counts and relations on flat grounds;
a wrong one has a thing too few, or the two things swapped.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from inkstream.bench.records import write_record
from inkstream.engine.pictures.asked import Asked
from inkstream.engine.pictures.checks import check_picture, check_text, delta_e2000
from inkstream.engine.pictures.ocr import fold, lines_in
from inkstream.engine.pictures.sheet import Tile, contact_sheet
from inkstream.evaluate.verify import check_things
from inkstream.pocket.captions import caption
from inkstream.pocket.colours import lab
from inkstream.pocket.draw import render
from inkstream.pocket.grammar import Grammar, sample
from inkstream.pocket.scenes import Background, Scene, Writing
from inkstream.pocket.vocabulary import HANZI

SIDE = 512
LINES = 4
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"
"""Without the look-alikes 0 and O, 1 and I, which do not count as errors."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--date", required=True, help="date of the record")
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--colours", type=int, default=100)
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--record", help="write benchmarks/records/NAME.json")
    parser.add_argument("--picture", type=Path, help="write pictures with verdicts, and end")
    options = parser.parse_args()
    if options.picture:
        show().save(options.picture)
        return
    rows: list[dict[str, Any]] = []
    for kind, judge, count in (
        ("English text", lambda number: texts(number, False), options.texts // 2 // LINES),
        ("Chinese text", lambda number: texts(number, True), options.texts // 2 // LINES),
        ("colour", colours, options.colours),
        ("count or relation", scenes, options.scenes),
    ):
        found: Counter[str] = Counter()
        for number in range(count):
            found += judge(number)
        rows.append({"kind": kind, **found})
        print(rows[-1], flush=True)
    total = {name: sum(row[name] for row in rows) for name in ("truths", "accepted", "wrong", "refused")}
    rows.append({"kind": "all", **total})
    for row in rows:
        row["true_right"] = round(row["accepted"] / row["truths"], 4)
        row["wrong_right"] = round(row["refused"] / row["wrong"], 4)
        print(row)
    if options.record:
        print(write_record(options.record, options.date, shlex.join(["python", *sys.argv]), {}, rows))


def show() -> Image.Image:
    """A contact sheet of pictures that were asked for the same, and their verdicts."""
    chooser, tiles = Random("picture"), []
    for asked, drawn in (
        ("SALE 50", "SALE 50"),
        ("SALE 50", "SLAE 50"),
        ("春天大吉", "春天大吉"),
        ("春天大吉", "春天太吉"),
    ):
        image = poster([drawn], chooser).crop((0, 0, SIDE, SIDE // 3))
        tiles.append((image, check_picture(image, Asked((asked,)))))
    for colour in ("#dc1e26", "#b04a3a"):
        image = Image.new("RGB", (SIDE, SIDE // 3), "white")
        image.paste(colour, (SIDE // 4, 30, 3 * SIDE // 4, SIDE // 3 - 30))
        tiles.append((image, check_picture(image, Asked(colours=("#dc1e26",)))))
    shown = [Tile(image, checks.line, "right" if checks.passed else "wrong") for image, checks in tiles]
    return contact_sheet(shown, 2, 320)


def tally(truths: list[bool], wrong: list[bool]) -> Counter[str]:
    """Counts of what passed: of true pictures, and of wrong ones."""
    return Counter(truths=len(truths), accepted=sum(truths), wrong=len(wrong), refused=len(wrong) - sum(wrong))


def texts(number: int, chinese: bool) -> Counter[str]:
    """A poster of four texts, and one with an error in each."""
    chooser = Random(f"{number} {chinese}")
    asked = [word(chooser, chinese) for _ in range(LINES)]
    passed = []
    for drawn in (asked, [spoilt(text, chooser, chinese) for text in asked]):
        lines = [line.text for line in lines_in(poster(drawn, chooser))]
        passed.append([check_text(lines, text).exact for text in asked])
    return tally(*passed)


def word(chooser: Random, chinese: bool) -> str:
    if chinese:
        return "".join(chooser.choices(HANZI, k=chooser.randint(3, 6)))
    return "".join(chooser.choices(LETTERS, k=chooser.randint(4, 9)))


def spoilt(text: str, chooser: Random, chinese: bool) -> str:
    """A text with one error, which is another text without case and look-alikes too."""
    while True:
        at, other = chooser.randrange(len(text)), chooser.choice(HANZI if chinese else LETTERS)
        swapped = text[:at] + text[at : at + 2][::-1] + text[at + 2 :]
        made = chooser.choice(
            [text[:at] + other + text[at + 1 :], text[:at] + text[at + 1 :], text[:at] + other + text[at:], swapped]
        )
        if fold(made) != fold(text):
            return made


def poster(lines: list[str], chooser: Random) -> Image.Image:
    """Four lines of text, one below the other, in one colour on another."""
    ground, ink = chooser.choice([("white", "black"), ("black", "white"), ("yellow", "blue"), ("blue", "white"),
                                  ("white", "red"), ("green", "white")])  # fmt: skip
    written = tuple(
        Writing(text, chooser.choice(["sans", "bold"]), ink, 0.5, 0.14 + 0.24 * at, chooser.uniform(0.08, 0.12))
        for at, text in enumerate(lines)
    )
    return render(Scene("text", Background("flat", (ground,)), (), written), SIDE)


def colours(number: int) -> Counter[str]:
    """A shape of a hex colour, and one of another colour, each on a ground that is far from both."""
    chooser = Random(f"colour {number}")
    asked, wrong, ground = (any_colour(chooser) for _ in range(3))
    while not 12 <= apart(asked, wrong) <= 30:
        wrong = any_colour(chooser)
    while min(apart(ground, asked), apart(ground, wrong)) < 20:
        ground = any_colour(chooser)
    wanted = Asked(colours=("#" + "".join(f"{value:02x}" for value in asked),))
    side = chooser.uniform(0.16, 0.46)
    scene = sample(
        Grammar(things=1, relation=0, count=0, emoji=0, text=0, objects=(1, 1), emoji_among_things=0), number
    )
    thing = replace(scene.things[0], side=side, x=0.5, y=0.5, colour="white")
    mask = render(Scene("things", Background("flat", ("black",)), (thing,)), SIDE).convert("L")
    passed = []
    for colour in (asked, wrong):
        picture = Image.composite(Image.new("RGB", mask.size, colour), Image.new("RGB", mask.size, ground), mask)
        passed.append([check_picture(picture, wanted).passed])
    return tally(*passed)


def any_colour(chooser: Random) -> tuple[int, int, int]:
    return chooser.randrange(256), chooser.randrange(256), chooser.randrange(256)


def apart(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    return float(delta_e2000(lab(np.array(a)), lab(np.array(b))))


def scenes(number: int) -> Counter[str]:
    """A scene with a count or a relation, and one that differs in it."""
    kind = ("count", "relation")[number % 2]
    only = {name: float(name == kind) for name in ("things", "relation", "count", "emoji", "text")}
    scene = sample(Grammar(**only, emoji_among_things=0, flat=1, gradient=0, split=0), 9_000_000 + number, "any", kind)
    if kind == "count":
        wrong = replace(scene, things=scene.things[:-1])
    else:
        first, second = scene.things
        moved = (replace(first, x=second.x, y=second.y), replace(second, x=first.x, y=first.y))
        wrong = replace(scene, things=moved)
    asked = caption(scene, language=("en", "zh")[number // 2 % 2])
    passed = [[all(check.right for check in check_things(render(one, SIDE), asked))] for one in (scene, wrong)]
    return tally(*passed)


if __name__ == "__main__":
    main()
