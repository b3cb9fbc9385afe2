"""Scenes: a grammar draws them from numbers, JSON carries them, the renderer draws them from the atlas."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inkstream.pocket import atlas
from inkstream.pocket.captions import caption
from inkstream.pocket.colours import COLOURS, lab, nearest_colour
from inkstream.pocket.draw import render
from inkstream.pocket.grammar import Grammar, colours_on, sample
from inkstream.pocket.scenes import (
    GAP,
    KINDS,
    MARGIN,
    RELATIONS,
    SIDES,
    TRACKING,
    Background,
    Scene,
    Thing,
    Writing,
    is_held_out,
    is_held_out_text,
    is_held_out_thing,
    line_width,
    place_of,
    relation_holds,
    script_of,
)
from inkstream.pocket.vocabulary import CHINESE, EMOJI, ENGLISH, HANZI, HIDING, LATIN, SHAPES
from inkstream.types import InputError

GRAMMAR = Grammar()
WHITE = Background("flat", ("white",))


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [sample(GRAMMAR, seed) for seed in range(1000)]


def box(x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def boxes(scene: Scene) -> list[tuple[float, float, float, float]]:
    """What a scene's things and lines of text fill at most, in shares of a square picture."""
    things = [box(t.x, t.y, t.side, t.side) for t in scene.things]
    return things + [box(w.x, w.y, line_width(w.text, w.face) * w.em, w.em) for w in scene.writings]


# What there is


def test_the_grammar_has_what_was_promised():
    assert len(SHAPES) >= 12
    assert len(EMOJI) >= 100
    assert len(COLOURS) == 12
    assert set("".join(CHINESE)) <= set(HANZI)
    assert set("".join(ENGLISH)) <= {*LATIN, " "}


def test_any_two_colours_can_be_told_apart():
    values = lab(list(COLOURS.values()))
    apart = np.linalg.norm(values[:, None] - values[None], axis=-1)
    assert apart[~np.eye(len(values), dtype=bool)].min() >= 38
    assert [nearest_colour(rgb) for rgb in COLOURS.values()] == list(COLOURS)


# Sampling


def test_the_same_number_always_gives_the_same_scene(scenes):
    assert [sample(GRAMMAR, seed) for seed in range(100)] == scenes[:100]
    assert len(set(scenes)) > 990


def test_a_scenes_number_is_not_changed_by_what_was_sampled_before():
    first = sample(GRAMMAR, 4242)
    for seed in range(10):
        sample(replace(GRAMMAR, shapes=3), seed)
    assert sample(GRAMMAR, 4242) == first


def test_kinds_come_as_often_as_their_shares(scenes):
    counted = Counter(scene.kind for scene in scenes)
    total = sum(getattr(GRAMMAR, kind) for kind in KINDS)
    for kind in KINDS:
        assert counted[kind] / len(scenes) == pytest.approx(getattr(GRAMMAR, kind) / total, abs=0.05)


def test_json_carries_a_scene_there_and_back(scenes):
    for scene in scenes[:200]:
        assert Scene.from_json(json.loads(json.dumps(scene.to_json()))) == scene


@pytest.mark.parametrize("missing", ["kind", "background", "things", "writings", "relation"])
def test_a_scene_that_lacks_a_field_is_refused_by_its_name(scenes, missing):
    table = scenes[0].to_json()
    del table[missing]
    with pytest.raises(InputError, match=missing):
        Scene.from_json(table)


# Held out


def test_what_is_held_out_is_decided_by_a_hash_and_is_one_in_twenty():
    pairs = [Thing(name, colour, "small", 0.5, 0.5, 0.2) for name in SHAPES for colour in COLOURS]
    pairs += [Thing(name, None, "medium", x, y, 0.2) for name in EMOJI for x in (0.1, 0.5, 0.9) for y in (0.1, 0.9)]
    texts = [a + b + c for a in "ABCDEFGH" for b in "ABCDEFGH" for c in "ABCDEFGH"]
    assert np.mean([is_held_out_thing(thing) for thing in pairs]) == pytest.approx(0.05, abs=0.02)
    assert np.mean([is_held_out_text(text) for text in texts]) == pytest.approx(0.05, abs=0.03)


def test_a_held_out_string_is_so_in_any_case_and_spacing():
    held = next(text for text in ENGLISH if is_held_out_text(text) and len(text) > 3)
    assert is_held_out_text(held.lower())
    assert is_held_out_text(held.title())
    assert is_held_out_text(f" {held[:2]} {held[2:]} ")


def test_no_training_scene_holds_what_is_held_out(scenes):
    held = [scene for scene in scenes if is_held_out(scene)]
    assert held == []
    loose = [sample(GRAMMAR, seed, "any") for seed in range(1000)]
    assert sum(map(is_held_out, loose)) > 30  # the grammar would give them


def test_every_held_out_scene_holds_such_a_thing():
    for kind in KINDS:
        for seed in range(20):
            scene = sample(GRAMMAR, seed, "held_out", kind)
            assert scene.kind == kind
            assert is_held_out(scene)
            if kind == "text":
                assert is_held_out_text(scene.writings[0].text)


# Layout


def test_things_and_text_lie_inside_and_apart(scenes):
    for scene in scenes:
        filled = boxes(scene)
        for left, top, right, bottom in filled:
            assert min(left, top) >= MARGIN - 0.002
            assert max(right, bottom) <= 1 - MARGIN + 0.002
        for i, a in enumerate(filled):
            for b in filled[i + 1 :]:
                gap = max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3])
                assert gap >= GAP - 0.002, scene


def test_sides_are_those_of_their_size_and_places_are_the_thirds(scenes):
    for thing in (thing for scene in scenes for thing in scene.things):
        low, high = SIDES[thing.size]
        assert low - 1e-3 <= thing.side <= high + 1e-3
        assert thing.place == place_of(thing.x, thing.y)
    assert [place_of((i + 0.5) / 3, (j + 0.5) / 3) for j in range(3) for i in range(3)] == [
        "top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right",
    ]  # fmt: skip
    assert place_of(1.0, 1.0) == "bottom right"


def test_the_relation_of_every_scene_holds_and_no_other():
    for seed in range(200):
        scene = sample(GRAMMAR, seed, kind="relation")
        first, second = scene.things
        points = (first.x, first.y), (second.x, second.y)
        assert [r for r in RELATIONS if relation_holds(r, *points)] == [scene.relation]


def test_a_relation_needs_a_tenth_of_the_picture_and_the_main_direction():
    assert relation_holds("left of", (0.2, 0.5), (0.8, 0.5))
    assert not relation_holds("right of", (0.2, 0.5), (0.8, 0.5))
    assert relation_holds("above", (0.5, 0.2), (0.5, 0.8))
    assert relation_holds("below", (0.5, 0.8), (0.5, 0.2))
    assert not relation_holds("left of", (0.5, 0.5), (0.59, 0.5))
    assert not relation_holds("left of", (0.2, 0.1), (0.5, 0.9))


def test_counted_things_are_alike_and_as_many_as_the_grammar_allows():
    counts = Counter()
    for seed in range(200):
        things = sample(GRAMMAR, seed, kind="count").things
        assert len({(thing.name, thing.colour, thing.size, thing.side) for thing in things}) == 1
        counts[len(things)] += 1
    assert sorted(counts) == [2, 3, 4, 5]


def test_every_colour_can_be_seen_on_its_ground(scenes):
    for scene in scenes:
        ends = lab([COLOURS[name] for name in scene.background.colours])
        for thing in scene.things:
            if thing.colour is None:
                assert not any(thing.name in HIDING[colour] for colour in scene.background.colours)
            else:
                assert np.linalg.norm(lab(COLOURS[thing.colour]) - ends, axis=-1).min() >= 30
        for writing in scene.writings:
            away = lab(COLOURS[writing.colour]) - ends
            assert np.linalg.norm(away, axis=-1).min() >= 30
            assert abs(away[:, 0]).min() >= 22


def test_text_on_a_gradient_is_seen_in_its_middle_too():
    ground = Background("gradient", ("black", "white"))
    assert "gray" not in colours_on(ground)
    assert "gray" in colours_on(Background("split", ("black", "white")))


# Grammar tables


def test_a_recipes_table_sets_only_its_fields():
    grammar = Grammar.from_table({"shapes": 3, "text": 0, "objects": [1, 2], "colours": ["red", "blue"]})
    assert grammar == replace(GRAMMAR, shapes=3, text=0, objects=(1, 2), colours=("red", "blue"))
    kinds = {sample(grammar, seed).kind for seed in range(100)}
    assert "text" not in kinds
    names = {t.name for seed in range(100) for t in sample(grammar, seed, kind="things").things if t.colour}
    assert names == set(list(SHAPES)[:3])


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ({"shape": 3}, "shape"),
        ({"shapes": "three"}, "three"),
        ({"shapes": True}, "True"),
        ({"shapes": 2.5}, "2.5"),
        ({"objects": [2, 1]}, r"\[2, 1\]"),
        ({"objects": [1, 2, 3]}, r"\[1, 2, 3\]"),
        ({"objects": 3}, "objects = 3"),
        ({"colours": []}, "colours"),
        ({"colours": ["red", "mauve"]}, "mauve"),
        ({"faces": ["comic"]}, "comic"),
        ({"sizes": ["tiny"]}, "tiny"),
        ({"text": "often"}, "often"),
        ({"tidy": 1}, "tidy = 1"),
    ],
)
def test_a_table_that_makes_no_grammar_is_refused_by_its_value(table, named):
    with pytest.raises(InputError, match=named):
        Grammar.from_table(table)


def test_a_grammar_without_such_a_scene_says_what_to_widen():
    narrow = replace(GRAMMAR, letters=(14, 15), english=1.0, spelt=0.0)
    with pytest.raises(InputError, match="'text'"):
        sample(narrow, 0, kind="text")


def test_a_tidy_scene_is_told_whole_by_its_dense_caption():
    tidy = Grammar.from_table({"tidy": True, "faces": ["mono", "bold"], "em": [0.1, 0.42], "second_line": 0})
    seen: dict[str, Scene] = {}
    scenes = [sample(tidy, seed) for seed in range(3000)]
    small = [sample(replace(tidy, shapes=2, emojis=0, colours=("red",), grounds=("white",)), s) for s in range(2000)]
    for scene in scenes + small:
        told = caption(scene)
        drawn = replace(scene, kind="things", relation=None, things=tuple(sorted(scene.things, key=str)))
        assert seen.setdefault(told, drawn) == drawn, told
    assert len(seen) < 4500  # there were captions to compare


def test_things_of_a_tidy_scene_keep_apart_and_clear_of_the_edge():
    for seed in range(1000):
        scene = sample(replace(GRAMMAR, tidy=True), seed)
        boxes = [(t.x, t.y, t.side / 2) for t in scene.things]
        for x, y, half in boxes:
            assert all(c - half >= MARGIN and c + half <= 1 - MARGIN and c * 16 == int(c * 16) for c in (x, y))
        for (x, y, half), (u, v, other) in combinations(boxes, 2):
            assert max(abs(x - u), abs(y - v)) >= half + other + GAP
        for writing in scene.writings:
            assert line_width(writing.text, writing.face) * writing.em <= 1  # glyphs have margins of their own


def test_glyphs_of_a_tidy_line_stand_in_cells_of_a_grid():
    for seed in range(300):
        scene = sample(Grammar(tidy=True, faces=("mono", "bold")), seed, kind="text")
        for w in scene.writings:
            if not {" ", "!"} & set(w.text) and len({script_of(c) for c in w.text}) == 1:
                pitch = (line_width(w.text, w.face) + TRACKING) * w.em / len(w.text)
                assert pitch * 32 == pytest.approx(round(pitch * 32))


# Rendering


def test_a_scene_is_always_the_same_picture(scenes):
    for scene in scenes[:20]:
        a, b = render(scene, 64), render(scene, 64)
        assert a.mode == "RGB"
        assert np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (64, 96)])
def test_shares_are_of_both_sides_and_sizes_of_the_shorter(size):
    thing = Thing("square", "red", "medium", 0.25, 0.75, 0.25)
    picture = np.asarray(render(Scene("things", WHITE, (thing,)), *size)).astype(int)
    rows, columns = np.nonzero(picture[..., 2] < 145)
    assert (columns.min() + columns.max() + 1) / 2 / size[0] == pytest.approx(0.25, abs=0.01)
    assert (rows.min() + rows.max() + 1) / 2 / size[1] == pytest.approx(0.75, abs=0.01)
    assert columns.max() + 1 - columns.min() == 16


def covered(x: float, side: float = 0.25) -> np.ndarray:
    """How much of each column a black square centred at x covers, in the middle row of a white picture."""
    scene = Scene("things", WHITE, (Thing("square", "black", "medium", x, 0.5, side),))
    return (252 - np.asarray(render(scene, 64)).astype(float)[32, :, 0]) / (252 - 20)


def test_a_place_between_two_pixels_covers_a_part_of_each():
    exact, half, quarter = covered(0.5), covered(0.5 + 0.5 / 64), covered(0.5 + 0.25 / 64)
    assert exact[24:40] == pytest.approx(1, abs=0.01)
    assert exact.sum() == pytest.approx(16, abs=0.02)
    assert [half[24], half[40]] == pytest.approx([0.5, 0.5], abs=0.03)
    assert [quarter[24], quarter[40]] == pytest.approx([0.75, 0.25], abs=0.03)


def test_moving_a_thing_moves_its_ink_by_as_much():
    across = np.arange(64) + 0.5
    for shift in (0.1, 0.37, 0.5, 0.9, 3.2):
        ink = covered(0.5 + shift / 64, 0.2)
        assert (ink * across).sum() / ink.sum() == pytest.approx(32 + shift, abs=0.03)


def test_moving_text_moves_its_ink_by_as_much():
    def centre(y: float) -> float:
        scene = Scene("text", WHITE, (), (Writing("HELLO", "bold", "black", 0.5, y, 0.2),))
        ink = (252 - np.asarray(render(scene, 64)).astype(float)[..., 0]).sum(1)
        return float((ink * np.arange(64)).sum() / ink.sum())

    for shift in (0.2, 0.5, 1.7):
        assert centre(0.5 + shift / 64) - centre(0.5) == pytest.approx(shift, abs=0.05)


def test_grounds_are_flat_fade_and_meet():
    def column(ground: Background) -> np.ndarray:
        return np.asarray(render(Scene("things", ground), 64)).astype(int)[:, 5]

    first, last = COLOURS["red"], COLOURS["blue"]
    assert (column(Background("flat", ("red",))) == first).all()
    split = column(Background("split", ("red", "blue")))
    assert (split[:31] == first).all()
    assert (split[33:] == last).all()
    fade = column(Background("gradient", ("red", "blue")))
    assert abs(fade[0] - first).max() <= 3
    assert abs(fade[-1] - last).max() <= 3
    assert (np.diff(fade[:, 0]) <= 0).all()
    across = np.asarray(render(Scene("things", Background("split", ("red", "blue"), True)), 64))
    assert tuple(across[5, 5]) == first
    assert tuple(across[5, 60]) == last


def test_every_thing_and_every_glyph_leaves_ink():
    for name in (*SHAPES, *EMOJI):
        thing = Thing(name, "black" if name in SHAPES else None, "medium", 0.5, 0.5, 0.25)
        assert np.asarray(render(Scene("things", WHITE, (thing,)), 64)).std() > 5, name
    for face in ("sans", "bold", "serif", "mono"):
        for char in LATIN if face == "mono" else LATIN + "".join(HANZI):
            drawn = atlas.glyph(atlas.load_atlas(), face, char)
            assert np.asarray(drawn.mask).max() > 200, (face, char)
            assert 0 < drawn.advance < 1.2


def test_text_is_as_wide_as_its_line():
    scene = Scene("text", WHITE, (), (Writing("HXH", "bold", "black", 0.5, 0.5, 0.3),))
    picture = np.asarray(render(scene, 128)).astype(int)
    columns = np.flatnonzero((picture[..., 0] < 200).any(0))
    wide = line_width("HXH", "bold") * 0.3 * 128
    assert columns[-1] - columns[0] == pytest.approx(wide, abs=0.2 * 0.3 * 128)
    assert (columns[0] + columns[-1] + 1) / 2 == pytest.approx(64, abs=2)


# The atlas


def test_a_folder_without_an_atlas_says_how_to_make_one(tmp_path):
    with pytest.raises(InputError, match=r"scripts/build_atlas\.py"):
        atlas.load_atlas(tmp_path)


def test_a_missing_font_names_the_package_that_brings_it(tmp_path):
    with pytest.raises(InputError, match=r"DejaVuSans\.ttf is missing: apt-get install fonts-dejavu"):
        atlas.build_atlas(tmp_path / "atlas", fonts=tmp_path)


def test_a_font_file_without_its_face_names_the_package(tmp_path):
    (tmp_path / "DejaVuSans.ttf").write_bytes(b"not a font")
    with pytest.raises(InputError, match="fonts-dejavu"):
        atlas.build_atlas(tmp_path / "atlas", fonts=tmp_path)


def test_the_page_names_every_font_and_its_package():
    page = (Path(__file__).parent.parent / "docs" / "pocket.md").read_text()
    for font in (*atlas.LATIN_FONTS.values(), *atlas.HANZI_FONTS.values(), atlas.EMOJI_FONT):
        assert f"`{Path(font.path).name}`" in page
        assert font.package in page


def test_sheets_hold_a_cell_for_each_glyph():
    loaded = atlas.load_atlas()
    for face, sheet in loaded.faces.items():
        assert sheet.mode == "L"
        assert sheet.width == atlas.COLUMNS * atlas.CELL
        assert sheet.height // atlas.CELL * atlas.COLUMNS >= len(loaded.glyphs[face])
        assert set(loaded.glyphs[face]) == set(LATIN) | (set() if face == "mono" else set(HANZI))
    assert isinstance(loaded.emoji_sheet, Image.Image)
