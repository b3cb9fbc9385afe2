"""Graders mark what a picture shows: everything right on true pictures, and exactly what is wrong on altered ones."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, replace

import numpy as np
import pytest
from PIL import Image

from inkstream.evaluate.grades import edit_distance, fold, grade
from inkstream.evaluate.reading import read
from inkstream.evaluate.seeing import NAMES, see, things_of
from inkstream.pocket.captions import STATES
from inkstream.pocket.colours import COLOURS
from inkstream.pocket.draw import render
from inkstream.pocket.grammar import Grammar, sample
from inkstream.pocket.scenes import KINDS, Background, Scene, Thing, Writing
from inkstream.pocket.vocabulary import HIDING, SHAPES

FIRST = 7_000_000  # numbers of scenes that no suite and no recipe takes
SIDE = 128
COUNTS = {"things": 60, "relation": 110, "count": 60, "emoji": 100, "text": 240}


def thing(name="circle", colour="red", x=0.3, y=0.3, side=0.25):
    return Thing(name, colour, "medium", x, y, side)


def writing(text="OPEN", y=0.5, em=0.25, colour="black", face="bold"):
    return Writing(text, face, colour, 0.5, y, em)


WHITE = Background("flat", ("white",))
PAIR = Scene("things", WHITE, (thing(), thing("square", "blue", 0.7, 0.7)))
SIGN = Scene("text", WHITE, writings=(writing(),))


def marks(drawn, asked, stated=STATES["dense"], side=SIDE):
    return grade(render(drawn, side), asked, stated)


def shares(side, counts):
    found = defaultdict(list)
    for kind in KINDS:
        for i in range(counts[kind]):
            scene = sample(Grammar(), FIRST + i, "held_out" if i % 2 else "train", kind)
            for name, value in asdict(marks(scene, scene, side=side)).items():
                if name not in ("script", "length") and value is not None:
                    found[name].append(float(value))
    return found


@pytest.mark.slow
def test_true_pictures_are_marked_right():
    found = shares(SIDE, COUNTS)
    assert min(len(values) for values in found.values()) >= 60
    wrong = {name: round(1 - sum(values) / len(values), 4) for name, values in found.items()}
    assert max(wrong.values()) <= 0.01, wrong


def test_true_pictures_of_twice_the_size_are_marked_right_too():
    found = shares(2 * SIDE, dict.fromkeys(KINDS, 12))
    wrong = {name: [v for v in values if v < 1] for name, values in found.items()}
    assert not any(wrong.values()), wrong


def test_a_picture_may_be_wider_than_high():
    for picture in (render(PAIR, 256, 128), render(PAIR, 128, 192)):
        found = grade(picture, PAIR)
        assert found.object_and_colour
        assert found.places == found.colours == 1


# What is wrong is marked wrong, and nothing else

ALL_OF_ONE = {"objects", "colours", "object_and_colour", "places"}
"""Marks that change where a thing is not there under its name."""


@pytest.mark.parametrize(
    ("drawn", "wrong"),
    [
        (replace(PAIR, things=(thing("triangle"), PAIR.things[1])), ALL_OF_ONE),
        (replace(PAIR, things=(thing(colour="green"), PAIR.things[1])), {"colours", "object_and_colour"}),
        (replace(PAIR, things=(thing(x=0.7), PAIR.things[1])), {"places"}),
        (replace(PAIR, things=PAIR.things[:1]), ALL_OF_ONE),
        (replace(PAIR, things=(*PAIR.things, thing("star", "pink", 0.7, 0.25))), {"object_and_colour"}),
        (replace(PAIR, background=Background("flat", ("yellow",))), {"background"}),
        (replace(PAIR, background=Background("gradient", ("white", "yellow"))), {"background"}),
    ],
    ids=["another name", "another colour", "elsewhere", "missing", "one more", "another ground", "a fading ground"],
)  # fmt: skip
def test_what_is_wrong_is_marked_and_nothing_else(drawn, wrong):
    right, found = asdict(marks(PAIR, PAIR)), asdict(marks(drawn, PAIR))
    assert right["object_and_colour"]
    assert {name for name in right if right[name] != found[name]} == wrong


def test_colours_that_changed_places_are_marked():
    drawn = replace(PAIR, things=(thing(colour="blue"), thing("square", "red", 0.7, 0.7)))
    assert marks(drawn, PAIR).colours == 0
    assert not marks(drawn, PAIR).object_and_colour


@pytest.mark.parametrize("drawn", [2, 3, 4, 5])
def test_a_count_is_right_only_as_it_is(drawn):
    def dots(count):
        places = [(0.2, 0.2), (0.8, 0.2), (0.5, 0.5), (0.2, 0.8), (0.8, 0.8)]
        return Scene("count", WHITE, tuple(thing(x=x, y=y, side=0.2) for x, y in places[:count]))

    for asked in (2, 3, 4, 5):
        assert marks(dots(drawn), dots(asked)).count is (drawn == asked)


def test_a_relation_that_is_turned_round_is_wrong():
    first, second = thing("star", "red", 0.25, 0.5), thing("square", "blue", 0.75, 0.5)
    scene = Scene("relation", WHITE, (first, second), relation="left of")
    turned = replace(scene, things=(replace(first, x=0.75), replace(second, x=0.25)))
    aslant = replace(scene, things=(replace(first, y=0.15), replace(second, x=0.45, y=0.85)))
    assert [marks(drawn, scene).relation for drawn in (scene, turned, aslant)] == [True, False, False]
    assert marks(turned, scene).object_and_colour


def test_of_two_alike_but_for_colour_the_relation_is_told_by_it():
    first, second = thing("star", "red", 0.25, 0.5), thing("star", "blue", 0.75, 0.5)
    scene = Scene("relation", WHITE, (first, second), relation="left of")
    turned = replace(scene, things=(replace(first, x=0.75), replace(second, x=0.25)))
    assert marks(scene, scene).relation is True
    assert marks(turned, scene).relation is False


@pytest.mark.parametrize(
    ("asked", "drawn", "characters", "ned"),
    [
        ("OPEN", "OPEN", 1, 1),
        ("OPEN", "OPEM", 0.75, 0.75),
        ("OPEN", "OPE", 0.75, 0.75),
        ("OPE", "OPEN", 2 / 3, 0.75),
        ("OPEN", "Open", 0.25, 0.25),
        ("AT", "SHARKS", 0, 1 / 6),
        ("大吉", "大吉", 1, 1),
        ("大吉", "太吉", 0.5, 0.5),
    ],
)
def test_text_is_marked_by_its_characters(asked, drawn, characters, ned):
    def sign(text):
        return replace(SIGN, writings=(writing(text, em=0.17 if len(text) > 4 else 0.25),))

    found = marks(sign(drawn), sign(asked), side=192)
    assert found.text_exact == (asked == drawn)
    assert found.characters == pytest.approx(characters)
    assert found.ned == pytest.approx(ned)
    assert (found.script, found.length) == ("hanzi" if asked[0] > "z" else "latin", len(asked))


def test_text_that_is_missing_or_beside_what_was_asked_is_wrong():
    blank, two = replace(SIGN, writings=()), replace(SIGN, writings=(writing("OPEN", 0.3), writing("DAY", 0.7)))
    assert marks(blank, SIGN).characters == 0
    assert marks(blank, SIGN).text_exact is False
    assert marks(two, SIGN).text_exact is False
    assert marks(two, two).text_exact is True


def test_where_colours_are_left_open_names_alone_count():
    other = replace(PAIR, things=(thing(colour="green"), PAIR.things[1]))
    wrong = replace(PAIR, things=(thing("triangle"), PAIR.things[1]))
    for drawn, right in ((other, True), (wrong, False)):
        found = grade(render(drawn, SIDE), PAIR, open_colour=True)
        assert found.object_and_colour is right
        assert found.colours is None
    assert grade(render(other, SIDE), PAIR).object_and_colour is False


def test_only_what_the_caption_states_is_marked():
    found = marks(PAIR, PAIR, stated=frozenset())
    assert (found.background, found.places) == (None, None)
    assert found.object_and_colour is True
    assert (found.count, found.relation, found.text_exact) == (None, None, None)


def test_text_too_small_to_be_read_is_not_marked():
    small = replace(SIGN, writings=(writing(em=0.06),))
    assert marks(small, small).text_exact is None
    assert marks(small, small, side=256).text_exact is True


# From pixels alone


@pytest.mark.parametrize("colour", COLOURS)
def test_a_blank_picture_holds_nothing(colour):
    seen = see(Image.new("RGB", (SIDE, SIDE), COLOURS[colour]))
    assert seen.background == Background("flat", (colour,))
    assert things_of(seen) == []
    assert read(Image.new("RGB", (SIDE, SIDE), COLOURS[colour])) == []


def test_noise_is_marked_wrong():
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    for scene in (PAIR, SIGN):
        found = grade(noise, scene)
        assert not found.object_and_colour
        assert not found.text_exact


def test_a_thing_like_nothing_has_no_name_and_spoils_the_picture():
    picture = np.array(render(PAIR, SIDE))
    picture[20:60, 80:84] = picture[38:42, 62:102] = (40, 150, 60)
    picture[24:30, 66:100] = (142, 48, 160)
    assert None in [found.name for found in things_of(see(picture))]
    assert grade(picture, PAIR).object_and_colour is False
    assert grade(picture, PAIR).objects == 1


@pytest.mark.parametrize("side", [128, 256])
@pytest.mark.parametrize(
    ("name", "ground", "size"),
    [("robot", "gray", 0.25), ("robot", "gray", 0.42), ("trumpet", "yellow", 0.25), ("tulip", "pink", 0.42)],
)
def test_an_emoji_whose_body_is_of_the_backgrounds_colour_is_seen_by_its_other_parts(name, ground, size, side):
    seen = things_of(
        see(render(Scene("emoji", Background("flat", (ground,)), (thing(name, None, 0.5, 0.5, size),)), side))
    )
    assert [(one.name, one.colour, one.place) for one in seen] == [(name, None, "center")]


def test_things_near_a_thing_like_nothing_are_not_joined_with_it():
    pair = (thing("robot", None, 0.3, 0.5), thing("circle", "red", 0.7, 0.5))
    seen = things_of(see(render(Scene("things", Background("flat", ("gray",)), pair), SIDE)))
    assert sorted(one.name or "" for one in seen) == ["circle", "robot"]


def test_small_errors_of_colour_do_not_matter():
    picture = np.asarray(render(PAIR, SIDE)).astype(int)
    off = np.random.default_rng(0).normal(0, 5, picture.shape) + np.array([6, -6, 4])
    assert grade(np.clip(picture + off, 0, 255).astype(np.uint8), PAIR).object_and_colour is True


def test_every_name_is_told_from_every_other():
    wrong = []
    for name in NAMES:
        colour = "blue" if name in SHAPES else None
        ground = Background("flat", (next(c for c in reversed(COLOURS) if name not in HIDING.get(c, ())),))
        scene = Scene("things", ground, (Thing(name, colour, "large", 0.5, 0.5, 0.45),))
        if not marks(scene, scene).object_and_colour:
            wrong.append(name)
    assert wrong == []


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("一二", "二", 1)],
)
def test_edit_distances(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_what_looks_alike_is_alike():
    assert fold("Ill  be") == fold("III be")
    assert fold("O") != fold("0")
