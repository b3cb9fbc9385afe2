"""FLUX.2's prompts: templates, padding to 512 tokens, and the states read from Qwen3 (klein) or Mistral Small (dev)."""

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
"""Every prompt is this long: cut, or padded. The transformer reads the states of the padding too."""

KLEIN_PAD, DEV_PAD = "<|endoftext|>", "<pad>"  # 151643 and 11 in the published vocabularies

_SHA256 = {
    "system": "d43d93082f24034d9c7f4e5b65cdeceb1e082c64c9cf95dfae5be89c31e1320d",
    "upsample": "0ad9a42c565716b0a8eb82a442dd4f6cc82d583eb3474f82ccb610c1a29233c7",
    "upsample_edit": "1233bb94dcc251f85d676ffb27b6da74107e9af11b0e82041eac66a66717d772",
}


def depths(config: Qwen3Config | MistralConfig) -> tuple[int, int, int]:
    """The states read, joined: at a quarter, half and three quarters. 9, 18, 27 of Qwen3's 36; 10, 20, 30 of 40."""
    quarter, half, most = (config.num_hidden_layers * k // 4 for k in (1, 2, 3))
    return quarter, half, most


# klein ----------------------------------------------------------------------------------------------------------------


def klein_prompt(text: str) -> str:
    """The text as one user turn whose answer has done its thinking: Qwen3's chat template, thinking off."""
    return chat_prompt(text) + "<think>\n\n</think>\n\n"


def klein_tokens(tokenizer: Tokenizer, prompt: str) -> tuple[int, ...]:
    """The prompt in its template, at most 512 tokens, not padded."""
    return tuple(tokenize(tokenizer, klein_prompt(prompt), PROMPT_TOKENS))


def encode_klein(encoder: Qwen3, prompts: Sequence[Sequence[int]], pad: int) -> Conditioning:
    """Prompts, as `klein_tokens` gives them, padded on the right with `pad` -> 512 states each.

    States at padding depend on the text and on their place: the transformer was trained with them in sight.
    """
    lengths, texts = (PROMPT_TOKENS,) * len(prompts), [len(ids) for ids in prompts]
    ids = [token for ids in prompts for token in (*ids, *[pad] * (PROMPT_TOKENS - len(ids)))]
    device, _ = where_it_computes(encoder)
    return Conditioning(encoder(torch.tensor(ids, device=device), lengths, texts), lengths)


def _unread(config: Qwen3Config | MistralConfig) -> tuple[str, ...]:
    return (*(f"layers.{i}." for i in range(depths(config)[-1], config.num_hidden_layers)), "norm.")


def _neutral(config: Qwen3Config) -> dict[str, Tensor]:
    """The layers after the deepest that is read, adding nothing to what they are given, and the final norm."""
    counts = range(depths(config)[-1] + 1, config.num_hidden_layers + 1)
    layers = [neutral_layer(replace(config, num_hidden_layers=count)) for count in counts]
    return {key: tensor for layer in layers for key, tensor in layer.items()}


KLEIN_TEXT_ENCODER = replace(
    QWEN3, build=lambda config: Qwen3(config, depths(config)), unread=_unread, neutral=_neutral
)
"""klein's: Qwen3-4B, or 8B for klein 9B, without the last quarter of its layers."""


# dev ------------------------------------------------------------------------------------------------------------------


def dev_prompt(text: str, system: str) -> str:
    """The text as one user turn after a system turn, in Mistral Small's template; marks of pictures are taken out."""
    return f"<s>[SYSTEM_PROMPT]{system}[/SYSTEM_PROMPT][INST]{text.replace('[IMG]', '')}[/INST]"


def dev_tokens(tokenizer: Tokenizer, prompt: str) -> tuple[int, ...]:
    """The prompt in its template, at most 512 tokens, not padded."""
    return tuple(tokenize(tokenizer, dev_prompt(prompt, system_message("system")), PROMPT_TOKENS))


def encode_dev(encoder: MistralText, prompts: Sequence[Sequence[int]], pad: int) -> Conditioning:
    """Prompts, as `dev_tokens` gives them, padded on the left with `pad` -> 512 states each."""
    device, _ = where_it_computes(encoder)
    ids = torch.tensor([[*[pad] * (PROMPT_TOKENS - len(ids)), *ids] for ids in prompts], device=device)
    texts = torch.tensor([len(ids) for ids in prompts], device=device)
    mask = torch.arange(PROMPT_TOKENS, device=device) >= PROMPT_TOKENS - texts[:, None]  # (B, 512)
    return Conditioning(encoder(ids, mask.long()).flatten(0, 1), (PROMPT_TOKENS,) * len(prompts))


def system_message(name: str) -> str:
    """One of dev's system messages, exactly as it was trained with: system, upsample or upsample_edit.

    InputError where the file that came with the package is another one. Source and licence: NOTICE.txt beside it.
    """
    path = Path(__file__).with_name(f"{name}.txt")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != _SHA256[name]:
        raise InputError(f"{path} is not what it was published as: install inkstream again")
    return content.decode()


def load_mistral_tokenizer(path: Path | str) -> Tokenizer:
    """Mistral Small's tokenizer from a folder that holds its tokenizer.json. InputError where that is not so."""
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
    """The number of the token to pad with, KLEIN_PAD or DEV_PAD. InputError where the tokenizer lacks it."""
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
"""dev's: Mistral Small 3.2 24B, without its eyes, its head and the last quarter of its layers."""
