"""Prompts that are more than a line of words: JSON that is checked, and prompts that the model itself writes out."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import inkstream
from inkstream.cli import main
from inkstream.engine.engine import Engine
from inkstream.engine.pictures.metadata import describe, read_request
from inkstream.families import SPECS
from inkstream.families.flux2 import upsample
from inkstream.families.flux2.specs import KLEIN_4B
from inkstream.families.flux2.text import system_message
from inkstream.families.flux2.upsample import dev_task, klein_task, read_task, size_seen, write
from inkstream.types import Done, Failed, InputError, Loading, Machine, Request
from inkstream.weights.files import read_state, write_state

SMALL = ["-W", "64", "-H", "48", "--steps", "2"]


@pytest.fixture(scope="module")
def klein(tmp_path_factory, make_folder):
    return make_folder(tmp_path_factory.mktemp("models") / "flux2-klein", KLEIN_4B.tiny)


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Run `inkstream generate` in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(upsample, "OUTPUT_TOKENS", 8)
    return lambda *words: main(["generate", *map(str, words), *SMALL])


def pixels(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


# JSON -----------------------------------------------------------------------------------------------------------------

HARBOUR = {"style": "ink", "subjects": [{"description": "a fox", "color_palette": ["#ff8800"]}], "scene": "a harbour"}
CANONICAL = (
    '{"scene": "a harbour", "subjects": [{"description": "a fox", "color_palette": ["#FF8800"]}], "style": "ink"}'
)


def test_a_json_prompt_is_drawn_as_its_one_line_which_the_picture_carries(draw, klein, capsys):
    Path("harbour.json").write_text(json.dumps(HARBOUR, indent=2))
    assert draw("--json-prompt", "harbour.json", "-m", klein, "-o", "fox.png", "--seed", "3") == 0
    assert read_request("fox.png").request.prompt == CANONICAL
    told = capsys.readouterr().err
    assert "reads as plain text" not in told
    assert main(["generate", CANONICAL, "-m", str(klein), *SMALL, "--seed", "3", "-o", "again.png"]) == 0
    assert np.array_equal(pixels("fox.png"), pixels("again.png"))


@pytest.mark.parametrize("words", [["--json-prompt", "-"], ["--json-prompt=-"]], ids=str)
def test_a_json_prompt_comes_from_stdin_where_it_is_a_dash(draw, klein, monkeypatch, capsys, words):
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(HARBOUR)))
    assert draw(*words, "-m", klein, "-o", "fox.png") == 0
    assert read_request("fox.png").request.prompt == CANONICAL


def test_a_model_that_was_not_made_for_json_draws_it_and_says_so(draw, tiny_folder, capsys):
    Path("harbour.json").write_text(json.dumps(HARBOUR))
    assert draw("--json-prompt", "harbour.json", "-m", tiny_folder, "-o", "fox.png") == 0
    assert "it is JSON, which tiny-turbo reads as plain text" in capsys.readouterr().err
    assert read_request("fox.png").request.prompt == CANONICAL


def test_a_picture_is_drawn_again_with_another_json_prompt(draw, klein, capsys):
    assert draw("a cat", "-m", klein, "-o", "cat.png", "--seed", "3") == 0
    Path("harbour.json").write_text(json.dumps(HARBOUR))
    assert main(["generate", "--from", "cat.png", "--json-prompt", "harbour.json", "-o", "fox.png"]) == 0
    request = read_request("fox.png").request
    assert (request.prompt, request.seed, request.steps) == (CANONICAL, 3, 2)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'{"scene": "x", "sceen": "y"}', 'has a field "sceen", which FLUX.2 does not know: did you mean scene?'),
        (b'{"color_palette": ["#f80"]}', 'color_palette has the colour "#f80": write #FF8800'),
        (b'{"scene": "x",}', "cannot be read at line 1"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (None, "cannot be read (No such file or directory): give a file, or - for stdin"),
    ],
)
def test_what_is_wrong_with_a_json_prompt_is_one_line_that_names_file_field_and_remedy(draw, capsys, content, named):
    if content is not None:
        Path("p.json").write_bytes(content)
    assert draw("--json-prompt", "p.json") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("inkstream: --json-prompt p.json")
    assert named in line


def test_a_json_prompt_and_a_plain_one_are_not_given_together(draw, capsys):
    assert draw("a cat", "--json-prompt", "p.json") == 2
    assert capsys.readouterr().err == (
        "inkstream: --json-prompt p.json and a prompt were given: leave one of them out\n"
    )


# Written out ----------------------------------------------------------------------------------------------------------


def test_a_prompt_is_written_out_told_and_kept_beside_the_one_that_was_given(draw, klein, capsys):
    assert draw("a cat", "--upsample", "-m", klein, "--seed", "3", "-o", "cat.png", "--json") == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    (drawn,) = document["pictures"]
    request = read_request("cat.png").request
    assert request.prompt not in ("", "a cat")
    assert not request.upsample
    assert f"prompt: {request.prompt}" in err
    assert describe("cat.png")["upsampled_from"] == "a cat" == drawn["upsampled_from"]
    assert drawn["request"]["prompt"] == request.prompt
    assert main(["generate", "--from", "cat.png", "-o", "again.png"]) == 0
    assert np.array_equal(pixels("cat.png"), pixels("again.png"))


def test_the_command_that_is_printed_writes_the_same_prompt_again(draw, klein, capsys):
    import shlex

    assert draw("a cat", "--upsample", "-m", klein, "-o", "cat.png") == 0
    again = capsys.readouterr().err.split("again: ")[1]
    assert " --upsample " in again
    assert main([*shlex.split(again)[1:], "-o", "again.png"]) == 0
    assert read_request("again.png").request == read_request("cat.png").request
    assert np.array_equal(pixels("cat.png"), pixels("again.png"))


def test_the_seed_decides_what_is_written_and_every_picture_has_the_same_prompt(klein, monkeypatch):
    monkeypatch.setattr(upsample, "OUTPUT_TOKENS", 8)
    monkeypatch.setattr(upsample, "TEMPERATURE", 1.0)
    engine = Engine(Machine("cpu"))

    def prompts(seed: int) -> list[str]:
        request = Request(prompt="a cat", model=str(klein), width=64, height=48, steps=1, seed=seed, count=2,
                          upsample=True)  # fmt: skip
        return [event.request.prompt for event in engine.submit(request) if isinstance(event, Done)]

    torch.manual_seed(1)
    first = prompts(3)
    assert first[0] == first[1]
    torch.manual_seed(2)
    assert prompts(3) == first
    assert prompts(4) != first


def test_the_prompt_grows_in_events_and_closing_them_stops_the_writing(klein, monkeypatch):
    monkeypatch.setattr(upsample, "OUTPUT_TOKENS", 400)
    engine = Engine(Machine("cpu"))
    request = Request(prompt="a cat", model=str(klein), width=64, height=48, steps=1, seed=3, upsample=True)
    events = engine.submit(request)
    asked = []
    texts = []
    for event in events:
        if isinstance(event, Loading) and event.what == "language model":
            engine.model.writer.norm.register_forward_hook(lambda *given: asked.append(given))
        if isinstance(event, Loading) and event.text:
            texts.append(event.text)
        if len(texts) == 4:
            break
    assert sorted(texts, key=len) == texts
    before = len(asked)
    events.close()
    assert len(asked) == before <= 5


def test_a_model_without_a_language_model_says_so_before_anything_is_fetched(capsys):
    for name in ("z-image-turbo", "flux1-dev"):
        assert main(["generate", "a cat", "--upsample", "-m", name]) == 2
        assert capsys.readouterr().err == (
            f"inkstream: {name} cannot upsample a prompt: leave upsample out, or take flux2-klein-4b\n"
        )


def test_kleins_language_model_sees_no_references(tmp_path, capsys):
    Image.new("RGB", (64, 64)).save(tmp_path / "cat.png")
    words = ["generate", "make it red", "--upsample", "-m", "flux2-klein-4b", "--reference", str(tmp_path / "cat.png")]
    assert main(words) == 2
    assert capsys.readouterr().err == (
        "inkstream: flux2-klein-4b cannot upsample a prompt with references: leave upsample out, or take flux2-dev\n"
    )


def test_a_text_encoder_that_was_cut_says_what_it_lacks(tmp_path, make_folder):
    folder = make_folder(tmp_path / "flux2-klein", KLEIN_4B.tiny)
    (file,) = (folder / "text_encoder").glob("*.safetensors")
    kept = {name: w.clone() for name, w in read_state(file).items() if not name.startswith(("layers.3.", "norm."))}
    file.unlink()
    write_state(file, kept)
    model = inkstream.load(folder, inkstream.Machine("cpu", "fp32"))
    model.encode(Request(prompt="a cat", width=64, height=48))
    with pytest.raises(InputError, match=r"only a text encoder, .*layers\.3\..* leave upsample out"):
        list(model.upsample(Request(prompt="a cat", width=64, height=48, upsample=True)))
    (*_, last) = Engine(Machine("cpu")).submit(Request(prompt="a cat", model=str(folder), upsample=True))
    assert isinstance(last, Failed)
    assert last.kind == "input"


def test_every_known_flux_2_writes_prompts_out_and_dev_alone_sees_references():
    able = {name for name, spec in SPECS.items() if "upsample" in spec.abilities and not spec.writer}
    assert able == {name for name, spec in SPECS.items() if spec.family == "flux2"}
    assert {name for name in able if "upsample_references" in SPECS[name].abilities} == {"flux2-dev"}


def test_the_language_models_are_asked_with_the_published_system_messages():
    assert klein_task("a cat") == (
        f"<|im_start|>system\n{system_message('upsample')}<|im_end|>\n<|im_start|>user\na cat<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert dev_task("a [IMG]cat") == (
        f"<s>[SYSTEM_PROMPT]{system_message('upsample')}[/SYSTEM_PROMPT][INST]a cat[/INST]"
    )
    assert dev_task("make it red", (2, 3)) == (
        f"<s>[SYSTEM_PROMPT]{system_message('upsample_edit')}[/SYSTEM_PROMPT]"
        "[INST][IMG][IMG][IMG][IMG_BREAK][IMG][IMG][IMG][IMG_END][/INST][INST]make it red[/INST]"
    )


@pytest.mark.parametrize(
    ("size", "grid"), [((28, 28), (1, 1)), ((29, 28), (1, 2)), ((3080, 1540), (28, 55)), ((56, 100), (4, 2))]
)
def test_a_picture_is_seen_in_whole_cells(size, grid):
    assert size_seen(Image.new("RGB", size), 28) == grid


class Letters:
    """A tokenizer of three letters and an end."""

    def token_to_id(self, name: str) -> int | None:
        return {"</s>": 3}.get(name)

    def decode(self, ids: list[int]) -> str:
        return "".join("abc"[i] for i in ids)

    def encode(self, text: str, add_special_tokens: bool):
        return type("Encoding", (), {"ids": [0] * len(text)})


def sure_of(token: int) -> torch.Tensor:
    return torch.full((4,), -100.0).index_fill(0, torch.tensor(token), 100.0)


def test_writing_ends_at_the_models_end_or_at_the_limit():
    following = {0: 1, 1: 2, 2: 3}
    assert list(write(sure_of(0), lambda t: sure_of(following[t]), Letters(), ("</s>", "<x>"), 0)) == ["a", "ab", "abc"]
    assert list(write(sure_of(3), sure_of, Letters(), ("</s>",), 0)) == []
    assert len(list(write(sure_of(0), sure_of, Letters(), ("</s>",), 0))[-1]) == upsample.OUTPUT_TOKENS == 512


def test_a_prompt_too_long_for_the_language_model_is_refused_with_the_limit():
    with pytest.raises(InputError, match="take 2049 tokens, 2048 fit: shorten it"):
        read_task(Letters(), "x" * 2049)


def test_redux_draws_what_resembles_a_picture_without_a_prompt(tmp_path, make_folder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = make_folder(tmp_path / "flux1-redux", SPECS["flux1-redux-schnell"].tiny)
    Image.new("RGB", (96, 64), "red").save("house.png")
    words = ["generate", "-m", str(folder), "--reference", "house.png", "--seed", "3", *SMALL]
    assert main([*words, "-o", "one.png"]) == 0
    again = capsys.readouterr().err.split("again: ")[1]
    assert again.endswith(" --reference house.png\n")
    request = read_request("one.png").request
    assert (request.prompt, request.reference) == ("", ("house.png",))
    Image.new("RGB", (96, 64), "blue").save("house.png")
    assert main([*words, "-o", "two.png"]) == 0
    assert not np.array_equal(pixels("one.png"), pixels("two.png"))


def test_redux_is_downloaded_with_the_model_it_goes_with():
    from inkstream.engine.files.names import downloads

    wanted = downloads("flux1-redux-dev")
    assert list(wanted) == ["black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-Redux-dev"]
    assert {name.split("/")[0] for name in wanted["black-forest-labs/FLUX.1-Redux-dev"]} == {
        "image_encoder", "image_embedder",
    }  # fmt: skip
    assert list(downloads("flux1-dev")) == ["black-forest-labs/FLUX.1-dev"]
    assert not SPECS["flux1-redux-schnell"].commercial
