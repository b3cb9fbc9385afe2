"""Captions: what a style promises to state is in the words, in both languages, however they vary."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inkstream.pocket.captions import NUMBERS, STATES, WORDS, Wording, caption, draw_caption
from inkstream.pocket.colours import COLOURS
from inkstream.pocket.grammar import Grammar, sample
from inkstream.pocket.scenes import KINDS, Background, Scene, Thing, Writing
from inkstream.pocket.vocabulary import CHINESE_COLOURS, CHINESE_EMOJI, EMOJI, SHAPES, plural, with_article

GRAMMAR = Grammar()
WHITE = Background("flat", ("white",))
SQUARE = Thing("square", "red", "medium", 0.5, 0.5, 0.25)
CHINESE_PLACES = {
    "top left": ["左上角"], "top": ["上方"], "top right": ["右上角"], "left": ["左侧"], "center": ["中间"],
    "right": ["右侧"], "bottom left": ["左下角"], "bottom": ["下方"], "bottom right": ["右下角"],
}  # fmt: skip

scenes = st.builds(lambda seed, kind: sample(GRAMMAR, seed, "any", kind), st.integers(0, 2**31), st.sampled_from(KINDS))
styles = st.sampled_from(sorted(STATES))
generators = st.one_of(st.none(), st.integers(0, 2**31).map(Random))


def outside_quotes(text: str) -> str:
    """A caption without what is to be written."""
    return "".join(part for i, part in enumerate(text.replace("“", '"').replace("”", '"').split('"')) if i % 2 == 0)


def english_facts(scene: Scene, style: str) -> list[list[str]]:
    """Each fact that the words must state, as the wordings of which one must be there."""
    facts = [[c] for c in scene.background.colours] if "background" in STATES[style] else []
    for thing in scene.things[: 1 if scene.kind == "count" else None]:
        noun = with_article(thing.name).removeprefix("an ").removeprefix("a ")
        name = plural(thing.name) if scene.kind == "count" else noun
        facts.append([f"{thing.colour} {name}" if thing.colour else name])
        if "size" in STATES[style] and thing.size != "medium":
            facts.append([f"{thing.size} {facts[-1][0]}"])
        if "place" in STATES[style] and scene.kind not in ("count", "relation"):
            facts.append([thing.place, "middle"] if thing.place == "center" else [thing.place])
    if scene.kind == "count":
        facts.append([NUMBERS[len(scene.things)], str(len(scene.things))])
    if scene.relation:
        facts.append([scene.relation])
    for writing in scene.writings:
        facts += [[writing.colour]] if "writing colour" in STATES[style] else []
        facts += [[writing.place]] if "writing place" in STATES[style] else []
    return facts


def chinese_facts(scene: Scene, style: str) -> list[list[str]]:
    facts = [[CHINESE_COLOURS[c]] for c in scene.background.colours] if "background" in STATES[style] else []
    for thing in scene.things[: 1 if scene.kind == "count" else None]:
        name = CHINESE_COLOURS[thing.colour] + SHAPES[thing.name] if thing.colour else CHINESE_EMOJI[thing.name]
        facts.append([name])
        if "size" in STATES[style] and thing.size != "medium":
            facts.append(["小的" if thing.size == "small" else "大的"])
        if "place" in STATES[style] and scene.kind not in ("count", "relation"):
            facts.append(CHINESE_PLACES[thing.place])
    if scene.kind == "count":
        facts.append([" 一两三四五"[len(scene.things)], str(len(scene.things))])
    if scene.relation:
        facts.append([{"left of": "左边", "right of": "右边", "above": "上面", "below": "下面"}[scene.relation]])
    for writing in scene.writings:
        facts += [[CHINESE_COLOURS[writing.colour]]] if "writing colour" in STATES[style] else []
        facts += [[{"top": "上方", "middle": "中间", "bottom": "下方"}[writing.place]]] if style == "dense" else []
    return facts


def unstated(text: str, facts: list[list[str]]) -> list[list[str]]:
    return [wordings for wordings in facts if not any(wording in text.lower() for wording in wordings)]


@settings(max_examples=300, deadline=None)
@given(scenes, styles, generators)
def test_english_states_all_that_its_style_promises(scene, style, rng):
    text = caption(scene, style, "en", rng)
    assert unstated(text, english_facts(scene, style)) == []


@settings(max_examples=300, deadline=None)
@given(scenes, styles, generators)
def test_chinese_states_all_that_its_style_promises(scene, style, rng):
    text = caption(scene, style, "zh", rng)
    assert unstated(text, chinese_facts(scene, style)) == []


@settings(max_examples=200, deadline=None)
@given(scenes, styles, st.sampled_from(["en", "zh"]), generators)
def test_what_is_to_be_written_stands_in_quotes_as_it_is(scene, style, language, rng):
    text = caption(scene, style, language, rng)
    for writing in scene.writings:
        pairs = [('"', '"'), ("“", "”"), ("「", "」")]
        assert any(f"{left}{writing.text}{right}" in text for left, right in pairs)
    assert bool(scene.writings) == any(mark in text for mark in '"“”「」')
    assert text == text.strip()
    assert "  " not in text


@settings(max_examples=200, deadline=None)
@given(scenes, styles, generators)
def test_english_captions_use_only_the_words_that_are_listed(scene, style, rng):
    names = [*SHAPES, *EMOJI]
    known = {word for name in (*names, *map(plural, names), *map(with_article, names)) for word in name.split()}
    known |= {*WORDS, *COLOURS, "2", "3", "4", "5"}
    said = outside_quotes(caption(scene, style, "en", rng)).lower().replace(",", " ").replace(".", " ").split()
    assert set(said) <= known


@settings(max_examples=100, deadline=None)
@given(scenes, styles, generators)
def test_chinese_captions_hold_no_english_outside_quotes(scene, style, rng):
    text = caption(scene, style, "zh", rng)
    for writing in scene.writings:
        text = text.replace(writing.text, "")
    assert not any(char.isascii() and char.isalpha() for char in text)


def test_the_plain_wording_is_always_the_same():
    scene = Scene("things", WHITE, (replace(SQUARE, size="large"), Thing("dog", None, "medium", 0.2, 0.2, 0.25)))
    assert caption(scene) == "a large red square in the center, a dog at the top left, on a white background"
    assert caption(scene, "short") == "a red square and a dog"
    assert caption(scene, "tags") == "red square center, dog top left, white background"
    assert caption(scene, language="zh") == "中间一个大的红色正方形，左上角一只狗，白色背景"


def test_counts_relations_and_text_have_their_wordings():
    ground = Background("gradient", ("red", "blue"), True)
    assert caption(Scene("count", ground, (SQUARE,) * 3), "tags") == (
        "three red squares, gradient from red left to blue right"
    )
    pair = Scene("relation", WHITE, (SQUARE, replace(SQUARE, name="oval", colour="orange")), relation="left of")
    assert caption(pair) == "a red square to the left of an orange oval, on a white background"
    assert caption(pair, language="zh") == "一个红色正方形在一个橙色椭圆的左边，白色背景"
    poster = Scene("text", Background("split", ("red", "blue")), (), (Writing("OK", "sans", "white", 0.5, 0.9, 0.2),))
    assert caption(poster) == (
        'the word "OK" in thin white letters at the bottom, on a split background, red top and blue bottom'
    )
    assert caption(poster, language="zh") == "下方写着白色细体的“OK”，背景上半红色下半蓝色"


@pytest.mark.parametrize(
    ("name", "said"),
    [("grapes", "large grapes"), ("dice", "a large die"), ("tennis", "a large tennis ball"), ("owl", "a large owl")],
)
def test_nouns_without_a_plain_singular_keep_theirs_behind_an_adjective(name, said):
    scene = Scene("emoji", WHITE, (Thing(name, None, "large", 0.5, 0.5, 0.4),))
    assert caption(scene).split(" in the ")[0] == said


@pytest.mark.parametrize(
    ("one", "many"),
    [("circle", "circles"), ("cross", "crosses"), ("butterfly", "butterflies"), ("mouse", "mice"), ("key", "keys"),
     ("sheep", "sheep"), ("leaf", "leaves"), ("tennis", "tennis balls")],
)  # fmt: skip
def test_plurals(one, many):
    assert plural(one) == many


def test_a_recipes_shares_decide_which_captions_are_drawn():
    scene = Scene("things", WHITE, (SQUARE,))
    rng = Random(0)
    drawn = [draw_caption(scene, Wording(dense=0, short=1, tags=0, english=1, plain=1), rng) for _ in range(20)]
    assert set(drawn) == {"a red square"}
    mixed = {draw_caption(scene, Wording(), rng) for _ in range(200)}
    assert len(mixed) > 10
    share = sum(text.isascii() for text in (draw_caption(scene, Wording(), rng) for _ in range(1000))) / 1000
    assert share == pytest.approx(0.6, abs=0.06)
