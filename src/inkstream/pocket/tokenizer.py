"""Pocket's tokenizer: each glyph of quoted text is one token, so the model sees spelling; caption words are one token.

It has three rules. tokenizer.json holds all of them, so every reader of that format follows them:
1. Between quotes (" ", “ ”, 「 」) each glyph is one token: text to be written is spelt out.
2. Elsewhere a listed word is one token: English words in lower case or capitalised, with the space before them, and
   Chinese words. Captions then have at most 64 tokens, including the chat template. Other words are spelt out.
3. A glyph that is not listed becomes its UTF-8 bytes.

The model is byte-level BPE without merges. It looks up whole pieces first (`ignore_merges`), as in Llama 3.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from inkstream.pocket import captions
from inkstream.pocket.colours import COLOURS
from inkstream.pocket.vocabulary import (
    CHINESE_COLOURS,
    CHINESE_EMOJI,
    EMOJI,
    FACES,
    HANZI,
    MEASURES,
    SHAPES,
    plural,
    with_article,
)

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
"""Qwen's special tokens that Z-Image's prompts need. The first one is the padding token."""

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
"""The part of Qwen3's chat template that handles plain messages."""

PUNCTUATION = "，。！？：；、“”「」《》（）…—·‘’"
CHINESE_WORDS = (
    "背景", "背景从", "渐变到", "左半", "右半", "上半", "下半", "写着", "文字", "海报", "图片", "一张", "一个", "两个",
    "三个", "四个", "五个", "小的", "大的", "左边", "右边", "上面", "下面", "上方", "下方", "左侧", "右侧", "中间",
    "左上角", "右上角", "左下角", "右下角",
)  # fmt: skip
"""Chinese caption words that are not names."""

# First a quoted string is isolated. Then each glyph of that piece is isolated; the quote at its end identifies it.
_QUOTED = r'"[^"\n]*"|“[^”\n]*”|「[^」\n]*」'
_GLYPH_OF_QUOTED = r'[\s\S](?=[\s\S]*["”」]\z)|["”」]\z'
# Outside quotes: an English word with the space before it. Unlisted words fall back to bytes, which are their letters.
_ENGLISH_WORD = r" ?[A-Za-z][a-z]+(?![A-Za-z])| [a-z](?![A-Za-z])"


def english_words() -> tuple[str, ...]:
    """Return the English words that are one token outside quotes, in lower case, sorted."""
    names = [*SHAPES, *EMOJI]
    phrases = [*names, *map(plural, names), *map(with_article, names), *captions.WORDS, *COLOURS]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


def chinese_words() -> tuple[str, ...]:
    """Return the Chinese words that are one token outside quotes, longest first."""
    found = {*CHINESE_WORDS, *SHAPES.values(), *CHINESE_EMOJI.values(), *CHINESE_COLOURS.values(), *FACES.values()}
    return tuple(sorted((word for word in found if len(word) > 1), key=lambda word: (-len(word), word)))


def vocabulary() -> dict[str, int]:
    """Return token -> number for special tokens, 256 bytes, glyphs and words, in byte-level BPE spelling."""
    hanzi = {*HANZI, *"一二三四五六七八九十两个有是在的和从到", *"".join([*chinese_words(), *CHINESE_EMOJI.values()])}
    english = [form for word in english_words() for form in (f" {word}", word, word.capitalize())]
    pieces = [*sorted(hanzi.union(MEASURES.values())), *PUNCTUATION, *english, *chinese_words(), "user", "assistant"]
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map(_as_bytes, pieces)]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def _as_bytes(piece: str) -> str:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(piece)[0][0]


@lru_cache(maxsize=1)
def build_tokenizer() -> Tokenizer:
    """Build the tokenizer from the vocabulary of scenes and captions."""
    piece = "|".join([_ENGLISH_WORD, *chinese_words(), r"[\s\S]"])
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary(), merges=[], ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(_QUOTED), behavior="isolated"),
            pre_tokenizers.Split(Regex(_GLYPH_OF_QUOTED), behavior="isolated"),
            pre_tokenizers.Split(Regex(piece), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def save_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, for transformers and inkstream's loader."""
    folder.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", "utf-8")
