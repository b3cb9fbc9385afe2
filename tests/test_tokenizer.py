"""Pocket's tokenizer: spelling is visible where text is to be written, and captions stay short."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from inkstream.families.parts import chat_prompt, load_tokenizer, tokenize
from inkstream.pocket.captions import STATES, caption
from inkstream.pocket.colours import COLOURS
from inkstream.pocket.grammar import Grammar, sample
from inkstream.pocket.tokenizer import SPECIAL, build_tokenizer, english_words, save_tokenizer, vocabulary
from inkstream.pocket.vocabulary import CHINESE, CHINESE_EMOJI, EMOJI, ENGLISH, HANZI, LATIN, SHAPES

PAIRS = ['""', "“”", "「」"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return build_tokenizer()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    """The text of each token."""
    return [tokenizer.decode([number], skip_special_tokens=False) for number in tokenize(tokenizer, text)]


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("text", ["HELLO", "the red circle", "Big Sale 2", "红色圆形", "生日快乐", "a"])
def test_between_quotes_every_glyph_is_a_token(tokenizer, pair, text):
    got = pieces(tokenizer, f"red {pair[0]}{text}{pair[1]} red")
    assert got == ["red", " ", pair[0], *text, pair[1], " red"]


def test_everything_that_scenes_write_is_one_token_a_glyph(tokenizer):
    for text in (*ENGLISH, *CHINESE, "".join(HANZI), LATIN):
        assert len(tokenize(tokenizer, f'"{text}"')) == len(text) + 2


def test_quotes_end_where_they_close(tokenizer):
    got = pieces(tokenizer, 'the word "RED" in red, "OK" at the top')
    assert got == [
        "the", " word", " ", '"', *"RED", '"', " in", " red", ",", " ", '"', *"OK", '"', " at", " the", " top",
    ]  # fmt: skip


def test_outside_quotes_every_word_of_a_caption_is_one_token(tokenizer):
    for word in english_words():
        for form in (word, word.capitalize(), f" {word}"):
            assert len(tokenize(tokenizer, form)) == 1, form
    for word in (*SHAPES.values(), *CHINESE_EMOJI.values()):
        assert len(tokenize(tokenizer, word)) == 1, word
    for name in (*COLOURS, *SHAPES, *EMOJI):
        assert len(tokenize(tokenizer, f" {name}")) == 1, name


def test_other_words_are_spelt_out(tokenizer):
    assert pieces(tokenizer, "a lighthouse") == ["a", " ", *"lighthouse"]
    assert pieces(tokenizer, "REDS") == [*"REDS"]
    assert pieces(tokenizer, "redness") == [*"redness"]


@pytest.mark.parametrize(("glyph", "count"), [("é", 2), ("龘", 3), ("𠀀", 4), ("🐶", 4), ("Ω", 2)])
def test_a_glyph_that_is_not_listed_is_its_bytes(tokenizer, glyph, count):
    ids = tokenize(tokenizer, f'"{glyph}"')
    assert len(ids) == 2 + count
    assert tokenizer.decode(ids) == f'"{glyph}"'


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\x00")))
def test_any_text_comes_back_from_its_tokens(text):
    tokenizer = build_tokenizer()
    whole = tokenizer.normalizer.normalize_str(text)
    assert tokenizer.decode(tokenize(tokenizer, text), skip_special_tokens=False) == whole


def test_no_caption_of_two_thousand_scenes_has_more_than_64_tokens_with_its_template(tokenizer):
    longest = 0
    for seed in range(2000):
        scene, rng = sample(Grammar(), seed), Random(seed)
        style, language = sorted(STATES)[seed % 3], ("en", "zh")[seed // 3 % 2]
        for generator in (None, rng):
            prompt = chat_prompt(caption(scene, style, language, generator))
            ids = tokenize(tokenizer, prompt)
            longest = max(longest, len(ids))
            assert len(ids) <= 64, prompt
    assert longest > 32


def test_the_template_costs_a_token_for_each_of_its_parts(tokenizer):
    got = pieces(tokenizer, chat_prompt("a red circle"))
    assert got == [
        "<|im_start|>", "user", "\n", "a", " red", " circle", "<|im_end|>", "\n", "<|im_start|>", "assistant", "\n",
    ]  # fmt: skip


def test_numbers_of_tokens_are_without_gaps_and_specials_come_first(tokenizer):
    numbers = vocabulary()
    assert list(numbers.values()) == list(range(len(numbers)))
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == list(range(len(SPECIAL)))
    assert tokenizer.get_vocab_size() == len(numbers)


def test_our_loader_reads_the_saved_files_and_gives_the_same_ids(tokenizer, saved):
    loaded = load_tokenizer(saved)
    assert loaded.get_vocab_size() == tokenizer.get_vocab_size()
    for seed in range(200):
        for language in ("en", "zh"):
            prompt = chat_prompt(caption(sample(Grammar(), seed), "dense", language, Random(seed)))
            assert tokenize(loaded, prompt) == tokenize(tokenizer, prompt)
