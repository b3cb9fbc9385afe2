"""Edits of scenes: pairs with instructions, the reader of instructions, and the grader."""

from __future__ import annotations

from random import Random

import pytest

from inkstream.evaluate.edits import GRAMMAR, edit_cases, grade_edit
from inkstream.pocket.draw import render
from inkstream.pocket.editor import read_edit, write
from inkstream.pocket.edits import EDIT_KINDS, instruction, plain, sample_edit
from inkstream.pocket.scenes import is_held_out


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_an_edit_is_the_same_each_time_and_changes_one_thing(kind):
    for seed in range(20):
        edit = sample_edit(GRAMMAR, seed, kind=kind)
        assert edit == sample_edit(GRAMMAR, seed, kind=kind)
        before, after = edit.before, edit.after
        items = [{*scene.things, *scene.writings, scene.background} for scene in (before, after)]
        assert len(items[0] - items[1]) == (0 if kind == "add" else 1)
        assert len(items[1] - items[0]) == (0 if kind == "remove" else 1)


def test_training_shows_no_held_out_scene_and_tests_show_one():
    for seed in range(60):
        taught, held = sample_edit(GRAMMAR, seed), sample_edit(GRAMMAR, seed, "held_out")
        assert not is_held_out(taught.before)
        assert not is_held_out(taught.after)
        assert is_held_out(held.before) or is_held_out(held.after)


@pytest.mark.parametrize("kind", EDIT_KINDS)
def test_every_instruction_is_read_as_the_edit_that_it_describes(kind):
    for seed in range(30):
        edit = sample_edit(GRAMMAR, seed, kind=kind)
        for language in ("en", "zh"):
            said = instruction(edit, language, Random(seed))
            read = read_edit(said)
            assert read is not None, said
            assert read[0] == kind, said
            told = {name: word for name, word in edit.what.items() if word and name != "old"}
            assert {name: word for name, word in read[1].items() if word and name != "old"} == told, said


@pytest.mark.parametrize(
    ("typed", "written"),
    [
        ("please paint the disc crimson", "make the circle red"),
        ("the text should be blue", "make the text blue"),
        ("get rid of the puppy", "remove the dog"),
        ("shift the green heart to the upper left", "move the green heart to the top left"),
        ("I want a moon instead of the star", "replace the star with a crescent"),
        ("turn the ring into an orange square", "replace the ring with an orange square"),
        ('make the sign read "OPEN"', 'change the text to "OPEN"'),
        ("there should be a tiny gold star at the bottom", "add a small yellow star at the bottom"),
        ("把圆形涂成蓝色", "make the circle blue"),
        ("不要星星", "remove the star"),
        ("用爱心替换星星", "replace the star with a heart"),
        ("背景改成黄色", "make the background yellow"),
        ("在右上角画一个红色的星星", "add a red star at the top right"),
    ],
)
def test_people_type_edits_in_their_own_words(typed, written):
    assert write(typed).prompt == written


def test_an_instruction_that_is_not_understood_stays_with_a_note():
    found = write("make it look like winter")
    assert found.prompt == "make it look like winter"
    assert "pocket-edit knows edits such as" in found.notes[0]


def test_the_grader_sees_each_edit_done_and_not_done():
    for case in edit_cases(4):
        edit = case.edit
        done, undone = (grade_edit(render(scene, 128), edit) for scene in (edit.after, edit.before))
        assert (done.asked, done.kept, done.facts) == (True, True, 1.0), case.instruction
        assert not undone.asked, case.instruction
        read = read_edit(case.instruction)
        assert read is not None
        open_place = edit.kind == "add" and not edit.what["place"]
        if edit.kind != "rewrite" and not open_place:
            assert plain(*read) == instruction(edit)
