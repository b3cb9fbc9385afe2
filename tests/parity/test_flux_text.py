"""FLUX's prompt encodings against diffusers' own pipelines, on random tiny encoders loaded through our key tables."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from diffusers import Flux2KleinPipeline, Flux2Pipeline, FluxPipeline
from diffusers.pipelines.flux2 import pipeline_flux2
from tokenizers import Tokenizer, models, pre_tokenizers

from inkstream.families import Part
from inkstream.families.flux1.text import (
    CLIP,
    T5,
    clip_tokens,
    encode_clip,
    encode_t5,
    load_clip_tokenizer,
    load_t5_tokenizer,
    t5_tokens,
)
from inkstream.families.flux2.text import (
    DEV_PAD,
    DEV_TEXT_ENCODER,
    KLEIN_PAD,
    KLEIN_TEXT_ENCODER,
    dev_tokens,
    encode_dev,
    encode_klein,
    klein_tokens,
    load_mistral_tokenizer,
    pad_id,
    system_message,
)
from inkstream.families.parts import load_tokenizer
from inkstream.nn.config import read_config
from inkstream.types import InputError
from inkstream.weights.keymap import translate
from rounding import agree, roundings

PROMPTS = [
    "", "a red cat", "  two  spaces\nand a line\n", "写着“春”字的红色海报", "[IMG] <|im_end|> 🐈", "a long tale " * 90,
]  # fmt: skip

KLEIN_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
MISTRAL_TEMPLATE = (
    "{{- bos_token }}{%- for message in messages %}{%- set text = message.content[0].text %}"
    "{%- if message.role == 'system' %}{{- '[SYSTEM_PROMPT]' + text + '[/SYSTEM_PROMPT]' }}"
    "{%- else %}{{- '[INST]' + text + '[/INST]' }}{%- endif %}{%- endfor %}"
)
"""What the published templates do with what they are given here."""


def byte_tokenizer(*specials: str) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*alphabet, *specials])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.add_special_tokens(list(specials))
    return tokenizer


def randomised(model):
    torch.manual_seed(0)
    model = model.eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.normal_(mean=1.0 if "norm" in name and weight.ndim == 1 else 0.0, std=0.2)
    return model


def read_of(part: Part, config, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights in our names, by the layout that names every one of them."""
    with torch.device("meta"):
        expected = part.build(config).state_dict().keys()
    unread = tuple(part.unread(config))
    for rules in part.layouts.values():
        read = translate(rules, state)
        if expected <= read.keys() and all(name in expected or name.startswith(unread) for name in read):
            return read
    raise AssertionError(f"no layout names all of {list(state)}")


def ours_of(part: Part, theirs, state: dict[str, torch.Tensor] | None = None):
    """Ours at their config, built without weights as `load` does it, with those of theirs that it has a place for."""
    config = read_config(part.config, theirs.config.to_dict())
    read = read_of(part, config, theirs.state_dict() if state is None else state)
    with torch.device("meta"):
        ours = part.build(config)
    ours.load_state_dict({name: read[name].clone() for name in ours.state_dict()}, assign=True)
    assert not any(buffer.is_meta for buffer in ours.buffers())
    return ours.eval().requires_grad_(False)


# klein ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen3():
    return randomised(
        transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(
                vocab_size=300, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                head_dim=16, intermediate_size=64, max_position_embeddings=1024,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6},
            )
        )
    )  # fmt: skip


@pytest.mark.parametrize("lengths", [(1,), (511,), (512,), (3, 512, 200)], ids=str)
def test_states_of_padded_prompts_equal_transformers_at_the_padding_too(qwen3, lengths):
    prompts = [torch.randint(290, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in lengths]
    got = encode_klein(ours_of(KLEIN_TEXT_ENCODER, qwen3), prompts, pad=299).tokens.unflatten(0, (len(prompts), 512))
    ids = torch.tensor([[*ids, *[299] * (512 - len(ids))] for ids in prompts])
    mask = (torch.arange(512) < torch.tensor(lengths)[:, None]).long()
    states = qwen3.model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    expected = torch.cat([states[depth] for depth in (1, 2, 3)], dim=-1)
    assert expected.std() > 0.3
    agree(got, expected, roundings(qwen3.model))


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_becomes_what_the_klein_pipeline_makes_of_it(qwen3, prompt, tmp_path):
    plain = byte_tokenizer("<|im_start|>", "<|im_end|>", KLEIN_PAD, "<think>", "</think>")
    plain.save(str(tmp_path / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token=KLEIN_PAD, padding_side="right", chat_template=KLEIN_TEMPLATE
    )
    expected = Flux2KleinPipeline._get_qwen3_prompt_embeds(
        qwen3, theirs, prompt, max_sequence_length=512, hidden_states_layers=[1, 2, 3]
    )
    tokenizer = load_tokenizer(tmp_path)
    ids = klein_tokens(tokenizer, prompt)
    got = encode_klein(ours_of(KLEIN_TEXT_ENCODER, qwen3), [ids], pad_id(tokenizer, KLEIN_PAD))
    agree(got.tokens, expected[0], roundings(qwen3.model))


# dev ------------------------------------------------------------------------------------------------------------------

MISTRAL = {
    "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 64, "rms_norm_eps": 1e-5, "sliding_window": None, "pad_token_id": None,
    "max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 1e9},
    "bos_token_id": 256, "eos_token_id": 299,
}  # fmt: skip
MARKS = ("<s>", DEV_PAD, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", "[IMG]")


@pytest.fixture(scope="module")
def mistral3():
    vision = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "head_dim": 8, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    config = transformers.Mistral3Config(text_config={"model_type": "mistral", **MISTRAL}, vision_config=vision)
    return randomised(transformers.Mistral3ForConditionalGeneration(config))


@pytest.fixture(scope="module")
def mistral_tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    plain = byte_tokenizer(*MARKS)
    plain.save(str(folder / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, bos_token="<s>", pad_token=DEV_PAD, padding_side="left", chat_template=MISTRAL_TEMPLATE
    )
    return load_mistral_tokenizer(folder), theirs


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_becomes_what_the_dev_pipeline_makes_of_it(mistral3, mistral_tokenizers, prompt):
    tokenizer, theirs = mistral_tokenizers
    expected = Flux2Pipeline._get_mistral_3_small_prompt_embeds(
        mistral3, theirs, prompt, max_sequence_length=512, hidden_states_layers=[1, 2, 3]
    )
    ours = ours_of(DEV_TEXT_ENCODER, mistral3)
    got = encode_dev(ours, [dev_tokens(tokenizer, prompt), [256]], pad_id(tokenizer, DEV_PAD))
    assert got.lengths == (512, 512)
    assert got.tokens.isfinite().all()
    assert expected.std() > 0.3
    agree(got[0].tokens, expected[0], roundings(mistral3.model.language_model))


def test_the_deepest_state_that_is_read_is_the_one_before_the_final_norm(mistral3):
    ours = ours_of(DEV_TEXT_ENCODER, mistral3)
    assert len(ours.model.layers) == 3
    got = encode_dev(ours, [[1, 2, 3]], pad=257).tokens[-3:, 64:]
    expected = mistral3(input_ids=torch.tensor([[1, 2, 3]]), output_hidden_states=True).hidden_states[3][0]
    # RoPE sees places relative to each other, so 509 pads before change nothing
    agree(got, expected, roundings(mistral3.model.language_model))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "model."])
def test_every_published_naming_of_the_language_model_is_read(mistral3, prefix):
    state = {name.replace("model.language_model.", prefix): tensor for name, tensor in mistral3.state_dict().items()}
    state |= {"tekken_model": torch.zeros(3, dtype=torch.uint8)}
    ours, expected = ours_of(DEV_TEXT_ENCODER, mistral3, state), ours_of(DEV_TEXT_ENCODER, mistral3)
    assert torch.equal(encode_dev(ours, [[5]], 257).tokens, encode_dev(expected, [[5]], 257).tokens)


def test_the_system_messages_are_the_references():
    assert system_message("system") == pipeline_flux2.SYSTEM_MESSAGE
    assert system_message("upsample") == pipeline_flux2.SYSTEM_MESSAGE_UPSAMPLING_T2I
    assert system_message("upsample_edit") == pipeline_flux2.SYSTEM_MESSAGE_UPSAMPLING_I2I


# FLUX.1 ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def flux1(tmp_path_factory):
    """The pipeline with its text encoders alone, and the folder it was saved in."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    clip_tokenizer = transformers.CLIPTokenizer(
        vocab={word: i for i, word in enumerate(words)}, merges=[("r", "e"), ("re", "d</w>")], model_max_length=77
    )
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), ("▁red", -1.0)]
    pieces += [(letter, -4.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    t5_tokenizer = transformers.T5Tokenizer(vocab=pieces, extra_ids=0)
    clip = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
            max_position_embeddings=77, hidden_act="quick_gelu", eos_token_id=2,
        )
    )  # fmt: skip
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )  # fmt: skip
    pipeline = FluxPipeline(
        scheduler=None, vae=None, transformer=None, text_encoder=randomised(clip), tokenizer=clip_tokenizer,
        text_encoder_2=randomised(t5), tokenizer_2=t5_tokenizer,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("flux1")
    clip_tokenizer.save_pretrained(folder / "tokenizer")
    t5_tokenizer.save_pretrained(folder / "tokenizer_2")
    return pipeline, folder


@pytest.mark.parametrize("length", [256, 512])
@pytest.mark.parametrize("prompt", ["", "a red cat", "red " * 600])
def test_a_prompt_becomes_what_flux_1s_pipeline_makes_of_it(flux1, prompt, length):
    pipeline, folder = flux1
    states, pooled, _ = pipeline.encode_prompt(prompt, max_sequence_length=length)
    clip, t5 = ours_of(CLIP, pipeline.text_encoder), ours_of(T5, pipeline.text_encoder_2)
    ids = clip_tokens(load_clip_tokenizer(folder / "tokenizer"), prompt)
    assert len(ids) == 77
    agree(encode_clip(clip, [ids]), pooled, roundings(clip))
    got = encode_t5(t5, [t5_tokens(load_t5_tokenizer(folder / "tokenizer_2"), prompt, length)] * 2)
    assert got.lengths == (length, length)
    assert states.std() > 0.1
    agree(got[1].tokens, states[0], roundings(t5))


def test_text_encoders_are_read_from_files_of_either_naming(flux1):
    pipeline, _ = flux1
    clip, t5 = pipeline.text_encoder, pipeline.text_encoder_2
    bare = {name.removeprefix("text_model."): weight for name, weight in clip.state_dict().items()}
    older = {f"text_model.{name}": weight for name, weight in bare.items()}
    extra = {"text_model.embeddings.position_ids": torch.arange(77)[None], "text_projection.weight": torch.zeros(1)}
    ids = [list(range(77))]
    expected = clip(input_ids=torch.tensor(ids)).pooler_output
    agree(encode_clip(ours_of(CLIP, clip, {**older, **extra}), ids), expected, roundings(clip))
    agree(encode_clip(ours_of(CLIP, clip, bare), ids), expected, roundings(clip))
    state = t5.state_dict()
    assert {"shared.weight", "encoder.embed_tokens.weight"} <= state.keys()
    once = {name: weight for name, weight in state.items() if name != "encoder.embed_tokens.weight"}
    tokens = [[3, 4, 1]]
    assert torch.equal(encode_t5(ours_of(T5, t5, once), tokens).tokens, encode_t5(ours_of(T5, t5), tokens).tokens)
    alone = {name: weight for name, weight in state.items() if name != "shared.weight"}
    assert torch.equal(encode_t5(ours_of(T5, t5, alone), tokens).tokens, encode_t5(ours_of(T5, t5), tokens).tokens)


def test_sizes_are_told_from_the_references_shapes():
    for part, config, build in (
        (CLIP, transformers.CLIPTextConfig(hidden_size=128, num_attention_heads=2, eos_token_id=2),
         transformers.CLIPTextModel),
        (T5, transformers.T5Config(d_model=64, d_kv=8, num_heads=4, num_layers=3, feed_forward_proj="gated-gelu"),
         transformers.T5EncoderModel),
        (DEV_TEXT_ENCODER, transformers.MistralConfig(**{**MISTRAL, "head_dim": 128}), transformers.MistralForCausalLM),
    ):  # fmt: skip
        with torch.device("meta"):
            theirs = build(config)
        sizes = read_config(part.config, theirs.config.to_dict())
        shapes = {name: tuple(w.shape) for name, w in read_of(part, sizes, theirs.state_dict()).items()}
        assert part.infer(shapes) == sizes


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"vocab_size": 3})[:-1])
    for load in (load_clip_tokenizer, load_t5_tokenizer):
        with pytest.raises(InputError, match=r"cannot be read \(.*copy the model's there") as caught:
            load(tmp_path)
        assert "\n" not in str(caught.value)
