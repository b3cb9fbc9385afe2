"""Licences: those of the known models, where they are shown, and the setting for commercial use only."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest

import inkstream
from inkstream.cli import main
from inkstream.engine.files.convert import convert
from inkstream.engine.files.licences import FREE, SETTING, check_licence, is_commercial_only
from inkstream.engine.files.sources import locate
from inkstream.families import SPECS
from inkstream.families.flux2.specs import KLEIN_4B, KLEIN_9B_KV, KLEIN_BASE_4B
from inkstream.families.flux3 import specs as flux3
from inkstream.families.qwenimage import specs as qwenimage
from inkstream.types import InputError, Spec

FREE_MODELS = {
    "pocket", "z-image-turbo", "z-image", "z-image-omni", "flux1-schnell", "flux2-klein-4b", "flux2-klein-base-4b",
}  # fmt: skip
"""By their repositories. All other models are under restricted licences."""

SMALL = ["-W", "64", "-H", "48", "--steps", "1"]


def one_line(error: pytest.ExceptionInfo[InputError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def own_copy(folder: Path, to: Path, card: dict | None = None) -> Path:
    """A copy of a model with a card."""
    own = Path(shutil.copytree(folder, to))
    if card is not None:
        (own / "inkstream.json").write_text(json.dumps(card))
    return own


@pytest.mark.parametrize("spec", SPECS.values(), ids=list(SPECS))
def test_every_known_model_has_its_licence(spec):
    free = spec.name in FREE_MODELS
    restricted = {"flux3": flux3.LICENCE, "qwenimage": qwenimage.LICENCE}.get(spec.family, "FLUX non-commercial")
    assert (spec.licence, spec.commercial) == ("apache-2.0" if free else restricted, free)
    assert spec.commercial == (spec.licence in FREE)


def test_a_model_without_a_licence_is_not_for_commercial_use():
    said = {field.name: field.default for field in fields(Spec)}
    assert (said["licence"], said["commercial"]) == ("unknown", False)


@pytest.mark.parametrize(
    ("value", "on"),
    [(None, False), ("", False), ("0", False), ("No", False), ("false", False), ("1", True), ("y", True)],
)
def test_the_setting_is_on_for_any_value_that_does_not_mean_off(monkeypatch, value, on):
    monkeypatch.delenv(SETTING, raising=False)
    if value is not None:
        monkeypatch.setenv(SETTING, value)
    assert is_commercial_only() is on
    assert is_commercial_only(True) is True
    assert is_commercial_only(False) is False


def test_a_refusal_names_the_model_its_licence_and_models_that_do_the_same():
    with pytest.raises(InputError) as refused:
        check_licence("flux1-kontext-dev", SPECS["flux1-kontext-dev"])
    line = one_line(refused)
    assert "the licence of flux1-kontext-dev, FLUX non-commercial, does not allow commercial use" in line
    assert "take flux2-klein-4b, flux2-klein-base-4b (" in line
    assert SETTING in line
    for name in FREE_MODELS:
        check_licence(name, SPECS[name])


@pytest.mark.parametrize("name", ["flux1-dev", "black-forest-labs/FLUX.2-klein-9B", "someone/model"])
def test_a_model_to_download_is_refused_before_any_request_to_the_hub(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("inkstream.weights.hub.cached", lambda repo, patterns: None)
    monkeypatch.setattr("inkstream.weights.hub.offer", lambda repo, patterns: pytest.fail("the hub was asked"))
    words = ["generate", "x", "-m", name, "-o", str(tmp_path / "x.png"), "--yes"]
    assert main([*words, "--commercial-only"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "licence" in err
    assert "z-image-turbo" in err or "flux2-klein-4b" in err
    with pytest.raises(InputError, match="licence"):
        inkstream.load(name, inkstream.Machine(commercial_only=True))


def test_a_local_model_without_a_licence_is_refused_with_the_remedy(tiny_folder, tmp_path, capsys):
    words = ["generate", "x", "-m", str(tiny_folder), *SMALL, "-o", str(tmp_path / "x.png")]
    assert main([*words, "--commercial-only"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "the licence of tiny-turbo is unknown" in err
    assert 'inkstream.json beside a local copy, as in {"licence": "apache-2.0", "commercial": true}' in err
    assert main(words) == 0


@pytest.mark.parametrize(
    ("card", "taken"),
    [
        ({"licence": "apache-2.0"}, True),
        ({"licence": "Apache-2.0"}, True),
        ({"licence": "mine", "commercial": True}, True),
        ({"licence": "mine"}, False),
        ({"licence": "apache-2.0", "commercial": False}, False),
        ({"steps": 4}, False),
    ],
)
def test_the_card_of_a_local_model_states_its_licence(tiny_folder, tmp_path, card, taken):
    own = own_copy(tiny_folder, tmp_path / "own", card)
    if taken:
        assert locate(own, commercial_only=True).spec.commercial
        return
    with pytest.raises(InputError, match=r"mine|is unknown|apache-2\.0"):
        locate(own, commercial_only=True)


def test_the_setting_applies_to_drawing_and_not_to_converting(tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(SETTING, "1")
    assert main(["generate", "x", "-m", str(tiny_folder), *SMALL, "-o", str(tmp_path / "x.png")]) == 2
    with pytest.raises(InputError, match="licence"):
        inkstream.load(tiny_folder)
    with pytest.raises(InputError, match="licence"):
        list(inkstream.Engine(inkstream.Machine("cpu")).load(str(tiny_folder)))
    convert(tiny_folder, tmp_path / "native", "native")
    inkstream.load(tiny_folder, inkstream.Machine(commercial_only=False))


def test_the_metadata_of_a_picture_names_the_licence(tiny_folder, tmp_path, capsys):
    own = own_copy(tiny_folder, tmp_path / "own", {"licence": "mine", "commercial": False, "title": "Mine"})
    for folder, expected in ((own, ("mine", False)), (tiny_folder, ("unknown", False))):
        path = tmp_path / f"{folder.name}.png"
        assert main(["generate", "x", "-m", str(folder), *SMALL, "-o", str(path)]) == 0
        capsys.readouterr()
        assert main(["info", str(path), "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert (facts["licence"], facts["commercial"]) == expected


def test_models_and_doctor_show_licences(capsys):
    for command in ("models", "doctor"):
        assert main([command, "--json"]) == 0
        document = json.loads(capsys.readouterr().out)
        known = {model["name"]: model for model in (document if command == "models" else document["models"])}
        assert (known["flux1-dev"]["licence"], known["flux1-dev"]["commercial"]) == ("FLUX non-commercial", False)
        assert known["flux2-klein-4b"]["commercial"] is True
        assert main([command]) == 0
        out = capsys.readouterr().out
        assert "FLUX non-commercial, no commercial use" in out
        assert "apache-2.0, commercial use allowed" in out


def test_the_doctor_shows_the_setting(capsys, monkeypatch):
    monkeypatch.setenv(SETTING, "1")
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["commercial_only"] is True
    assert main(["doctor"]) == 0
    assert f"{SETTING} is set" in capsys.readouterr().out


@pytest.mark.parametrize("known", [KLEIN_4B, KLEIN_BASE_4B, KLEIN_9B_KV], ids=lambda spec: spec.name)
def test_the_card_holds_for_a_renamed_folder(known, make_folder, tmp_path):
    folder = make_folder(tmp_path / known.name, known.tiny)
    (folder / "inkstream.json").write_text(json.dumps({"licence": "mine", "commercial": True}))
    native = convert(folder, tmp_path / "native", "native")
    (file,) = native.glob("*.safetensors")
    file.rename(native / "mine.safetensors")
    for source in (native, convert(native, tmp_path / "back", "diffusers")):
        spec = locate(source).spec
        assert (spec.guides, spec.abilities, spec.steps) == (known.guides, known.abilities, known.steps)
        assert (spec.licence, spec.commercial) == ("mine", True)
    (native / "inkstream.json").unlink()
    with pytest.raises(InputError, match=r'inkstream\.json beside it with \{"guides": "twice"\} or'):
        locate(native)
    (native / "inkstream.json").write_text(json.dumps({"guides": known.guides, "abilities": sorted(known.abilities)}))
    assert locate(native).spec.guides == known.guides
