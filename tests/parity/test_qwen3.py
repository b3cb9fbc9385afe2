"""Our text encoder against transformers' on its own random tiny weights, and the prompt as the pipeline makes it."""

from __future__ import annotations

import pytest
import torch
import transformers

from inkstream.families.parts import PROMPT_TOKENS, QWEN3, chat_prompt, load_tokenizer, tokenize
from inkstream.families.zimage.family import ZImage
from inkstream.families.zimage.specs import TURBO
from inkstream.nn.config import Qwen3Config, read_config
from inkstream.nn.qwen3 import Qwen3
from inkstream.weights.keymap import translate
from rounding import agree, roundings

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
ODD = {"hidden_size": 48, "num_hidden_layers": 5, "num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 24}
EVERY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
SIZES = pytest.mark.parametrize("sizes", [SMALL, ODD, EVERY], ids=["small", "one key head", "a key head a query"])
RULES = QWEN3.layouts["transformers"]

QWEN3_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
"""What Qwen3's published template does with one user turn."""


def random_qwen3(sizes: dict, causal_lm: bool = False, tied: bool = True, theta: float = 1e6, eps: float = 1e-6):
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        **sizes, vocab_size=300, intermediate_size=80, rms_norm_eps=eps, tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": theta}, max_position_embeddings=1024,
    )  # fmt: skip
    model = (transformers.Qwen3ForCausalLM if causal_lm else transformers.Qwen3Model)(config)
    model = model.eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        weight.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model


def ours_of(theirs, depths: tuple[int, ...] | None = None) -> Qwen3:
    """Ours at their config, with those of their weights that it has a place for."""
    config = read_config(Qwen3Config, theirs.config.to_dict())
    ours = Qwen3(config, depths).eval().requires_grad_(False)
    read = translate(RULES, theirs.state_dict())
    unread = tuple(QWEN3.unread(config))
    missing, left = ours.load_state_dict(read, strict=False)
    assert not missing
    assert all(name.startswith(unread) for name in left)
    return ours


def states_of(theirs, ids: torch.Tensor, depth: int) -> torch.Tensor:
    return theirs(input_ids=ids[None], output_hidden_states=True).hidden_states[depth][0]


def prompts(*lengths: int) -> list[torch.Tensor]:
    return [torch.randint(300, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]


@SIZES
def test_the_last_but_one_state_equals_the_references_for_prompts_of_several_lengths(sizes):
    theirs = random_qwen3(sizes)
    ours, many = ours_of(theirs), prompts(1, 9, 9, 64, 200)
    lengths = [len(ids) for ids in many]
    got = ours(torch.cat(many), lengths).split(lengths)
    for ids, states in zip(many, got):
        expected = states_of(theirs, ids, -2)
        assert expected.std() > 0.5
        agree(states, expected, roundings(theirs))


@pytest.mark.parametrize("theta", [1e4, 1e6, 5e6])
def test_the_rotary_base_comes_from_the_config(theta):
    theirs = random_qwen3(SMALL, theta=theta)
    (ids,) = prompts(150)
    ours = ours_of(theirs)
    assert ours.config.rope_theta == theta
    agree(ours(ids, [150]), states_of(theirs, ids, -2), roundings(theirs))


def test_the_norms_epsilon_comes_from_the_config():
    theirs = random_qwen3(SMALL, eps=0.3)
    (ids,) = prompts(20)
    agree(ours_of(theirs)(ids, [20]), states_of(theirs, ids, -2), roundings(theirs))


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_published_with_its_head_is_read_without_it(tied):
    theirs = random_qwen3(SMALL, causal_lm=True, tied=tied)
    assert "lm_head.weight" in theirs.state_dict()
    (ids,) = prompts(30)
    agree(ours_of(theirs)(ids, [30]), states_of(theirs, ids, -2), roundings(theirs.model))


def test_several_depths_equal_the_references_states():
    theirs = random_qwen3(ODD)
    (ids,) = prompts(17)
    got = ours_of(theirs, depths=(1, 3, 4))(ids, [17]).chunk(3, dim=-1)
    for depth, states in zip((1, 3, 4), got):
        agree(states, states_of(theirs, ids, depth), roundings(theirs))


# The prompt -----------------------------------------------------------------------------------------------------------

PROMPTS = [
    "", "a red cat", "  two  spaces\nand a line\n", "写着“春”字的红色海报", "<|im_end|> and <|im_start|>system",
    "🐈‍⬛ é",
]  # fmt: skip


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_template_is_what_the_pipeline_asks_of_the_tokenizer(reference_folder, prompt):
    tokenizer = transformers.AutoTokenizer.from_pretrained(reference_folder / "tokenizer")
    tokenizer.chat_template = QWEN3_TEMPLATE
    message = [{"role": "user", "content": prompt}]
    for thinking, same in ((True, True), (False, False)):
        text = tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        assert (chat_prompt(prompt) == text) == same
    assert chat_prompt(prompt) != tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=False)


@pytest.mark.parametrize("prompt", [*PROMPTS, "a long tale of many words " * 60])
def test_the_tokens_and_states_are_the_pipelines(reference, reference_folder, prompt):
    """The longest is cut by both, and so loses the assistant's turn."""
    tokenizer = load_tokenizer(reference_folder / "tokenizer")
    expected = reference.tokenizer(chat_prompt(prompt), truncation=True, max_length=PROMPT_TOKENS).input_ids
    ids = tokenize(tokenizer, chat_prompt(prompt))
    assert ids == expected
    assert len(ids) <= PROMPT_TOKENS
    nothing, text_encoder = torch.nn.Identity(), ours_of(reference.text_encoder)
    modules = {"transformer": nothing, "text_encoder": text_encoder, "vae": nothing}
    family = ZImage(TURBO.tiny, modules, {"tokenizer": tokenizer})
    with torch.no_grad():
        (theirs,) = reference._encode_prompt(prompt)
    got = family.encode(prompt)
    assert got.lengths == (len(expected),)
    agree(got.tokens, theirs, roundings(text_encoder))
