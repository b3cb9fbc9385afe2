"""Pocket's tokenizer: one token a glyph, so that the model sees spelling; the words of captions are one token, too.

Three rules, all of them in tokenizer.json, where any reader of such files follows them:
1. Between quotes (" ", “ ”, 「 」) every glyph is a token of its own: what is to be written is spelt out.
2. Elsewhere a listed word is one token: English ones in lower case or capitalised, with the space before them, and
   Chinese ones. So captions keep to 64 tokens, the chat template included. Other words are spelt out.
3. A glyph that is not listed is its UTF-8 bytes.

The model is byte-level BPE without merges whose whole pieces are looked up first (`ignore_merges`), as in Llama 3.
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
"""Qwen's, as far as Z-Image's prompts need them; the first pads."""

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
"""Qwen3's, as far as plain messages go through it."""

PUNCTUATION = "，。！？：；、“”「」《》（）…—·‘’"
CHINESE_WORDS = (
    "背景", "背景从", "渐变到", "左半", "右半", "上半", "下半", "写着", "文字", "海报", "图片", "一张", "一个", "两个",
    "三个", "四个", "五个", "小的", "大的", "左边", "右边", "上面", "下面", "上方", "下方", "左侧", "右侧", "中间",
    "左上角", "右上角", "左下角", "右下角",
)  # fmt: skip
"""Words of captions that are no names."""

# A quoted string, isolated whole; then in such a piece, known by the quote at its end, every glyph.
_QUOTED = r'"[^"\n]*"|“[^”\n]*”|「[^」\n]*」'
_GLYPH_OF_QUOTED = r'[\s\S](?=[\s\S]*["”」]\z)|["”」]\z'
# Elsewhere an English word with the space before it. What is no token falls back to its bytes, which are its letters.
_ENGLISH_WORD = r" ?[A-Za-z][a-z]+(?![A-Za-z])| [a-z](?![A-Za-z])"


def english_words() -> tuple[str, ...]:
    """The English words that are one token outside quotes, in alphabetical order, lower case."""
    names = [*SHAPES, *EMOJI]
    phrases = [*names, *map(plural, names), *map(with_article, names), *captions.WORDS, *COLOURS]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


def chinese_words() -> tuple[str, ...]:
    """The Chinese words that are one token outside quotes, longest first."""
    found = {*CHINESE_WORDS, *SHAPES.values(), *CHINESE_EMOJI.values(), *CHINESE_COLOURS.values(), *FACES.values()}
    return tuple(sorted((word for word in found if len(word) > 1), key=lambda word: (-len(word), word)))


def vocabulary() -> dict[str, int]:
    """Token -> number: specials, the 256 bytes, other glyphs, words. Tokens are written as byte-level BPE does."""
    hanzi = {*HANZI, *"一二三四五六七八九十两个有是在的和从到", *"".join([*chinese_words(), *CHINESE_EMOJI.values()])}
    english = [form for word in english_words() for form in (f" {word}", word, word.capitalize())]
    pieces = [*sorted(hanzi.union(MEASURES.values())), *PUNCTUATION, *english, *chinese_words(), "user", "assistant"]
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map(_as_bytes, pieces)]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}


def _as_bytes(piece: str) -> str:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(piece)[0][0]


@lru_cache(maxsize=1)
def build_tokenizer() -> Tokenizer:
    """The tokenizer, made from the vocabulary of scenes and captions."""
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
    """Write tokenizer.json and tokenizer_config.json, as transformers and our own loader read them."""
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
