"""transformers reads the saved tokenizer and gives the ids that ours gives, through the chat template."""

from __future__ import annotations

from random import Random

import pytest
from transformers import AutoTokenizer

from inkstream.families.parts import chat_prompt, load_tokenizer, tokenize
from inkstream.pocket.captions import caption
from inkstream.pocket.grammar import Grammar, sample
from inkstream.pocket.tokenizer import save_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    return folder


def prompts() -> list[str]:
    scenes = [sample(Grammar(), seed) for seed in range(100)]
    captions = [caption(scene, "dense", lang, Random(i)) for i, scene in enumerate(scenes) for lang in ("en", "zh")]
    return ["", "héllo 龘 🐶", 'two "quotes" and "more', "line\nend", " spaces  inside ", *captions]


def test_the_saved_folder_gives_the_same_ids_through_the_chat_template(folder):
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    for prompt in prompts():
        messages = [{"role": "user", "content": prompt}]
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=True)
        assert text == chat_prompt(prompt)
        assert theirs(text)["input_ids"] == tokenize(ours, chat_prompt(prompt))
        whole = theirs.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, enable_thinking=True, return_dict=False
        )
        assert whole == tokenize(ours, chat_prompt(prompt))


def test_padding_is_the_first_token_as_the_pipeline_asks_for_it(folder):
    theirs = AutoTokenizer.from_pretrained(folder)
    batch = theirs([chat_prompt("a red circle"), chat_prompt("")], padding="max_length", max_length=64, truncation=True)
    kept = [sum(mask) for mask in batch["attention_mask"]]
    assert kept == [11, 8]
    assert set(batch["input_ids"][0][11:]) == {0}
    assert batch["input_ids"][0][:11] == tokenize(load_tokenizer(folder), chat_prompt("a red circle"))


def test_without_thinking_the_template_closes_the_thought(folder):
    theirs = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "a"}]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert text == chat_prompt("a") + "<think>\n\n</think>\n\n"
