"""How a prompt becomes tokens and states: the template, the limit, tokenizers' files, and what is remembered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers

import inkstream
from inkstream.families.parts import PROMPT_TOKENS, chat_prompt, load_tokenizer, tokenize
from inkstream.types import InputError

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def tokenizer(tiny_folder) -> Tokenizer:
    return load_tokenizer(tiny_folder / "tokenizer")


@pytest.fixture(scope="module")
def family(tiny_folder):
    return inkstream.load(tiny_folder).family


@pytest.fixture
def vocabulary(tmp_path) -> Path:
    """The older form of a tokenizer: a byte alphabet, three merges, three added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "re", "red", "12"])}
    added = {str(len(vocab) + i): {"content": token, "special": True} for i, token in enumerate(SPECIALS)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nr e\nre d\n1 2\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    return tmp_path


# The template and the limit -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["a red cat", "", "写着“春”字", "two\nlines "])
def test_a_prompt_is_one_user_turn_that_awaits_its_answer(text):
    assert chat_prompt(text) == "<|im_start|>user\n" + text + "<|im_end|>\n<|im_start|>assistant\n"


def test_the_marks_of_the_template_are_one_token_each_and_nothing_is_put_around_it(tokenizer):
    start, end = tokenizer.token_to_id("<|im_start|>"), tokenizer.token_to_id("<|im_end|>")
    ids = tokenize(tokenizer, chat_prompt("cat"))
    assert [i for i in ids if i in (start, end)] == [start, end, start]
    assert ids[0] == start
    assert tokenizer.decode(ids, skip_special_tokens=False) == chat_prompt("cat")


def test_marks_inside_a_prompt_count_as_marks_as_they_do_upstream(tokenizer):
    assert tokenize(tokenizer, "a<|im_end|>b")[1] == tokenizer.token_to_id("<|im_end|>")


@pytest.mark.parametrize("words", [0, 1, 480, 481, 600])
def test_a_prompt_is_cut_at_512_tokens_its_template_included(tokenizer, words):
    whole = chat_prompt("x" * words)  # a token a letter
    template = len(tokenize(tokenizer, chat_prompt("")))
    ids = tokenize(tokenizer, whole)
    assert PROMPT_TOKENS == 512
    assert len(ids) == min(512, template + words)
    assert ids == tokenize(tokenizer, whole, limit=10_000)[:512]


def test_a_limit_in_the_tokenizers_own_file_is_not_ours(tiny_folder, tmp_path):
    theirs = Tokenizer.from_file(str(tiny_folder / "tokenizer" / "tokenizer.json"))
    theirs.enable_truncation(4)
    theirs.enable_padding(length=600)
    theirs.save(str(tmp_path / "tokenizer.json"))
    assert len(tokenize(load_tokenizer(tmp_path), "a red cat")) == 9


# Tokenizers' files ----------------------------------------------------------------------------------------------------


def test_a_tokenizer_is_read_from_its_vocabulary_and_merges_and_takes_digits_one_by_one(vocabulary):
    tokenizer = load_tokenizer(vocabulary)
    assert [tokenizer.id_to_token(i) for i in tokenize(tokenizer, "red r12<|im_end|>")] == [
        "red", "Ġ", "r", "1", "2", "<|im_end|>"
    ]  # fmt: skip
    assert tokenizer.token_to_id("<|im_start|>") == 260
    text = chat_prompt("写着 “春” it's 2024  \n\n ok")
    assert tokenizer.decode(tokenize(tokenizer, text), skip_special_tokens=False) == text


def test_letters_written_in_two_ways_are_the_same_tokens(vocabulary):
    tokenizer = load_tokenizer(vocabulary)
    ids = tokenize(tokenizer, "e\u0301")
    assert ids == tokenize(tokenizer, "\u00e9")
    assert tokenizer.decode(ids) == "\u00e9"


def test_added_tokens_out_of_their_place_are_named(vocabulary):
    (vocabulary / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"300": {"content": "<|im_start|>"}}})
    )
    with pytest.raises(InputError, match=r"gives <\|im_start\|> number 300"):
        load_tokenizer(vocabulary)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder: (folder / "merges.txt").unlink(), "holds no tokenizer.json"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "has no <|im_start|>"),
        (lambda folder: (folder / "vocab.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("no"), "cannot be read"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be read"),
    ],
    ids=["no merges", "no added tokens", "broken vocabulary", "broken config", "broken tokenizer"],
)
def test_a_spoilt_tokenizer_is_named_in_one_line(vocabulary, spoil, said):
    spoil(vocabulary)
    with pytest.raises(InputError) as caught:
        load_tokenizer(vocabulary)
    assert said in str(caught.value)
    assert str(vocabulary) in str(caught.value)
    assert "\n" not in str(caught.value)


# Memory ---------------------------------------------------------------------------------------------------------------


def test_the_same_tokens_are_encoded_once_and_others_anew(family):
    runs: list[int] = []
    hook = family.text_encoder.register_forward_hook(lambda module, args, out: runs.append(len(out)))
    first = family.encode("a red cat, remembered")
    assert family.encode("a red cat, remembered") is first
    assert len(runs) == 1
    other = family.encode("a red dog, remembered")
    assert len(runs) == 2
    assert not torch.equal(other.tokens, first.tokens)
    assert family.encode("a red cat, remembered") is first
    # Past the limit two prompts that begin alike are the same tokens.
    long = family.encode("x" * 600)
    assert family.encode("x" * 600 + " and more") is long
    assert len(runs) == 3
    hook.remove()


def test_what_is_remembered_is_what_the_encoder_says_and_belongs_to_one_model(family, tiny_folder):
    ids = family.tokens("a fish")
    kept = family.encode("a fish")
    assert torch.equal(kept.tokens, family.encode_tokens([ids]).tokens)
    assert kept.lengths == (len(ids),)
    assert inkstream.load(tiny_folder).family.encode("a fish") is not kept


def test_what_is_remembered_while_drawing_may_be_trained_on(family):
    with torch.inference_mode():
        kept = family.encode("met first while drawing")
    weight = torch.ones(kept.tokens.shape[-1], requires_grad=True)
    (kept.tokens * weight).sum().backward()
    assert weight.grad is not None


def test_several_prompts_in_one_pass_equal_each_alone(family):
    prompts = ["", "a red cat", "写着“春”字的红色海报", "a red cat"]
    packed = family.encode_tokens([family.tokens(prompt) for prompt in prompts])
    assert len(packed) == 4
    for i, prompt in enumerate(prompts):
        assert float((packed[i].tokens - family.encode(prompt).tokens).abs().max()) <= 1e-5
