"""`inkstream edit` changes a picture as an instruction says."""

from __future__ import annotations

import json

import pytest
from inkstream.evaluate.edits import edit_cases

from inkstream.cli import main
from inkstream.engine.drawing.complete import complete
from inkstream.engine.drawing.writing import notes, written_out
from inkstream.families import SPECS
from inkstream.families.zimage.specs import POCKET_EDIT
from inkstream.pocket.draw import render
from inkstream.types import InputError, Request


@pytest.fixture
def scene(tmp_path):
    path = tmp_path / "scene.png"
    render(next(edit_cases(1)).edit.before, 128).save(path)
    return path


def test_the_picture_is_the_first_reference_and_the_instruction_is_written_out(scene, tmp_path, capsys):
    words = [
        "edit",
        str(scene),
        "please paint the disc crimson",
        "--steps=1",
        "--seed=1",
        "-o",
        str(tmp_path / "out.png"),
    ]
    assert main([*words, "--json"]) == 0
    printed = capsys.readouterr()
    (drawn,) = json.loads(printed.out)["pictures"]
    assert drawn["request"]["model"] == "pocket-edit"
    assert drawn["request"]["reference"] == [str(scene)]
    assert drawn["request"]["prompt"] == "please paint the disc crimson"
    assert (drawn["width"], drawn["height"]) == (128, 128)
    assert "make the circle red" in printed.err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (
            ["scene.png"],
            "there is no instruction: say what to change, as in inkstream edit scene.png 'remove the star'",
        ),
        (["nowhere.png", "remove the star"], "nowhere.png does not exist"),
        (["scene.png", "remove the star", "-m", "z-image-turbo"], "z-image-turbo does not edit by instruction: take"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(words, error, scene, capsys, monkeypatch):
    monkeypatch.chdir(scene.parent)
    assert main(["edit", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert error in line


def test_a_grammar_of_edits_reads_only_prompts_with_a_picture(scene):
    told = Request(model="pocket-edit", prompt="get rid of the star", reference=(str(scene),), seed=1)
    assert written_out(complete(told, POCKET_EDIT), POCKET_EDIT) == "remove the star"
    typed = told.model_copy(update={"upsample": False})
    assert written_out(complete(typed, POCKET_EDIT), POCKET_EDIT) == "get rid of the star"
    assert "stays as typed" in notes(told.model_copy(update={"prompt": "make it winter"}), POCKET_EDIT)[0]
    with pytest.raises(InputError, match="writes out instructions about a picture"):
        complete(Request(prompt="a star", upsample=True), POCKET_EDIT)


def test_models_that_edit_take_references():
    assert "references" in SPECS["pocket-edit"].abilities
    assert "references" not in SPECS["pocket"].abilities
