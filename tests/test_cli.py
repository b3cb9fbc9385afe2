"""The command line on a real model at tiny size: what it writes, what it says, how it refuses, how it stops."""

from __future__ import annotations

import io
import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from inkstream.cli import main
from inkstream.cli.terminal import Terminal
from inkstream.engine.pictures.metadata import read_request
from inkstream.families import SPECS
from inkstream.types import Request, Step

COMMAND = [sys.executable, "-c", "from inkstream.cli import run; run()"]
SMALL = ["-W", "64", "-H", "48", "--steps", "2"]


@pytest.fixture
def draw(tiny_folder, tmp_path, monkeypatch):
    """Run `inkstream generate` on the tiny model, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return lambda *words: main(["generate", *words, "-m", str(tiny_folder)])


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    across, down = np.meshgrid(np.linspace(0, 255, 64), np.linspace(0, 255, 48))
    Image.fromarray(np.stack([across, down, 255 - across], -1).astype(np.uint8)).save(path)
    return path


@pytest.fixture
def mask(tmp_path):
    path = tmp_path / "mask.png"
    Image.new("L", (64, 48)).save(path)
    with Image.open(path) as image:
        image.paste(255, (16, 8, 48, 40))
        image.save(path)
    return path


def pixels(path: Path | io.BytesIO) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_a_prompt_becomes_a_picture_that_carries_its_request(draw, capsys):
    assert draw("a red circle", *SMALL, "--seed", "7", "-o", "circle.png") == 0
    out, err = capsys.readouterr()
    assert out == "circle.png\n"
    assert pixels(Path("circle.png")).shape == (48, 64, 3)
    request = read_request("circle.png").request
    assert (request.prompt, request.seed, request.steps, request.width) == ("a red circle", 7, 2, 64)
    assert "seed 7" in err
    assert "again: inkstream generate 'a red circle'" in err


def test_a_picture_is_drawn_again_with_equal_pixels(draw, capsys, tmp_path):
    assert draw("a red circle", *SMALL, "--solver", "heun", "-o", "one.png") == 0
    assert main(["generate", "--from", "one.png", "-o", "two.png"]) == 0
    assert np.array_equal(pixels(Path("one.png")), pixels(Path("two.png")))


def test_options_given_beside_a_picture_win(draw, capsys):
    draw("a red circle", *SMALL, "--seed", "7", "-o", "one.png")
    assert main(["generate", "--from", "one.png", "--seed", "8", "-o", "two.png"]) == 0
    request = read_request("two.png").request
    assert (request.prompt, request.seed, request.steps) == ("a red circle", 8, 2)
    assert not np.array_equal(pixels(Path("one.png")), pixels(Path("two.png")))


def test_the_command_that_is_printed_draws_the_same_again(draw, capsys):
    words = ['--prompt=-3 °C, it\'s "cold"\nand 雪', "--negative-prompt=-x", "--guidance", "3", "--dtype", "fp32"]
    assert draw(*words, *SMALL, "-o", "one.png") == 0
    again = capsys.readouterr().err.split("again: ")[1]
    assert "--dtype fp32" in again
    assert main([*shlex.split(again)[1:], "-o", "two.png"]) == 0
    assert np.array_equal(pixels(Path("one.png")), pixels(Path("two.png")))


def test_the_prompt_comes_from_stdin_where_it_is_a_dash(draw, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("a blue square\n"))
    assert draw("-", *SMALL, "-o", "square.png") == 0
    assert read_request("square.png").request.prompt == "a blue square"


def test_a_pipe_gets_the_picture_itself(draw, capsysbinary):
    assert draw("a red circle", *SMALL, "--seed", "7") == 0
    piped = capsysbinary.readouterr().out
    assert piped.startswith(b"\x89PNG")
    assert draw("a red circle", *SMALL, "--seed", "7", "-o", "circle.png") == 0
    assert np.array_equal(pixels(io.BytesIO(piped)), pixels(Path("circle.png")))
    assert os.listdir() == ["circle.png"]


def test_json_is_one_document_that_tells_all(draw, capsys):
    assert draw("A red, Circle!", *SMALL, "--seed", "7", "-c", "2", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert [picture["path"] for picture in document["pictures"]] == ["a-red-circle-7.png", "a-red-circle-8.png"]
    assert [picture["seed"] for picture in document["pictures"]] == [7, 8]
    request = Request.model_validate(document["pictures"][1]["request"])
    assert (request.seed, request.count, request.steps) == (8, 1, 2)
    assert document["pictures"][0]["device"] == "cpu"
    assert sorted(os.listdir()) == ["a-red-circle-7.png", "a-red-circle-8.png"]


def test_several_pictures_are_numbered_and_each_equals_its_single_run(draw, capsys):
    assert draw("x", *SMALL, "--seed", "3", "--count", "2", "-o", "out/x.webp", "--metadata", "minimal") == 0
    assert capsys.readouterr().out.split() == [str(Path("out/x-1.webp")), str(Path("out/x-2.webp"))]
    assert draw("x", *SMALL, "--seed", "3", "--count", "2", "-o", "pngs/") == 0
    assert draw("x", *SMALL, "--seed", "4", "-o", "alone.png") == 0
    assert np.array_equal(pixels(Path("pngs/x-4.png")), pixels(Path("alone.png")))


def test_a_folder_takes_the_same_picture_twice_and_a_file_name_does_not(draw, capsys):
    for _ in range(2):
        assert draw("x", *SMALL, "--seed", "3", "-o", ".") == 0
    assert sorted(os.listdir()) == ["x-3-2.png", "x-3.png"]
    before = Path("x-3.png").read_bytes()
    assert draw("y", *SMALL, "-o", "x-3.png") == 2
    assert Path("x-3.png").read_bytes() == before


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
def test_every_format_carries_the_request(draw, capsys, suffix):
    assert draw("橘猫", *SMALL, "-o", f"cat{suffix}") == 0
    assert read_request(f"cat{suffix}").request.prompt == "橘猫"
    assert main(["info", f"cat{suffix}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.split("\n", 1)[1])["request"]["prompt"] == "橘猫"


def test_a_prompt_too_long_for_a_jpeg_is_saved_as_png(draw, capsys):
    prompt = "word " * 20_000
    assert draw(prompt, *SMALL, "-o", "long.jpg") == 0
    assert os.listdir() == ["long.png"]
    assert read_request("long.png").request.prompt == prompt
    assert "saved as long.png instead" in capsys.readouterr().err


def test_a_picture_to_start_from_and_its_mask_are_used(draw, capsys, photo, mask):
    at = ["--image", str(photo), "--seed", "7", "--steps", "4"]
    assert draw("x", *at, "--strength", "0.5", "-o", "half.png") == 0
    assert draw("x", *at, "--mask", str(mask), "-o", "inside.png") == 0
    before, inside = pixels(photo), pixels(Path("inside.png"))
    outside = pixels(mask)[..., 0] == 0
    assert np.array_equal(before[outside], inside[outside])
    assert not np.array_equal(before, inside)
    assert not np.array_equal(before, pixels(Path("half.png")))


def test_what_has_no_effect_is_said(draw, capsys):
    assert draw("x", "-n", "blurry", *SMALL, "-o", "x.png") == 0
    assert "negative prompt has no effect" in capsys.readouterr().err


def test_a_prompt_whose_end_is_not_read_says_so(draw, capsys):
    assert draw("word " * 600, *SMALL, "-o", "x.png") == 0
    assert "the prompt is longer than 512 tokens" in capsys.readouterr().err


def test_quiet_says_nothing_but_the_result(draw, capsys):
    assert draw("x", *SMALL, "-o", "x.png", "--quiet") == 0
    assert capsys.readouterr() == ("x.png\n", "")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["x", "-W", "100"], ["width 100", "96 or 112"]),
        (["x", "--height", "1000"], ["height 1000", "992 or 1008"]),
        (["x", "-W", "8"], ["--width 8", "16 or more"]),
        (["x", "-W", "wide"], ["--width wide", "whole number"]),
        (["x", "--steps", "0"], ["--steps 0", "1 or more"]),
        (["x", "--steps", "2.5"], ["--steps 2.5", "whole number"]),
        (["x", "--steps", "99999999999999999999999"], ["--steps", "1000 or less"]),
        (["x", "--guidance", "-1"], ["--guidance -1", "0 or more"]),
        (["x", "--cfg-scale", "nan"], ["--guidance nan", "finite"]),
        (["x", "--seed", "-5"], ["--seed -5", "0 or more"]),
        (["x", "--seed", "9223372036854775808"], ["--seed 9223372036854775808", "less than 9223372036854775808"]),
        (["x", "--count", "0"], ["--count 0", "1 or more"]),
        (["x", "--strength", "1.5", "--image", "photo.png"], ["--strength 1.5", "1 or less"]),
        (["x", "--shift", "0"], ["--shift 0", "more than 0"]),
        (["x", "--solver", "eulre"], ["eulre", "euler?", "dpmpp_2m"]),
        (["x", "--schedule", "linear"], ["linear", "linear_quadratic", "beta57"]),
        (["x", "--image", "nowhere.png"], ["nowhere.png", "check the path"]),
        (["x", "--reference", "nowhere.png"], ["nowhere.png", "check the path"]),
        (["x", "--reference", "photo.png"], ["takes no references", "leave them out"]),
        (["x", "--image", "broken.png"], ["broken.png", "again"]),
        (["x", "--image", "text.txt"], ["text.txt", "convert it to PNG"]),
        (["x", "--image", "."], [". is a folder"]),
        (["x", "--image", "photo.png", "--mask", "nowhere.png"], ["nowhere.png"]),
        (["x", "--mask", "photo.png"], ["mask", "image"]),
        (["x", "--strength", "0.5"], ["strength", "image"]),
        (["x", "-o", "x.gif"], ["x.gif", ".png, .webp or .jpg"]),
        (["x", "-o", "photo.png"], ["photo.png", "not overwritten"]),
        (["x", "-o", "text.txt/x.png"], ["text.txt", "a file is in the way"]),
        (["x", "-o", "text.txt/more/"], ["text.txt", "a file is in the way"]),
        (["x", "-o", "/proc/nowhere/"], ["/proc/nowhere", "another --output"]),
        (["x", "--count", "2"], ["--count 2", "--output"]),
        (["x", "--metadata", "some"], ["some", "minimal"]),
        (["x", "--dtype", "int3", "-o", "x.png"], ["int3", "bf16"]),
        (["x", "--device", "abacus", "-o", "x.png"], ["abacus", "cpu"]),
        (["x", "--device", "cuda:99", "-o", "x.png"], ["cuda", "cpu"]),
        (["x", "--from", "photo.png"], ["photo.png", "carries no request"]),
        (["--from", "nowhere.png"], ["nowhere.png"]),
        (["x", "--sovler", "euler"], ["--sovler", "--solver"]),
        (["x", "-q"], ["-q", "--help"]),
        (["x", "--steps"], ["--steps", "value"]),
        (["x", "--steps", "1", "--steps", "2"], ["--steps", "once"]),
        (["a", "fox"], ["fox", "quotes"]),
        ([], ["no prompt"]),
        ([""], ["no prompt"]),
        (["  "], ["no prompt"]),
        (["-"], ["no prompt"]),
    ],
    ids=lambda value: " ".join(value)[:40] or "nothing",
)
def test_what_cannot_be_done_is_refused_in_one_line(draw, capsys, monkeypatch, photo, words, named):
    Path("text.txt").write_text("no picture")
    Path("broken.png").write_bytes(photo.read_bytes()[:120])
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    before = set(os.listdir())
    refused(draw(*words), capsys, named)
    assert set(os.listdir()) == before


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["genrate", "x"], ["genrate", '"generate"']),
        (["--bogus"], ["--bogus", "generate"]),
        (["generate", "x", "-m", "z-image-trubo"], ["z-image-trubo", "z-image-turbo"]),
        (["generate", "x", "-m", "./nowhere"], ["nowhere"]),
        (["generate", "x", "-m", "empty"], ["empty"]),
        (["info"], ["PICTURE", "--help"]),
        (["info", "nowhere.png"], ["nowhere.png", "check the path"]),
        (["models", "x"], ["x is not expected here"]),
        (["convert", "nowhere", "out", "--to", "diffusers"], ["nowhere"]),
        (["convert", "empty", "out", "--to", "zip"], ["zip", "diffusers", "native"]),
        (["convert", "empty", "out"], ["empty"]),
        (["bench", "--cases", "huge"], ["no case huge", "tiny"]),
        (["bench", "--repeats", "0"], ["--repeats 0", "1 or more"]),
        (["bench", "--cases", "turbo-1024", "--device", "cuda"], ["--device"]),
        (["bench", "--cases", "tiny", "--record", "x"], ["--record x", "in the repository"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_other_commands_refuse_in_one_line_too(capsys, monkeypatch, tmp_path, words, named):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    refused(main([*words, "-o", "x.png"] if words[:1] == ["generate"] else words), capsys, named)
    assert os.listdir() == ["empty"]


def refused(code: int, capsys, named: list[str]) -> None:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("inkstream: ")
    assert [word for word in named if word not in err] == [], err
    assert code == 2


def test_an_error_of_ours_is_one_line_and_debug_adds_where_it_happened(capsys, monkeypatch):
    def fail(picture):
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr("inkstream.engine.pictures.metadata.describe", fail)
    assert main(["info", "x.png"]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "two lines" in err
    assert "--debug" in err
    assert main(["info", "x.png", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_run_keeps_what_is_finished_and_leaves_no_halves(tiny_folder, tmp_path):
    words = ["generate", "x", "-m", str(tiny_folder), *SMALL[:4], "--steps", "50", "-c", "9999", "-o", "out"]
    with subprocess.Popen(
        [*COMMAND, *words], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline().strip()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "of 9999 done" in err
    kept = sorted(str(Path("out") / name) for name in os.listdir(tmp_path / "out"))
    assert kept == sorted([first, *out.split()])
    for path in kept:
        assert pixels(tmp_path / path).shape == (48, 64, 3)


@pytest.mark.slow
def test_a_reader_that_leaves_early_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*COMMAND, "models"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 141
    assert done.stderr == b""


@pytest.mark.slow
def test_a_download_shows_its_size_and_licence_and_is_not_started_unasked(tmp_path):
    here = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    words = ["generate", "x", "-m", "z-image-turbo", "-o", str(tmp_path / "x.png")]
    done = subprocess.run([*COMMAND, *words], env=here, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert [word for word in ("32.9 GB", "apache-2.0", "--yes") if word not in done.stderr] == []


def test_info_shows_what_a_picture_is(capsys, photo):
    assert main(["info", str(photo)]) == 0
    assert "64" in capsys.readouterr().out


def test_the_models_are_listed(capsys):
    assert main(["models", "--json"]) == 0
    known = {model["name"]: model for model in json.loads(capsys.readouterr().out)}
    assert known["z-image-turbo"]["defaults"]["steps"] == 8
    assert known["z-image-turbo"]["licence"] == "apache-2.0"
    assert all(fit["seconds"] > 0 for fit in known["pocket"]["fits"])
    assert main(["models"]) == 0
    shown = capsys.readouterr().out
    assert all((f"{name}: " if "provider" in model else f"{name}  (") in shown for name, model in known.items())
    assert "\nrecommended: " in shown


def test_the_doctor_says_what_fits(capsys):
    assert main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    turbo = next(model for model in findings["models"] if model["name"] == "z-image-turbo")
    assert turbo["weights"] == {"transformer": 6154908736, "text_encoder": 3921534720, "vae": 83819683}
    assert all(fit["peak"] <= findings["for"]["budget_bytes"] and fit["seconds"] > 0 for fit in turbo["fits"])
    assert findings["recommended"] in {model["name"] for model in findings["models"] if model["fits"]}
    assert findings["device"]["memory_bytes"] > findings["device"]["free_bytes"] > 0
    assert main(["doctor"]) == 0
    assert "z-image-turbo" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("memory", "first"),
    [("24GiB", "bf16 resident"), ("16GiB", "bf16 parked"), ("12GiB", "fp8 parked"), ("8GiB", "q6_k parked"),
     ("3GiB", "bf16 streamed"), ("1GiB", "does not fit 0.90 GiB")],
)  # fmt: skip
def test_the_doctor_answers_for_another_machine(memory, first, capsys):
    assert main(["doctor", "--for", memory]) == 0
    lines = {line.partition(":")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["z-image-turbo"].split(": ", 1)[1].strip().startswith(first)
    taken = "pocket" if "not" in first else "z-image-turbo"
    assert lines["recommended"].startswith(f"recommended: {taken}")


@pytest.mark.slow
def test_what_was_foreseen_is_what_the_planner_says_now():
    """Of the model that takes least time; the others come of the same script."""
    script = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "foresee.py"))
    known = json.loads(script["TABLE"].read_text())
    assert set(known) == {spec.name for spec in SPECS.values() if spec.repo or spec.folder}
    now, then = (dict(leaves(facts)) for facts in (script["foresee"](SPECS["pocket"]), known["pocket"]))
    assert now == {name: pytest.approx(value, rel=0.02) for name, value in then.items()}


def leaves(facts: Any, *names: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    if not isinstance(facts, dict):
        yield names, facts
        return
    for name, value in facts.items():
        yield from leaves(value, *names, name)


def test_a_model_is_converted_there_and_back_and_draws_the_same(draw, tiny_folder, capsys):
    assert draw("x", *SMALL, "--seed", "1", "-o", "before.png") == 0
    assert main(["convert", str(tiny_folder), "native", "--to", "native"]) == 0
    assert main(["convert", "native", "diffusers", "--to", "diffusers"]) == 0
    for model in ("native", "diffusers"):
        assert main(["generate", "x", "-m", model, *SMALL, "--seed", "1", "-o", f"{model}.png"]) == 0
        assert np.array_equal(pixels(Path("before.png")), pixels(Path(f"{model}.png")))


def test_the_bar_shows_the_time_left_of_all_pictures(monkeypatch):
    notes: list[str] = []
    terminal = Terminal(quiet=True)
    monkeypatch.setattr(terminal, "_move", lambda what, done, total, note: notes.append(note))
    for step, seconds, count in ((2, 30.0, 1), (2, 30.0, 3), (7, 0.1, 1)):
        terminal.show(Step(step, 8, 0, count, 0.5, seconds))
    assert notes[0].endswith("30.00 s/step, 3 min left")
    assert notes[1].endswith("30.00 s/step, 11 min left")
    assert "left" not in notes[2]
