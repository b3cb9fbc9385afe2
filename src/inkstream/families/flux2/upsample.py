"""Prompt upsampling: the language model that reads prompts writes a fuller one, or one instruction for an edit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from inkstream.families.flux2.text import dev_prompt, klein_prompt, system_message
from inkstream.types import InputError

AREA = 768 * 768
"""What the model is shown of the reference pictures, in pixels."""
LONGEST = 1540
"""The longest side of a picture that Mistral Small sees."""
INPUT_TOKENS, OUTPUT_TOKENS = 2048, 512
TEMPERATURE = 0.15
KLEIN_ENDS, DEV_ENDS = ("<|im_end|>", "<|endoftext|>"), ("</s>",)


def klein_task(prompt: str) -> str:
    """What klein's Qwen3 is asked, dev's own system message before the prompt: the release asks it nothing."""
    return f"<|im_start|>system\n{system_message('upsample')}<|im_end|>\n{klein_prompt(prompt)}"


def dev_task(prompt: str, grid: tuple[int, int] | None = None) -> str:
    """What dev's Mistral is asked. grid: rows and columns that it sees of a picture, which stands in a turn before."""
    if grid is None:
        return dev_prompt(prompt, system_message("upsample"))
    rows, columns = grid
    seen = "[IMG_BREAK]".join(["[IMG]" * columns] * rows) + "[IMG_END]"
    before, turn, after = dev_prompt(prompt, system_message("upsample_edit")).partition("[INST]")
    return f"{before}[INST]{seen}[/INST]{turn}{after}"


def read_task(tokenizer: Tokenizer, task: str) -> list[int]:
    """Its tokens. InputError where there are more than the model takes."""
    ids = tokenizer.encode(task, add_special_tokens=False).ids
    if len(ids) > INPUT_TOKENS:
        raise InputError(f"the prompt and how to write it out are {len(ids)} tokens, {INPUT_TOKENS} fit: shorten it")
    return ids


def write(
    logits: Tensor, ask: Callable[[int], Tensor], tokenizer: Tokenizer, ends: Collection[str], seed: int
) -> Iterator[str]:
    """The text that a model goes on with, as it grows; the seed decides.

    logits: (V,) of the first token; ask: a token -> the logits of the next; ends: tokens that end the text.
    """
    generator = torch.Generator().manual_seed(seed)
    last, tokens = {tokenizer.token_to_id(name) for name in ends}, []
    for _ in range(OUTPUT_TOKENS):
        odds = (logits.float().cpu() / TEMPERATURE).softmax(-1)
        token = int(torch.multinomial(odds, 1, generator=generator))
        if token in last:
            return
        tokens.append(token)
        yield tokenizer.decode(tokens).strip()
        logits = ask(token)


def size_seen(image: Image.Image, cell: int) -> tuple[int, int]:
    """Rows and columns of cells that Mistral sees a picture in, scaled down where a side is too long for it."""
    scale = min(1.0, LONGEST / max(image.size))
    width, height = (int(side * scale) for side in image.size)
    return -(-height // cell), -(-width // cell)
