"""Prompts as templates: choices in braces and files of wildcards, written out by the seed."""

from __future__ import annotations

import random
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inkstream.cli import main
from inkstream.engine.drawing.templates import filled, is_template
from inkstream.engine.engine import Engine
from inkstream.engine.pictures.metadata import describe, read_request
from inkstream.types import Done, Failed, InputError, Machine, Request, Step


@pytest.fixture
def folder(tmp_path) -> Path:
    place = tmp_path / "wildcards"
    (place / "animals").mkdir(parents=True)
    (place / "colour.txt").write_text("# three\nred\n\n  green  \n__deep/blue__\n", "utf-8")
    (place / "deep").mkdir()
    (place / "deep" / "blue.txt").write_text("{navy|cobalt}\n", "utf-8")
    (place / "weighted.txt").write_text("9::often\n1::seldom\n", "utf-8")
    (place / "endless.txt").write_text("x __endless__\n", "utf-8")
    (place / "empty.txt").write_text("# nothing\n\n", "utf-8")
    (place / "latin.txt").write_bytes(b"caf\xe9\n")
    (place / "动物.txt").write_text("猫\n", "utf-8")
    (tmp_path / "secret.txt").write_text("secret\n")
    return place


def write(prompt: str, folder: Path, seed: int = 0, **fields) -> str:
    return filled(Request(prompt=prompt, seed=seed, **fields), folder).prompt


def spread(prompt: str, folder: Path, count: int = 400) -> Counter:
    return Counter(write(prompt, folder, seed) for seed in range(count))


def test_the_seed_chooses_and_the_same_seed_chooses_the_same(folder):
    found = spread("a {red|green|blue} fox", folder)
    assert set(found) == {"a red fox", "a green fox", "a blue fox"}
    assert all(100 < count < 170 for count in found.values())
    assert [write("a {red|green|blue} fox", folder, seed) for seed in range(6)] == [
        write("a {red|green|blue} fox", folder, seed) for seed in range(6)
    ]


def test_choices_nest_may_be_empty_and_have_weights(folder):
    assert set(spread("{a {big|small} cat|no cat}", folder)) == {"a big cat", "a small cat", "no cat"}
    assert set(spread("a {|very }big cat", folder)) == {"a big cat", "a very big cat"}
    found = spread("{9::often|seldom}", folder)
    assert 330 < found["often"] < 390
    assert set(spread("{0::never|0.5::always}", folder)) == {"always"}
    assert write("{0::one}|{0::a|0::b}", folder) == "{0::one}|a"


def test_a_number_before_the_choices_takes_as_many_of_them(folder):
    found = spread("{2$$a|b|c}", folder)
    assert set(found) == {f"{one}, {other}" for one in "abc" for other in "abc" if one != other}
    assert set(spread("{2$$ and $$a|b}", folder)) == {"a and b", "b and a"}
    assert {len(text.split(", ")) for text in spread("{1-3$$a|b|c}", folder)} == {1, 2, 3}
    assert {len(text.split(",")) for text in spread("{-2$$a|b|c}", folder)} == {1, 2}
    assert "" in spread("{-2$$a|b|c}", folder)
    assert set(spread("{9$$a|b}", folder)) == {"a, b", "b, a"}
    assert set(spread("{2$$__colour__}", folder)) > {"red, green", "green, navy"}
    assert len(set(write("{3$$__colour__}", folder).split(", "))) == 3


def test_a_wildcard_is_a_line_of_its_file(folder):
    assert set(spread("a __colour__ fox", folder)) == {f"a {c} fox" for c in ("red", "green", "navy", "cobalt")}
    assert write("__动物__", folder) == "猫"
    found = spread("__weighted__", folder)
    assert 330 < found["often"] < 390
    assert set(spread("{__deep/blue__|white}", folder)) == {"navy", "cobalt", "white"}


def test_the_negative_prompt_is_a_template_too(folder):
    one = filled(Request(prompt="a {b|b}", negative_prompt="{blur|blur}, __deep/blue__", seed=3), folder)
    assert one.prompt == "a b"
    assert one.negative_prompt in ("blur, navy", "blur, cobalt")


@pytest.mark.parametrize(
    "prompt",
    ["a fox", "a {red} fox", "{}", "a | b", "{ {a} }", '{"scene": "a|b", "x": {"y": "__a__"}}', ' \n{ "a": "b|c" }',
     "____", "a__b", "__ x__", "(red:1.2) [a|b]", "{{{", "}|{", "$$", "{a$$b}"],
)  # fmt: skip
def test_a_prompt_without_choices_stays_as_it_is(prompt, folder):
    assert not is_template(prompt)
    assert write(prompt, folder) == prompt


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("__color__", "wildcard __color__ is not known: did you mean colour?"),
        ("__zzz__", "wildcard __zzz__ is not known: put zzz.txt into the folder of --wildcards"),
        ("__a/../../secret__", "is not known"),
        ("__colour/../colour__", "is not known"),
        ("__endless__", "do not end within 1000 parts"),
        ("__empty__", "wildcard __empty__ has no lines: write one choice a line"),
        ("__latin__", "wildcard __latin__ is not UTF-8 text"),
        ("{x|__zzz__}" * 50, "is not known"),
    ],
)
def test_a_template_that_cannot_be_written_out_is_told_in_one_line_without_a_path(prompt, said, folder):
    with pytest.raises(InputError, match=said) as caught:
        write(prompt, folder)
    assert "\n" not in str(caught.value)
    assert str(folder) not in str(caught.value)


@given(st.text(st.sampled_from('ab{}|_$:-1./ \n"')), st.integers(0, 9))
def test_what_is_written_out_is_no_template_any_more(prompt, seed):
    with suppress(InputError):
        text = write(prompt, Path("no-such-folder"), seed)
        assert not is_template(text)
        assert write(text, Path("no-such-folder"), seed) == text


def test_hostile_templates_end_soon(folder):
    for prompt in ("{a|b}" * 900, "{" * 30_000, "{a|" * 10_000 + "}" * 10_000, "__" * 15_000, "__a-" * 8_000,
                   "{999$$" + "a|" * 14_000 + "}", "{1-999$$" + "__colour__|" * 2000 + "}"):  # fmt: skip
        with suppress(InputError):
            write(prompt, folder)


def test_each_picture_has_its_own_prompt_and_is_drawn_again_without_the_files(folder, tmp_path):
    wish = {"width": 32, "height": 32, "steps": 1, "upsample": False}
    request = Request(prompt="a __colour__ {circle|square}", seed=4, count=3, **wish)
    engine = Engine(Machine("cpu", wildcards=str(folder)))
    events = list(engine.submit(request))
    done = [event for event in events if isinstance(event, Done)]
    assert [(event.index, event.count) for event in done] == [(0, 3), (1, 3), (2, 3)]
    assert [(event.index, event.count) for event in events if isinstance(event, Step)] == [(0, 3), (1, 3), (2, 3)]
    assert [event.request.seed for event in done] == [4, 5, 6]
    assert [event.request.prompt for event in done] == [write(request.prompt, folder, seed) for seed in (4, 5, 6)]
    elsewhere = Engine(Machine("cpu", wildcards=str(tmp_path / "nothing")))
    (again,) = elsewhere.generate(done[1].request).images
    assert again.tobytes() == done[1].image.tobytes()
    failed = list(elsewhere.submit(request))[-1]
    assert isinstance(failed, Failed)
    assert failed.kind == "input"


def test_the_picture_holds_the_prompt_and_its_template(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["a {red|blue} __deep/blue__ fox", "--seed=1", "-W=32", "-H=32", "--steps=1", f"--wildcards={folder}"]
    assert main(["generate", *words, "-o", "fox.png"]) == 0
    told = capsys.readouterr().err
    request = read_request("fox.png").request
    assert request.prompt == write(words[0], folder, 1)
    assert describe("fox.png")["template"] == words[0]
    assert f"prompt: {describe('fox.png')['told']}" in told
    assert main(["generate", "--from", "fox.png", "-o", "again.png"]) == 0
    assert describe("again.png")["request"] == describe("fox.png")["request"]


def test_the_command_line_tells_of_a_missing_wildcard_before_anything_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "a __nothing__", f"--wildcards={tmp_path}", "-m", "z-image-turbo"]) == 2
    assert "wildcard __nothing__ is not known" in capsys.readouterr().err


def test_the_choices_are_the_same_in_every_version_of_python():
    assert [random.Random(seed).random() for seed in (0, 1, 2**62)] == pytest.approx(
        [0.8444218515250481, 0.13436424411240122, 0.21122940420330605]
    )
