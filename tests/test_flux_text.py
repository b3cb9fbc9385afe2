"""FLUX's prompts without a reference: templates, padding that sees the text alone, system messages kept to the byte."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from inkstream.families.flux1.text import CLIP, T5, load_t5_tokenizer
from inkstream.families.flux2 import text
from inkstream.families.flux2.text import (
    DEV_TEXT_ENCODER,
    KLEIN_PAD,
    KLEIN_TEXT_ENCODER,
    PROMPT_TOKENS,
    depths,
    dev_prompt,
    dev_tokens,
    encode_klein,
    klein_prompt,
    klein_tokens,
    load_mistral_tokenizer,
    pad_id,
    system_message,
)
from inkstream.nn.config import CLIPTextConfig, MistralConfig, Qwen3Config, T5Config, read_config
from inkstream.nn.qwen3 import Qwen3, attend_padded
from inkstream.types import InputError

TINY = Qwen3Config(
    vocab_size=300, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=64,
)  # fmt: skip
PAD = 299


def encoder(config: Qwen3Config = TINY) -> Qwen3:
    model = KLEIN_TEXT_ENCODER.build(config).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        weight.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2, generator=generator)
    return model


def byte_tokenizer(*specials: str) -> Tokenizer:
    """One token a byte, and the specials after them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens(list(specials))
    return tokenizer


def prompt_of(length: int) -> list[int]:
    return torch.randint(290, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max())


# klein ----------------------------------------------------------------------------------------------------------------


def test_the_states_at_a_quarter_half_and_three_quarters_are_read():
    assert depths(Qwen3Config()) == (9, 18, 27)
    assert depths(replace(Qwen3Config(), hidden_size=4096, intermediate_size=12_288)) == (9, 18, 27)
    assert depths(MistralConfig()) == (10, 20, 30)
    assert (Qwen3Config().joined_size, MistralConfig().joined_size) == (7680, 15_360)


def test_klein_is_asked_for_an_answer_whose_thinking_is_done_and_empty():
    assert klein_prompt("a red cat") == (
        "<|im_start|>user\na red cat<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_a_long_prompt_is_cut_at_512_tokens_and_an_empty_one_still_has_512_states():
    tokenizer = byte_tokenizer("<|im_start|>", "<|im_end|>", KLEIN_PAD, "<think>", "</think>")
    long, empty = klein_tokens(tokenizer, "tale " * 200), klein_tokens(tokenizer, "")
    assert len(long) == PROMPT_TOKENS
    assert len(empty) == 2 + len("user\n") + 1 + len("\nassistant\n") + 2 + len("\n\n\n\n")
    cond = encode_klein(encoder(), [long, empty], pad_id(tokenizer, KLEIN_PAD))
    assert cond.lengths == (512, 512)
    assert cond.tokens.shape == (1024, 3 * 32)
    assert cond.tokens.isfinite().all()


def test_padding_changes_nothing_of_the_text_and_prompts_nothing_of_each_other():
    model, prompts = encoder(), [prompt_of(length) for length in (1, 40, 512, 7)]
    together = encode_klein(model, prompts, PAD)
    for index, ids in enumerate(prompts):
        alone = encode_klein(model, [ids], PAD).tokens
        assert apart(together[index].tokens, alone) <= 1e-5
        assert apart(alone[: len(ids)], model(torch.tensor(ids), [len(ids)])) <= 1e-5


def test_states_at_padding_depend_on_the_text_and_on_their_place():
    model = encoder()
    one, other = (encode_klein(model, [prompt_of(length)], PAD).tokens[60:] for length in (40, 41))
    assert apart(one, other) > 0.01
    assert apart(one[:-1], one[1:]) > 0.001


def test_padding_attends_to_the_whole_text_alike_and_to_no_padding():
    q = torch.zeros(9, 2, 4)  # every key weighs the same
    k, v = torch.randn(9, 1, 4), torch.randn(9, 1, 4)
    out = attend_padded(q, k, v, lengths=[6, 3], texts=[4, 3])
    for position in range(4):
        assert apart(out[position], v[: position + 1].mean(0).expand(2, 4)) <= 1e-6
    for position in (4, 5):
        assert apart(out[position], v[:4].mean(0).expand(2, 4)) <= 1e-6
    assert apart(out[8], v[6:].mean(0).expand(2, 4)) <= 1e-6


def test_a_whole_text_encoder_is_what_is_built_what_is_unread_and_nothing_else():
    with torch.device("meta"):
        whole = Qwen3(TINY, (TINY.num_hidden_layers,)).state_dict()
    built, neutral = encoder().state_dict(), KLEIN_TEXT_ENCODER.neutral(TINY)
    assert built.keys() | neutral.keys() == whole.keys() | {"norm.weight"}
    assert not built.keys() & neutral.keys()
    unread = tuple(KLEIN_TEXT_ENCODER.unread(TINY))
    assert all(name.startswith(unread) for name in neutral)
    assert not any(name.startswith(unread) for name in built)
    shapes = {name: tuple(weight.shape) for name, weight in {**built, **neutral}.items()}
    assert KLEIN_TEXT_ENCODER.infer(shapes) == TINY


def test_layers_that_are_added_to_make_a_file_whole_change_nothing():
    model = Qwen3(TINY, (*depths(TINY), TINY.num_hidden_layers)).eval().requires_grad_(False)
    neutral = {key: weight for key, weight in KLEIN_TEXT_ENCODER.neutral(TINY).items() if key != "norm.weight"}
    model.load_state_dict({**encoder().state_dict(), **neutral})
    *_, last, after = model(torch.tensor(prompt_of(9)), [9]).chunk(4, dim=-1)
    assert torch.equal(last, after)


# dev ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "characters", "lines"), [("system", 168, 2), ("upsample", 770, 8),
                                                           ("upsample_edit", 623, 12)])  # fmt: skip
def test_each_system_message_is_there_to_the_byte(name, characters, lines):
    message = system_message(name)
    assert len(message) == characters
    assert len(message.split("\n")) == lines
    assert message == message.strip()


def test_a_system_message_that_was_changed_is_refused(monkeypatch):
    monkeypatch.setitem(text._SHA256, "system", "0" * 64)
    with pytest.raises(InputError, match=r"system\.txt differs from the published file: install inkstream again"):
        system_message("system")


def test_dev_is_asked_in_mistrals_template_without_marks_of_pictures():
    assert dev_prompt("a [IMG]cat", "Be brief.") == ("<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]a cat[/INST]")


MISTRALS = ("<s>", "<pad>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]")


def test_mistrals_tokenizer_reads_the_template_as_marks_and_cuts_at_the_end(tmp_path):
    byte_tokenizer(*MISTRALS).save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_mistral_tokenizer(tmp_path)
    ids = dev_tokens(tokenizer, "a cat")
    assert len(ids) == 5 + len(system_message("system")) + len("a cat")
    assert [ids[0], ids[1], ids[-1]] == [tokenizer.token_to_id(mark) for mark in ("<s>", "[SYSTEM_PROMPT]", "[/INST]")]
    long = dev_tokens(tokenizer, "tale " * 200)
    assert len(long) == PROMPT_TOKENS
    assert long[: len(ids) - 6] == ids[:-6]
    assert ids[-1] not in long


def test_a_tokenizer_that_is_missing_broken_or_anothers_is_named(tmp_path):
    with pytest.raises(InputError, match=r"holds no tokenizer\.json"):
        load_mistral_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json cannot be read"):
        load_mistral_tokenizer(tmp_path)
    byte_tokenizer("<s>", "<pad>").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=r"no \[SYSTEM_PROMPT\]: take the one published"):
        load_mistral_tokenizer(tmp_path)


def test_the_sizes_of_a_model_that_also_sees_are_those_of_its_language_model():
    language = {"hidden_size": 64, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}
    config = {"model_type": "mistral3", "text_config": language, "vision_config": {"hidden_size": 8}}
    assert read_config(MistralConfig, json.loads(json.dumps(config))) == MistralConfig(hidden_size=64, rope_theta=5.0)


# transformers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("part", "config"), [(CLIP, CLIPTextConfig()), (T5, T5Config()),
                                              (DEV_TEXT_ENCODER, MistralConfig())])  # fmt: skip
def test_without_transformers_the_error_says_what_to_install(part, config, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"transformers, which is not installed: pip install 'inkstream\[flux\]'"):
        part.build(config)


def test_without_transformers_a_tokenizer_is_not_read_either(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="not installed"):
        load_t5_tokenizer(tmp_path)


def test_weights_are_counted_without_building_them():
    from inkstream.engine.machine.memory import count_weights
    from inkstream.families import SPECS, parts_of

    for name in ("flux1-redux-dev", "flux2-dev", "flux2-klein-4b"):
        tiny = SPECS[name].tiny
        counted = count_weights(tiny)
        for part, found in parts_of(tiny).items():
            with torch.device("meta"):
                built = found.build(getattr(tiny, part))
            assert counted[part] == sum(weight.numel() for weight in built.parameters()), (name, part)
    assert count_weights(SPECS["flux1-dev"])["text_encoder_2"] == 4_762_310_656
    assert count_weights(SPECS["flux1-dev"])["text_encoder"] == 123_060_480
