"""`inkstream draft`: from drafts to a sheet to refined pictures, stopped and resumed, on tiny models."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from inkstream.cli import draft, main
from inkstream.cli.draft import STATE, numbers_of
from inkstream.cli.terminal import Terminal
from inkstream.engine.pictures.metadata import describe, read_request
from inkstream.engine.pictures.sheet import edge_of
from inkstream.types import InputError, Step

COMMAND = [sys.executable, "-c", "from inkstream.cli import run; run()"]
SMALL = ["-W", "48", "-H", "32", "--steps", "2"]


@pytest.fixture
def words(tiny_folder, tmp_path, monkeypatch) -> list[str]:
    """Three drafts by one tiny model, into the folder `foxes`."""
    monkeypatch.chdir(tmp_path)
    return command(tiny_folder)


def command(model: Path) -> list[str]:
    return ["draft", "a fox", "-m", str(model), *SMALL, "-c", "3", "--seed", "5", "-o", "foxes"]


@pytest.fixture
def then(tiny_base_folder) -> list[str]:
    """Options to refine with another model."""
    return ["--refine-with", str(tiny_base_folder)]


@pytest.fixture(scope="module")
def unbroken(tiny_folder, tiny_base_folder, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run that refined drafts 1 and 3."""
    folder = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        assert main([*command(tiny_folder), "--refine-with", str(tiny_base_folder), "--choose", "1,3"]) == 0
    return folder / "foxes"


@pytest.fixture
def finished(words, unbroken) -> None:
    """A copy of `unbroken` in the command's output folder."""
    shutil.copytree(unbroken, "foxes")


def files() -> dict[str, str]:
    """File name -> digest, of every file in the output folder."""
    found = sorted(path for path in Path("foxes").rglob("*") if path.is_file())
    return {str(path.relative_to("foxes")): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def pictures(folder: Path = Path("foxes")) -> dict[str, bytes]:
    """Name -> pixels, of the pictures drawn so far."""
    found = {}
    for path in sorted(folder.glob("*/*.png")):
        with Image.open(path) as image:
            found[str(path.relative_to(folder))] = image.tobytes()
    return found


def state() -> dict:
    return json.loads(Path("foxes", STATE).read_text())


def steps_counted(monkeypatch) -> list[Step]:
    """A list that receives every Step from here on."""
    seen: list[Step] = []
    monkeypatch.setattr(Terminal, "show", lambda self, event: seen.append(event) if isinstance(event, Step) else None)
    return seen


def test_a_whole_run_leaves_drafts_a_sheet_refined_pictures_and_the_state(words, then, capsys):
    assert main([*words, *then, "--choose", "3,1"]) == 0
    out, err = capsys.readouterr()
    assert out.split() == [str(Path("foxes", name)) for name in ("sheet.png", "refined/03.png", "refined/01.png")]
    assert "draft 3 of 3: seed 7" in err
    drafts, refined = [f"drafts/0{i}.png" for i in (1, 2, 3)], ["refined/01.png", "refined/03.png"]
    assert list(files()) == [STATE, *drafts, *refined, "sheet.png"]
    assert [read_request(Path("foxes", name)).request.seed for name in drafts] == [5, 6, 7]
    request = read_request("foxes/refined/03.png").request
    assert (request.prompt, request.seed, request.image) == ("a fox", 7, "foxes/drafts/03.png")
    assert describe("foxes/refined/03.png")["refined_from"]["picture"] == "foxes/drafts/03.png"
    assert state()["chosen"] == [3, 1]


def test_a_draft_is_the_picture_that_generate_draws_with_its_seed(words, tiny_folder):
    assert main(words) == 0
    assert main(["generate", "a fox", "-m", str(tiny_folder), *SMALL, "--seed", "6", "-o", "alone.png"]) == 0
    with Image.open("alone.png") as alone:
        assert pictures()["drafts/02.png"] == alone.tobytes()


def test_without_a_terminal_it_stops_after_the_sheet_and_prints_how_to_continue(words, then, capsys):
    assert main([*words, *then, "--pick", "1", "--dtype", "fp32"]) == 0
    out, err = capsys.readouterr()
    assert out == str(Path("foxes/sheet.png")) + "\n"
    again = err.split("resume with: ")[1].strip()
    assert again == "inkstream draft --resume foxes --dtype=fp32 --choose NUMBERS"
    drawn = pictures()
    assert main(shlex.split(again.replace("NUMBERS", "2"))[1:]) == 0
    assert capsys.readouterr().out.split() == [str(Path("foxes/sheet.png")), str(Path("foxes/refined/02.png"))]
    assert {name: data for name, data in pictures().items() if name.startswith("drafts")} == drawn


def test_without_a_model_to_refine_with_it_stops_after_the_sheet_too(words, then, capsys):
    assert main(words) == 0
    again = capsys.readouterr().err.split("resume with: ")[1].strip()
    assert again == "inkstream draft --resume foxes --choose NUMBERS --refine-with MODEL"
    assert main(["draft", "--resume", "foxes", "--choose", "2", *then]) == 0
    assert list(pictures()) == ["drafts/01.png", "drafts/02.png", "drafts/03.png", "refined/02.png"]


def test_chosen_drafts_are_kept_if_nothing_refines_them_and_may_be_refined_later(words, then, capsys):
    assert main([*words, "--pick", "2"]) == 0  # there is no terminal to ask on
    again = capsys.readouterr().err.split("resume with: ")[1].strip()
    assert again == "inkstream draft --resume foxes --choose NUMBERS"
    assert main(shlex.split(again.replace("NUMBERS", "3,1"))[1:]) == 0
    out, err = capsys.readouterr()
    assert out.split()[1:] == [str(Path("foxes/chosen/03.png")), str(Path("foxes/chosen/01.png"))]
    assert "resume with" not in err
    assert Path("foxes/chosen/03.png").read_bytes() == Path("foxes/drafts/03.png").read_bytes()
    assert main(["draft", "--resume", "foxes", *then, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [result["path"] for result in results] == [f"foxes/refined/0{i}.png" for i in (3, 1)]
    assert Path("foxes/chosen/03.png").exists()


@pytest.mark.parametrize(
    ("there", "model", "said"),
    [(True, "z-image-turbo", "drafting with z-image-turbo\n"),
     (False, "pocket", "drafting with pocket, because z-image-turbo is not downloaded: -m z-image-turbo --yes")],
)  # fmt: skip
def test_without_a_model_z_image_turbo_drafts_where_it_is_there(there, model, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(draft, "is_downloaded", lambda name: there)
    wish = draft.Drafts.model_validate({"prompt": "a fox"})
    _, begun = draft.begun(wish, None, tmp_path / "foxes", Terminal())
    assert begun.request.model == model
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("first", [True, False])
def test_a_folder_keeps_its_model_whatever_is_downloaded_later(first, tmp_path, monkeypatch):
    wish = draft.Drafts.model_validate({"prompt": "a fox"})
    for there in (first, not first):
        monkeypatch.setattr(draft, "is_downloaded", lambda name, there=there: there)
        folder, begun = draft.begun(wish, None, tmp_path, Terminal(quiet=True))
        draft.write_state(folder, begun)
        assert begun.request.model == ("z-image-turbo" if first else "pocket")


def test_the_same_command_again_draws_nothing_and_prints_the_same(finished, words, then, capsys, monkeypatch):
    before, seen = files(), steps_counted(monkeypatch)
    for again in ([*words, *then, "--choose", "1,3", "--json"], ["draft", "--resume", "foxes", "--json"]):
        assert main(again) == 0
        told = json.loads(capsys.readouterr().out)
        assert (told["chosen"], told["go_on"], told["sheet"]) == ([1, 3], None, str(Path("foxes/sheet.png")))
        assert [draft["seed"] for draft in told["drafts"]] == [5, 6, 7]
        assert [refined["path"] for refined in told["results"]] == [f"foxes/refined/0{i}.png" for i in (1, 3)]
    assert seen == []
    assert files() == before


def test_a_random_seed_is_kept_and_the_default_folder_is_named_by_the_prompt(words, capsys, monkeypatch):
    words = [word for word in words if word not in ("--seed", "5", "-o", "foxes")]
    assert main(words) == 0
    assert main(words) == 0
    assert set(capsys.readouterr().out.split()) == {str(Path("drafts/a-fox/sheet.png"))}
    assert len(list(Path("drafts/a-fox/drafts").iterdir())) == 3


def test_more_drafts_can_be_chosen_later_and_the_first_stay(finished):
    before = files()
    assert main(["draft", "--resume", "foxes", "--choose", "2"]) == 0
    assert state()["chosen"] == [1, 3, 2]
    changed = files().items() ^ before.items()
    assert {name for name, _ in changed} == {STATE, "refined/02.png"}


def test_a_strength_for_refining_is_used(words, then):
    assert main([*words, *then, "--choose", "1", "--refine-strength", "0"]) == 0
    assert read_request("foxes/refined/01.png").request.strength == 0


# Stopped


def interrupt_at(monkeypatch, index: int, step: int) -> None:
    def show(self, event):
        if isinstance(event, Step) and (event.index, event.step) == (index, step):
            raise KeyboardInterrupt

    monkeypatch.setattr(Terminal, "show", show)


def test_after_an_interrupt_the_same_command_resumes(unbroken, words, then, capsys, monkeypatch):
    words = [*words, *then, "--choose", "1,3"]
    with monkeypatch.context() as patched:
        interrupt_at(patched, index=2, step=1)
        assert main(words) == 130
    err = capsys.readouterr().err
    assert "stopped; 2 of 3 drafts and 0 of 2 refined pictures are in foxes" in err
    assert "resume with: inkstream draft --resume foxes\n" in err
    kept = files()
    assert list(kept) == [STATE, "drafts/01.png", "drafts/02.png"]
    seen = steps_counted(monkeypatch)
    assert main(words) == 0
    assert [(step.index, step.count) for step in seen if step.step == 1] == [(2, 3), (0, 2), (1, 2)]
    assert pictures() == pictures(unbroken)
    assert kept.items() <= files().items()


def test_after_an_interrupt_while_refining_the_chosen_drafts_are_kept(unbroken, words, then, capsys, monkeypatch):
    with monkeypatch.context() as patched:
        interrupt_at(patched, index=0, step=9)  # the drafts have two steps
        assert main([*words, *then, "--choose", "1,3"]) == 130
    assert "3 of 3 drafts and 0 of 2 refined pictures" in capsys.readouterr().err
    assert main(["draft", "--resume", "foxes"]) == 0
    assert pictures() == pictures(unbroken)


@pytest.mark.slow
def test_after_a_kill_the_same_pictures_are_drawn(unbroken, words, then):
    """The process is killed once while drafting and once while refining."""
    words = [*words, *then, "--choose", "1,3"]
    for last in ("drafts/01.png", "refined/01.png"):
        with subprocess.Popen([*COMMAND, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            while not Path("foxes", last).exists() and process.poll() is None:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
        kept = files()
        assert last in kept
    Path("foxes/drafts/.0123456789abcdef.part").write_bytes(b"half a picture")
    Path("foxes/drafts/02.png").unlink()
    assert main(words) == 0
    assert pictures() == pictures(unbroken)
    there = files()
    assert list(there) == [STATE, *pictures(unbroken), "sheet.png"]
    whole = {name: digest for name, digest in kept.items() if "/." not in name and name != "drafts/02.png"}
    assert whole.items() <= there.items()


@pytest.mark.slow
def test_ctrl_c_ends_the_process_with_130_and_without_a_traceback(words):
    words = [*(word if word != "3" else "99" for word in words), "--json"]
    with subprocess.Popen([*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not Path("foxes/drafts/01.png").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    document = json.loads(out)
    assert [Path(draft["path"]).exists() for draft in document["drafts"]] == [True] * len(pictures())
    assert document["go_on"] == "inkstream draft --resume foxes"


# Choosing drafts


@pytest.mark.slow
def test_on_a_terminal_it_asks_until_the_answer_is_valid(words, then):
    main([*words, "--quiet"])
    ours, theirs = pty.openpty()
    asking = [*COMMAND, "draft", "--resume", "foxes", *then, "--pick", "2"]
    with subprocess.Popen(asking, stdin=theirs, stderr=theirs, stdout=subprocess.PIPE, text=True) as process:
        os.close(theirs)
        os.write(ours, b"7\n1\n3, 1\n")
        shown = b""
        while True:
            try:
                shown += os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
        assert process.stdout is not None
        out = process.stdout.read()
    os.close(ours)
    assert process.returncode == 0, shown
    assert out.split()[1:] == [str(Path("foxes/refined/03.png")), str(Path("foxes/refined/01.png"))]
    assert shown.count(b"numbers of 2 of the 3 drafts") == 3
    assert b"there is no draft 7: choose from 1 to 3" in shown
    assert b"1 drafts are named, but --pick is 2" in shown


@pytest.mark.parametrize("text", ["3,7", "3 7", " 3, 7, ", "3,7,3"])
def test_numbers_of_drafts_are_read_in_common_notations(text):
    assert numbers_of(text, 16, 2) == (3, 7)


@pytest.mark.parametrize("text", ["", "0", "17", "a", "-1", "3-7", "²"])
def test_an_invalid_number_of_a_draft_is_refused(text):
    with pytest.raises(InputError, match="choose from 1 to 16"):
        numbers_of(text, 16, None)


# Errors


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--prompt", "a hare"], ["prompt 'a fox'", "'a hare'", "another --output"]),
        (["--steps", "3"], ["steps 2, not 3"]),
        (["--seed", "6"], ["seed 5, not 6"]),
        (["-c", "4"], ["count 3, not 4"]),
        (["--refine-with", "z-image"], ["--refine-with", "not z-image", "inkstream refine"]),
        (["--refine-strength", "0.5"], ["--refine-strength None, not 0.5"]),
        (["--pick", "1"], ["2 drafts of foxes are chosen, not 1", "--choose"]),
        (["--choose", "4"], ["no draft 4", "1 to 3"]),
        (["-o", "elsewhere"], ["--resume foxes", "--output elsewhere"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_a_folder_with_other_drafts_is_refused_and_not_changed(finished, capsys, more, named):
    before = files()
    refused(["draft", "--resume", "foxes", *more], capsys, named)
    assert files() == before


def test_the_same_command_with_another_setting_is_refused(finished, words, capsys):
    before = files()
    refused([word if word != "5" else "6" for word in words], capsys, ["foxes", "seed 5, not 6", "another --output"])
    refused([*words, "--guidance", "2"], capsys, ["guidance None, not 2.0"])
    refused([word for word in words if word not in ("--steps", "2")], capsys, ["steps 2, not None"])
    assert files() == before


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ([], ["no prompt"]),
        (["a fox", "-c", "300"], ["--count 300", "256 or less"]),
        (["a fox", "-c", "2", "--pick", "3", "--refine-with", "z-image"], ["--pick 3 is more than 2"]),
        (["a fox", "--pick", "0"], ["--pick 0", "1 or more"]),
        (["a fox", "--choose", "17", "--refine-with", "z-image"], ["no draft 17"]),
        (["a fox", "--refine-strength", "2"], ["--refine-strength 2", "1 or less"]),
        (["a fox", "--refine-with", "nowhere"], ["nowhere"]),
        (["a fox", "--device", "abacus"], ["abacus", "cpu"]),
        (["a fox", "-W", "100", "-m", "z-image"], ["width 100", "96 or 112"]),
        (["a fox", "-o", "photos"], ["photos has files that are not drafts", "--output"]),
        (["a fox", "-o", "photos/photo.png"], ["photo.png", "a file is in the way"]),
        (["--resume", "photos"], ["photos has no drafts", "inkstream draft"]),
        (["a fox", "-o", "broken"], ["draft.json cannot be read", "--output"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_an_invalid_command_is_refused_in_one_line(words, capsys, monkeypatch, more, named):
    Path("photos").mkdir()
    Path("photos/photo.png").write_bytes(b"mine")
    Path("broken").mkdir()
    Path("broken", STATE).write_text('{"version": 9}')
    model = [] if "-m" in more else words[2:4]
    refused(["draft", *more, *model], capsys, named)
    assert Path("photos/photo.png").read_bytes() == b"mine"
    assert not list(Path().glob("**/drafts/*.png"))


def refused(words: list[str], capsys, named: list[str]) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert [word for word in named if word not in err] == [], err


# The sheet


def test_the_sheet_shows_every_draft_in_its_place(finished):
    with Image.open("foxes/sheet.png") as sheet:
        shown = np.asarray(sheet)
    edge, tall = edge_of(320), 213
    places = []
    for number in (1, 2, 3):
        with Image.open(f"foxes/drafts/0{number}.png") as image:
            draft = np.asarray(image.resize((320, tall), Image.Resampling.NEAREST))
        places += [
            (y, column)
            for y in range(len(shown) - tall)
            for column, x in enumerate((edge, 3 * edge + 320))
            if np.array_equal(shown[y : y + tall, x : x + 320], draft)
        ]
    assert [column for _, column in places] == [0, 1, 0]
    assert places[0][0] == places[1][0] < places[2][0]
