"""Prompts as people write them are read, and what they leave open is filled in from the seed."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from inkstream.engine.drawing.writing import written_out
from inkstream.evaluate.grades import grade
from inkstream.evaluate.report import Judged
from inkstream.evaluate.suites import open_suite
from inkstream.families import SPECS
from inkstream.pocket.captions import Wording, caption, draw_caption
from inkstream.pocket.draw import render
from inkstream.pocket.grammar import Grammar, sample, stretch
from inkstream.pocket.kept import STAND_INS, keep_unknown
from inkstream.pocket.scenes import GAP, Scene
from inkstream.pocket.wishes import read_wish
from inkstream.pocket.writer import write
from inkstream.types import Request

PIECES = ["zorp", "a", "cat", "two", ",", "red", "on", "sks", "style", "zorps", "一只", "灯塔", "robot", "an", "."]


def things(prompt: str) -> list[tuple]:
    """What is read of each thing: number, size, colour, name, place."""
    return [(t.number, t.size, t.colour, t.name, t.place) for t in read_wish(prompt).things]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red circle", [(1, None, "red", "circle", None)]),
        ("THREE HEARTS", [(3, None, None, "heart", None)]),
        ("circle red", [(1, None, "red", "circle", None)]),
        ("a yelow traingle", [(1, None, "yellow", "triangle", None)]),
        ("a tiny violet disc, upper left", [(1, "small", "purple", "circle", "top left")]),
        ("a square in #FF6600", [(1, None, "orange", "square", None)]),
        ("一只猫", [(1, None, None, "cat", None)]),
        ("红色圆形", [(1, None, "red", "circle", None)]),
        ("左上角有一个大的绿色三角形", [(1, "large", "green", "triangle", "top left")]),
        ("两颗黄色的星星", [(2, None, "yellow", "star", None)]),
        ("🐶🐱", [(1, None, None, "dog", None), (1, None, None, "cat", None)]),
    ],
)
def test_a_short_prompt_is_read_in_either_language(prompt, expected):
    assert things(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "relation", "names"),
    [
        ("a red heart to the left of a blue square", "left of", ["heart", "square"]),
        ("a dog under a tree", "below", ["dog", "tree"]),
        ("a green ring and a star above it", "below", ["ring", "star"]),
        ("蓝色正方形在红色圆形的右边", "right of", ["square", "circle"]),
    ],
)
def test_a_relation_is_that_of_the_first_thing_to_the_second(prompt, relation, names):
    wish = read_wish(prompt)
    assert [thing.name for thing in wish.things] == names
    assert wish.relation == relation


@pytest.mark.parametrize(
    ("prompt", "kind", "colours"),
    [
        ("a star on white", "flat", ["white"]),
        ("a star on a blue background", "flat", ["blue"]),
        ("a red poster with a star", "flat", ["red"]),
        ("一颗星星，背景是黄色", "flat", ["yellow"]),
        ("白底黑字“福”", "flat", ["white"]),
        ("a star, gradient from red to blue", "gradient", ["red", "blue"]),
        ("a star, split background, red left and green right", "split", ["red", "green"]),
    ],
)
def test_the_background_is_told_from_the_colours_of_things(prompt, kind, colours):
    wish = read_wish(prompt)
    assert (wish.ground, wish.ground_colours) == (kind, colours)


@pytest.mark.parametrize(
    ("prompt", "text", "colour", "place"),
    [
        ('a poster that says "50%"', "50%", None, None),
        ("a sign saying OPEN", "OPEN", None, None),
        ("poster with the text 'HELLO' in red letters at the top", "HELLO", "red", "top"),
        ("写着“你好”的海报", "你好", None, None),
        ("底部写着红色的「新年」", "新年", "red", "bottom"),
    ],
)
def test_text_to_be_written_is_read_with_its_colour_and_place(prompt, text, colour, place):
    (found,) = read_wish(prompt).texts
    assert (found.text, found.colour, found.place) == (text, colour, place)


def test_what_is_not_known_is_named_before_anything_is_drawn():
    written = write("lighthouse in fog", 1)
    assert written.scene is None
    assert written.prompt == "lighthouse in fog"
    assert "cannot draw: lighthouse, fog" in written.notes[0]
    assert "cannot draw: 龙虾" in write("一只龙虾", 1).notes[0]
    assert write("a red circle, please", 1).notes == ()


def test_what_is_beyond_pocket_is_said_and_not_guessed():
    assert "at most 5 things, not 7" in write("seven circles", 1).notes[0]
    assert "'CONGRATULATIONS' has 15" in write('a sign saying "CONGRATULATIONS"', 1).notes[0]
    assert "cannot write 龘" in write("写着“龘”", 1).notes[0]


def test_a_prompt_that_names_nothing_is_told_so_and_a_long_list_of_unknown_words_is_cut():
    assert write("no circle", 1).notes == (
        "pocket knows shapes, emoji, words and colours; the prompt names none of them",
    )
    assert write("", 1).notes == ()
    (note,) = write(" ".join(f"lighthouse{i}" for i in range(40)), 1).notes
    assert note.endswith("lighthouse5 and 34 more")


def test_a_text_that_cannot_be_written_is_not_replaced_by_the_next_one():
    written = write("写着“龘”和“福”", 1)
    assert [w.text for w in written.scene.writings] == []
    assert len(written.notes) == 2


def test_seeds_fill_what_is_left_open_differently_and_keep_what_is_said():
    scenes = [write("two red stars", seed).scene for seed in range(40)]
    for scene in scenes:
        assert [(t.name, t.colour) for t in scene.things] == [("star", "red")] * 2
    assert len({scene.background for scene in scenes}) > 4
    assert len({scene.things[0].size for scene in scenes}) > 1
    assert write("two red stars", 7) == write("two red stars", 7)


def test_nothing_that_is_excluded_is_chosen():
    for seed in range(60):
        scene = write("a circle, not red", seed).scene
        other = write("a circle", seed, negative="red, blue background").scene
        assert scene.things[0].colour != "red"
        assert scene.background.colours != ("red",)
        assert other.things[0].colour != "red"
        assert other.background.colours not in (("red",), ("blue",))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_caption_of_the_grammar_is_read_back_as_its_scene(language):
    """Things, colours, sizes, places, relation, number and text are those of the scene that the caption describes."""
    grammar = Grammar(tidy=True, faces=("mono", "bold"), second_line=0, letters=(1, 8), gradient=0, split=0)
    wrong = Counter()
    for seed in range(600):
        scene = sample(grammar, seed, "any")
        wish = read_wish(caption(scene, "dense", language))
        read = Counter((t.name, t.colour) for t in wish.things for _ in range(t.number))
        asked = Counter((t.name, t.colour) for t in scene.things)
        assert read == asked, caption(scene, "dense", language)
        assert wish.ground_colours == list(scene.background.colours), caption(scene, "dense", language)
        assert [t.text for t in wish.texts] == [w.text for w in scene.writings]
        assert wish.relation == scene.relation
        wrong["unknown"] += len(wish.unknown)
    assert wrong["unknown"] == 0


def test_a_written_prompt_has_a_scene_whose_things_keep_apart():
    for seed in range(200):
        scene = write('three red hearts and a dog, "SALE" at the top', seed).scene
        top = scene.writings[0].y + scene.writings[0].em / 2
        assert all(thing.y - thing.side / 2 > top + GAP for thing in scene.things)


def test_a_stretched_scene_keeps_things_at_their_distance_from_the_edge():
    for seed in range(100):
        scene = sample(Grammar(tidy=True), seed)
        wide = stretch(scene, 192, 128)
        for a, b in zip(scene.things, wide.things):
            near = min(a.x, 1 - a.x) * 128
            assert a.x == 0.5 or min(b.x, 1 - b.x) * 192 == pytest.approx(near)
            assert (a.y, a.side) == (b.y, b.side)
        assert np.asarray(render(wide, 192, 128)).shape == (128, 192, 3)
    assert stretch(scene, 128, 128) == scene


def test_a_partial_caption_says_some_of_the_facts():
    from random import Random

    scene: Scene = sample(Grammar(tidy=True, flat=1, gradient=0, split=0), 3, kind="things")
    told = {draw_caption(scene, Wording(0, 1, 0, 0, english=1, plain=1), Random(i)) for i in range(80)}
    assert any("background" in text for text in told)
    assert any("background" not in text for text in told)
    assert caption(scene) in told


def test_prompts_that_people_typed_are_read_as_they_meant_them():
    """Of the suite `people`, the scene that is written out passes the graders for what the prompt states."""
    right = 0
    cases = open_suite("people")[::5]
    for number, case in enumerate(cases):
        scene = write(case.prompt, number).scene
        if scene is not None:
            marks = grade(render(scene, 128), case.scene, case.stated, case.open_colour)
            right += bool(Judged(Path(), number, 0, case.group, marks).right)
    assert right >= 0.95 * len(cases)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a zorp on a yellow background", ["a large zorp", "yellow background"]),
        ("红色背景上的 zorp", ["zorp", "red background"]),
        ("three zorps", ["three zorps"]),
        ("a octo above a cat", ["an octo above a", "cat"]),
        ("a sks dog on white", ["sks dog", "white background"]),
        ("a robot and a zorp", ["robot", "zorp"]),
        ("a cat, dusk style", ["cat", ", dusk style"]),
        ("红色圆形，dusk style", ["red circle", ", dusk style"]),
        ('a sign that says "OPEN", dusk style!', ['"OPEN"', ", dusk style"]),
    ],
)
def test_words_that_only_an_adapter_knows_stay_in_the_prompt(prompt, words):
    written = write(prompt, 1, keep=True)
    assert all(word in written.prompt for word in words), written.prompt
    assert not written.notes
    assert "robot" not in written.prompt or "robot" in prompt


@pytest.mark.parametrize(
    ("prompt", "there", "gone"),
    [
        ("a zorp and a lighthouse", ["zorp"], ["lighthouse"]),
        ("two Zorps in fog, Dusk style", ["two Zorps", ", Dusk style"], ["fog"]),
        ('a cafe menu that says "OPEN"', ['"OPEN"'], ["cafe", "menu"]),
    ],
)
def test_of_unknown_words_only_an_adapter_s_triggers_stay(prompt, there, gone):
    written = write(prompt, 1, keep={"zorp", "dusk", "style"})
    assert all(word in written.prompt for word in there), written.prompt
    assert not any(word in written.prompt for word in gone), written.prompt
    assert not any(name in written.prompt for name in STAND_INS), written.prompt
    assert written.scene is not None
    assert any(gone[-1] in note for note in written.notes)


WHOSE = {
    (): [False, False, False],
    ("zorp",): [True, False, False],
    ("zorp", "dusk"): [True, True, False],
    ("zorp", "none"): [True, True, True],
}
"""LoRAs of a request -> whether "zorp", "dusk style" and "fog" stay in the prompt."""


def test_the_words_that_stay_are_the_triggers_in_the_files_or_all_if_a_file_names_none(tmp_path):
    weight = {"lora_unet_layers_0_attention_qkv.lora_down.weight": torch.zeros(4, 8)}
    save_file(weight, tmp_path / "zorp.safetensors", {"modelspec.trigger_phrase": "Zorp"})
    save_file(weight, tmp_path / "dusk.safetensors", {"ss_trigger": "dusk style, evening"})
    save_file(weight, tmp_path / "none.safetensors")

    def told(*names: str) -> str:
        request = Request(
            prompt="a star and a zorp in fog, dusk style", seed=1, loras=[f"{name}:0.5" for name in names]
        )
        return written_out(request, SPECS["pocket"], tmp_path)

    said = {names: [word in told(*names) for word in ("zorp", "dusk style", "fog")] for names in WHOSE}
    assert said == WHOSE


@settings(deadline=None)
@given(st.text(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=9).map(" ".join))
def test_any_prompt_is_written_with_its_unknown_words(prompt):
    written = write(prompt, 0, keep=True)
    assert written.prompt == write(prompt, 0, keep=True).prompt
    kept = keep_unknown(prompt)
    if prompt and not kept.names and not kept.ends:
        assert written.prompt == write(prompt, 0).prompt
