"""The prompt of a Z-Image Omni request with references: raw segments, between which the pictures stand.

Each segment is encoded by itself. N references have N + 2 segments: one before the first picture, one behind each
picture, of which the last holds the prompt, and one behind the target. Without references there is one ordinary prompt.
Source: diffusers' ZImageOmniPipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from tokenizers import Tokenizer

START, END = "<|vision_start|>", "<|vision_end|>"
FIRST = f"<|im_start|>user\n{START}"
BETWEEN = f"{END}{START}"
LAST = f"{END}<|im_end|>"


def template(prompt: str, references: int) -> list[str]:
    """The segments of a prompt with 1 or more references. Marks of pictures in the prompt itself are left out."""
    asked = f"{END}{prompt.replace(END, '')}<|im_end|>\n<|im_start|>assistant\n{START}"
    return [FIRST, *[BETWEEN] * (references - 1), asked, LAST]


def segments_of(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Sequence[int]]:
    """Cuts the tokens of a prompt into its segments: each but the first begins with the end of a picture."""
    first, (end, *_) = _ids(tokenizer, FIRST), _ids(tokenizer, END)
    if list(ids[: len(first)]) != first:
        return [ids]
    cuts = [0, *(i for i, token in enumerate(ids) if token == end), len(ids)]
    return [ids[a:b] for a, b in pairwise(cuts)]


def segment_lengths(tokenizer: Tokenizer, references: int) -> Callable[[int], list[int]]:
    """A function that gives the lengths of the segments of a prompt with so many references, from its whole length."""
    first, between, last = (len(_ids(tokenizer, text)) for text in (FIRST, BETWEEN, LAST))
    known = first + between * (references - 1) + last
    return lambda length: [first, *[between] * (references - 1), length - known, last]


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids
