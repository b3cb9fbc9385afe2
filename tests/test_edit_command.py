"""`inkstream edit` changes a picture as an instruction says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from inkstream.cli import main
from inkstream.engine.drawing.complete import complete
from inkstream.engine.drawing.writing import notes, written_out
from inkstream.engine.files.cards import write_card
from inkstream.evaluate.edits import edit_cases
from inkstream.families import CARD
from inkstream.families.zimage.specs import OMNI, POCKET
from inkstream.pocket.draw import render
from inkstream.types import InputError, Request

EDITS = {"abilities": POCKET.abilities | {"references", "upsample_references"}, "writer": "edits"}
EDITOR = replace(POCKET, name="editor", **EDITS)


@pytest.fixture
def scene(tmp_path):
    path = tmp_path / "scene.png"
    render(next(edit_cases(1)).edit.before, 128).save(path)
    return path


def test_the_picture_is_the_first_reference_and_the_instruction_is_written_out(scene, tmp_path, make_folder, capsys):
    model = make_folder(tmp_path / "model", OMNI.tiny)
    (model / CARD).write_text(json.dumps(write_card(replace(OMNI.tiny, **EDITS))))
    words = ["edit", str(scene), "please paint the disc crimson", "-m", str(model), "--steps=1", "--seed=1"]
    assert main([*words, "-o", str(tmp_path / "out.png"), "--json"]) == 0
    printed = capsys.readouterr()
    (drawn,) = json.loads(printed.out)["pictures"]
    assert drawn["request"]["reference"] == [str(scene)]
    assert drawn["request"]["prompt"] == "please paint the disc crimson"
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
    told = Request(prompt="get rid of the star", reference=(str(scene),), seed=1)
    assert written_out(complete(told, EDITOR), EDITOR, Path()) == "remove the star"
    typed = told.model_copy(update={"upsample": False})
    assert written_out(complete(typed, EDITOR), EDITOR, Path()) == "get rid of the star"
    assert "stays as typed" in notes(told.model_copy(update={"prompt": "make it winter"}), EDITOR, Path())[0]
    with pytest.raises(InputError, match="writes out instructions about a picture"):
        complete(Request(prompt="a star", upsample=True), EDITOR)
