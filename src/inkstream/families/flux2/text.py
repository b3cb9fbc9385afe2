"""FLUX.2's prompts: templates, padding to 512 tokens, and the states of Qwen3 (klein) or Mistral Small (dev)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from inkstream.families import Part
from inkstream.families.flux2.mistral import LAYOUTS, MistralText, infer_mistral
from inkstream.families.parts import QWEN3, chat_prompt, neutral_layer, tokenize
from inkstream.nn.config import MistralConfig, Qwen3Config
from inkstream.nn.offload import where_it_computes
from inkstream.nn.qwen3 import Qwen3
from inkstream.types import Conditioning, InputError

PROMPT_TOKENS = 512
"""The length of every prompt, truncated or padded. The transformer reads the states of the padding too."""

KLEIN_PAD, DEV_PAD = "<|endoftext|>", "<pad>"  # 151643 and 11 in the published vocabularies

_SHA256 = {
    "system": "d43d93082f24034d9c7f4e5b65cdeceb1e082c64c9cf95dfae5be89c31e1320d",
    "upsample": "0ad9a42c565716b0a8eb82a442dd4f6cc82d583eb3474f82ccb610c1a29233c7",
    "upsample_edit": "1233bb94dcc251f85d676ffb27b6da74107e9af11b0e82041eac66a66717d772",
}


def depths(config: Qwen3Config | MistralConfig) -> tuple[int, int, int]:
    """The states to read: after 1/4, 1/2 and 3/4 of the layers. 9, 18, 27 of Qwen3's 36; 10, 20, 30 of Mistral's 40."""
    quarter, half, most = (config.num_hidden_layers * k // 4 for k in (1, 2, 3))
    return quarter, half, most


# klein ----------------------------------------------------------------------------------------------------------------


def klein_prompt(text: str) -> str:
    """Qwen3's chat template without thinking: one user turn, then an answer that starts with an empty thought."""
    return chat_prompt(text) + "<think>\n\n</think>\n\n"


def klein_tokens(tokenizer: Tokenizer, prompt: str) -> tuple[int, ...]:
    """The prompt's tokens in its template, truncated to 512, not padded."""
    return tuple(tokenize(tokenizer, klein_prompt(prompt), PROMPT_TOKENS))


def encode_klein(encoder: Qwen3, prompts: Sequence[Sequence[int]], pad: int) -> Conditioning:
    """Encodes prompts, as returned by `klein_tokens`, padded on the right with `pad` -> 512 states each.

    The states of padding depend on the text and on their position. The transformer was trained to attend to them.
    """
    lengths, texts = (PROMPT_TOKENS,) * len(prompts), [len(ids) for ids in prompts]
    ids = [token for ids in prompts for token in (*ids, *[pad] * (PROMPT_TOKENS - len(ids)))]
    device, _ = where_it_computes(encoder)
    return Conditioning(encoder(torch.tensor(ids, device=device), lengths, texts), lengths)


def _unread(config: Qwen3Config | MistralConfig) -> tuple[str, ...]:
    return (*(f"layers.{i}." for i in range(depths(config)[-1], config.num_hidden_layers)), "norm.")


def _neutral(config: Qwen3Config) -> dict[str, Tensor]:
    """Weights of the layers that are not read, which add nothing to their input, and of the final norm."""
    counts = range(depths(config)[-1] + 1, config.num_hidden_layers + 1)
    layers = [neutral_layer(replace(config, num_hidden_layers=count)) for count in counts]
    return {key: tensor for layer in layers for key, tensor in layer.items()}


KLEIN_TEXT_ENCODER = replace(
    QWEN3, build=lambda config: Qwen3(config, depths(config)), unread=_unread, neutral=_neutral
)
"""klein's text encoder: Qwen3-4B, or 8B for klein 9B, without the last quarter of its layers."""


# dev ------------------------------------------------------------------------------------------------------------------


def dev_prompt(text: str, system: str) -> str:
    """Mistral Small's template: a system turn, then the text as one user turn without picture marks ([IMG])."""
    return f"<s>[SYSTEM_PROMPT]{system}[/SYSTEM_PROMPT][INST]{text.replace('[IMG]', '')}[/INST]"


def dev_tokens(tokenizer: Tokenizer, prompt: str) -> tuple[int, ...]:
    """The prompt's tokens in its template, truncated to 512, not padded."""
    return tuple(tokenize(tokenizer, dev_prompt(prompt, system_message("system")), PROMPT_TOKENS))


def encode_dev(encoder: MistralText, prompts: Sequence[Sequence[int]], pad: int) -> Conditioning:
    """Encodes prompts, as returned by `dev_tokens`, padded on the left with `pad` -> 512 states each."""
    device, _ = where_it_computes(encoder)
    ids = torch.tensor([[*[pad] * (PROMPT_TOKENS - len(ids)), *ids] for ids in prompts], device=device)
    texts = torch.tensor([len(ids) for ids in prompts], device=device)
    mask = torch.arange(PROMPT_TOKENS, device=device) >= PROMPT_TOKENS - texts[:, None]  # (B, 512)
    return Conditioning(encoder(ids, mask.long()).flatten(0, 1), (PROMPT_TOKENS,) * len(prompts))


def system_message(name: str) -> str:
    """One of dev's system messages, exactly as in training: system, upsample or upsample_edit.

    Raises InputError where the package's file differs. NOTICE.txt, beside it, names source and licence.
    """
    path = Path(__file__).with_name(f"{name}.txt")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != _SHA256[name]:
        raise InputError(f"{path} differs from the published file: install inkstream again")
    return content.decode()


def load_mistral_tokenizer(path: Path | str) -> Tokenizer:
    """Reads Mistral Small's tokenizer from a folder with tokenizer.json. Raises InputError if it does not fit."""
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{path} holds no tokenizer.json: copy the one of FLUX.2 dev's tokenizer folder there")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers package raises bare Exceptions
        raise InputError(f"{file} cannot be read ({error}): download it again") from error
    for token in ("<s>", DEV_PAD, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"):
        pad_id(tokenizer, token)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def pad_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a special token, such as KLEIN_PAD or DEV_PAD. Raises InputError where the tokenizer lacks it."""
    number = tokenizer.token_to_id(token)
    if number is None:
        raise InputError(f"the tokenizer has no {token}: take the one published with the model")
    return number


DEV_TEXT_ENCODER = Part(
    build=lambda config: MistralText(config, depths(config)),
    config=MistralConfig,
    layouts=LAYOUTS,
    infer=infer_mistral,
    unread=lambda config: tuple(f"model.{name}" for name in _unread(config)),
)
"""dev's text encoder: Mistral Small 3.2 24B without vision tower, head and the last quarter of its layers."""
