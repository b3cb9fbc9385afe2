"""Refining: the request that refines a picture, and `inkstream refine` on tiny models."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inkstream.cli import main
from inkstream.engine.drawing.refine import LEVEL, refined, way_for
from inkstream.engine.pictures.metadata import describe, read_request, save_picture
from inkstream.families import SPECS
from inkstream.families.flux2.specs import KLEIN_4B
from inkstream.sampling.schedules import shifted
from inkstream.types import InputError, Request

KLEIN, TURBO, BASE, KREA = (SPECS[name] for name in ("flux2-klein-4b", "z-image-turbo", "z-image", "flux1-krea-dev"))


@pytest.fixture(scope="module")
def klein_folder(make_folder, tmp_path_factory) -> Path:
    return make_folder(tmp_path_factory.mktemp("models") / "tiny-flux2-klein", KLEIN_4B.tiny)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def picture(here) -> str:
    """A picture of 96 x 64 pixels without metadata."""
    across, down = np.meshgrid(np.linspace(0, 255, 96), np.linspace(0, 255, 64))
    Image.fromarray(np.stack([across, down, 255 - across], -1).astype(np.uint8)).save("plain.png")
    return "plain.png"


@pytest.fixture
def draft(picture) -> str:
    """The same picture with a complete request in its metadata."""
    request = Request(
        prompt="a fox", negative_prompt="blurry", model="z-image", width=96, height=64, steps=50, guidance=5.0, seed=7,
        solver="euler", schedule="simple", shift=6.0,
    )  # fmt: skip
    with Image.open(picture) as image:
        save_picture(image, "draft.png", request)
    return "draft.png"


def asked(picture: str) -> Request:
    return read_request(picture).request


def wish(**fields) -> Request:
    return Request.model_validate({"model": "flux2-klein-4b", **fields})


# The request


def test_a_model_with_references_takes_the_draft_as_one_and_others_start_from_it(draft):
    by_klein = refined(wish(), asked(draft), draft, KLEIN)
    assert (by_klein.way, by_klein.request.reference, by_klein.request.image) == ("reference", (draft,), None)
    by_krea = refined(wish(), asked(draft), draft, KREA)
    assert (by_krea.way, by_krea.request.reference, by_krea.request.image) == ("strength", (), draft)
    assert by_klein.lines[0] == "flux2-klein-4b takes draft.png as a reference (--strength starts from it instead)"
    assert by_krea.lines[0].startswith("flux1-krea-dev starts from draft.png, at strength 0.")


def test_a_strength_or_a_named_way_chooses_the_way(draft):
    start = refined(wish(strength=0.3), asked(draft), draft, KLEIN)
    assert (start.way, start.request.strength, start.request.reference) == ("strength", 0.3, ())
    assert refined(wish(), asked(draft), draft, KLEIN, "strength").request.image == draft


@pytest.mark.parametrize("spec", [TURBO, BASE, KREA, KLEIN], ids=lambda spec: spec.name)
def test_the_default_strength_starts_at_the_same_noise_level_for_every_model(draft, spec):
    request = refined(wish(), asked(draft), draft, spec, "strength").request
    from inkstream.engine.drawing.complete import complete

    shift = complete(request, spec).shift
    assert shift is not None
    assert request.strength is not None
    assert shifted(request.strength, shift) == pytest.approx(LEVEL, abs=0.03)


def test_prompt_seed_and_size_come_from_the_draft_and_the_rest_from_the_model(draft):
    request = refined(wish(), asked(draft), draft, KLEIN).request
    assert (request.prompt, request.seed, request.width, request.height) == ("a fox", 7, 96, 64)
    assert (request.model, request.steps, request.guidance, request.shift) == ("flux2-klein-4b", None, None, None)
    given = refined(wish(prompt="a hare", seed=8, steps=2), asked(draft), draft, KLEIN).request
    assert (given.prompt, given.seed, given.steps) == ("a hare", 8, 2)


def test_one_given_side_keeps_the_aspect_ratio(draft):
    sizes = [
        refined(wish(**given), asked(draft), draft, KLEIN).request
        for given in ({"width": 192}, {"height": 128}, {"width": 192, "height": 64})
    ]
    assert [(request.width, request.height) for request in sizes] == [(192, 128), (192, 128), (192, 64)]


def test_options_that_the_model_ignores_are_listed_as_left_out(draft):
    by_klein = refined(wish(guidance=4), asked(draft), draft, KLEIN)
    assert (by_klein.request.negative_prompt, by_klein.request.guidance) == ("", None)
    left_out = [line.partition(" is left out")[0] for line in by_klein.lines[1:]]
    assert left_out == ["negative prompt 'blurry'", "guidance 4.0"]
    by_base = refined(wish(), asked(draft), draft, BASE)
    assert by_base.request.negative_prompt == "blurry"
    assert len(by_base.lines) == 1


def test_settings_of_the_drafts_model_are_listed_as_left_out(draft):
    chosen = asked(draft).model_copy(update={"steps": 20, "solver": "heun", "negative_prompt": ""})
    found = refined(wish(), chosen, draft, KLEIN)
    assert found.lines[1:] == ("left out, as set for z-image and not for flux2-klein-4b: steps 20, solver heun",)
    assert refined(wish(steps=4, solver="heun"), chosen, draft, KLEIN).lines[1:] == ()


def test_the_drafts_references_come_before_the_draft(draft):
    edit = asked(draft).model_copy(update={"reference": ("cat.png", "dog.png"), "negative_prompt": ""})
    edit = Request.model_validate(edit.model_dump())
    assert refined(wish(), edit, draft, KLEIN).request.reference == ("cat.png", "dog.png", draft)
    assert refined(wish(), edit, draft, KLEIN, "strength").request.reference == ("cat.png", "dog.png")
    assert "references are left out" in refined(wish(), edit, draft, KREA).lines[-1]


def test_the_drafts_own_start_picture_is_not_used(draft):
    started = Request.model_validate(asked(draft).model_dump() | {"image": "photo.png", "strength": 0.9})
    found = refined(wish(), started, draft, KREA)
    assert found.request.image == draft
    assert found.request.strength < 0.9
    assert any("the draft's own image" in line for line in found.lines)


def test_a_model_that_encodes_references_like_text_starts_from_the_draft(draft):
    redux = SPECS["flux1-redux-dev"]
    assert refined(wish(), asked(draft), draft, redux).way == "strength"
    assert refined(wish(), asked(draft), draft, redux, "reference").request.reference == (draft,)


@pytest.mark.parametrize(
    ("name", "way", "said"),
    [
        ("flux1-krea-dev", "reference", "cannot refine by reference"),
        ("flux1-fill-dev", None, "cannot refine pictures"),
        ("flux1-canny-dev", "strength", "cannot refine pictures"),
    ],
)
def test_a_way_that_the_model_lacks_is_refused(name, way, said):
    with pytest.raises(InputError, match=said):
        way_for(SPECS[name], way)


def test_a_picture_without_a_prompt_is_refused_by_its_name(picture):
    with pytest.raises(InputError, match=r"plain\.png carries no prompt: give one with --prompt"):
        refined(wish(), Request.model_validate({}), picture, KLEIN)


# The command


def test_a_draft_is_refined_by_its_request_and_its_metadata_names_the_draft(draft, klein_folder, capsys):
    assert main(["refine", draft, "-m", str(klein_folder)]) == 0
    out, err = capsys.readouterr()
    assert out == "draft-refined.png\n"
    assert "tiny-flux2-klein takes draft.png as a reference" in err
    assert "negative prompt 'blurry' is left out" in err
    request = asked("draft-refined.png")
    assert (request.prompt, request.seed, request.reference, request.steps) == ("a fox", 7, ("draft.png",), 4)
    origin = describe("draft-refined.png")["refined_from"]
    digest = hashlib.sha256(Path(draft).read_bytes()).hexdigest()
    assert origin == {"picture": "draft.png", "sha256": digest, "model": "z-image", "seed": 7}
    with Image.open("draft-refined.png") as image:
        assert image.size == (96, 64)


def test_a_smaller_strength_keeps_more_of_the_draft(draft, tiny_folder, capsys):
    for strength in ("0", "0.3", "1"):
        assert main(["refine", draft, "-m", str(tiny_folder), "--strength", strength, "-o", f"{strength}.png"]) == 0
    apart = [np.abs(pixels("0.png") - pixels(f"{strength}.png")).mean() for strength in ("0", "0.3", "1")]
    assert apart == sorted(apart)
    assert apart[0] == 0 < apart[1] < apart[2]


def test_several_pictures_are_refined_and_a_prompt_replaces_a_missing_one(draft, picture, tiny_folder, capsys):
    words = ["refine", draft, picture, "-m", str(tiny_folder), "--prompt", "a hare", "-o", "out/", "--json"]
    assert main([*words, "--steps", "2"]) == 0
    document = json.loads(capsys.readouterr().out)
    paths = [found["path"] for found in document["pictures"]]
    assert paths == [str(Path("out/draft-refined.png")), str(Path("out/plain-refined.png"))]
    assert [found["refined_from"]["picture"] for found in document["pictures"]] == [draft, picture]
    assert [found["way"] for found in document["pictures"]] == ["strength", "strength"]
    assert [asked(path).prompt for path in paths] == ["a hare", "a hare"]


def test_a_picture_of_another_program_is_refined_at_its_size_in_pixels(picture, tiny_folder, capsys):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", "a badger\nSteps: 20, Sampler: Euler, CFG scale: 5, Seed: 3, Size: 48x32, Model: sd15")
    with Image.open(picture) as image:
        image.save("foreign.png", pnginfo=info)
    assert main(["refine", "foreign.png", "-m", str(tiny_folder), "-o", "refined.png"]) == 0
    request = asked("refined.png")
    assert (request.prompt, request.seed, request.width, request.height) == ("a badger", 3, 96, 64)
    assert (request.steps, request.guidance) == (8, 1.0)


def test_missing_references_are_left_out_with_a_line(picture, klein_folder, capsys):
    request = Request(prompt="a fox", model="flux2-klein-4b", seed=1, reference=("gone.png",))
    with Image.open(picture) as image:
        save_picture(image, "edit.png", request)
    assert main(["refine", "edit.png", "-m", str(klein_folder), "-o", "refined.png"]) == 0
    assert "edit.png: its references are left out, because these files are missing: gone.png" in capsys.readouterr().err
    assert asked("refined.png").reference == ("edit.png",)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["plain.png", "-m", "MODEL"], ["plain.png has no request", "--prompt"]),
        (["draft.png"], ["z-image-turbo is not downloaded", "--yes"]),
        (["-m", "MODEL"], ["PICTURES", "--help"]),
        (["nowhere.png", "-m", "MODEL"], ["nowhere.png", "check the path"]),
        (["draft.png", "-m", "MODEL", "--reference"], ["cannot refine by reference", "--reference"]),
        (["draft.png", "-m", "MODEL", "--reference", "--strength", "0.4"], ["--strength 0.4", "give one"]),
        (["draft.png", "-m", "MODEL", "--json-prompt", "x.json"], ["--json-prompt x.json", "give a file"]),
        (["draft.png", "-m", "MODEL", "--prompt", "x", "--json-prompt", "x.json"], ["--json-prompt", "leave one"]),
        (["draft.png", "-m", "MODEL", "--strength", "2"], ["--strength 2", "1 or less"]),
        (["draft.png", "-m", "MODEL", "-o", "plain.png"], ["plain.png", "not overwritten"]),
        (["draft.png", "-m", "MODEL", "--image", "plain.png"], ["--image"]),
        (["draft.png", "-m", "MODEL", "-W", "100"], ["width 100", "96 or 112"]),
        (["draft.png", "-m", "./nowhere"], ["nowhere"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_a_request_that_cannot_be_refined_is_refused_in_one_line(draft, tiny_folder, capsys, words, named):
    before = set(os.listdir())
    assert main(["refine", *(str(tiny_folder) if word == "MODEL" else word for word in words)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert [word for word in named if word not in err] == [], err
    assert set(os.listdir()) == before


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)
