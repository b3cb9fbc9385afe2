"""Prompt upsampling: the text encoder's language model writes a fuller prompt, or an instruction for an edit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from inkstream.families.flux2.text import dev_prompt, klein_prompt, system_message
from inkstream.types import InputError

AREA = 768 * 768
"""The most pixels of the joined reference pictures that the model sees."""
LONGEST = 1540
"""The longest side in pixels of a picture that Mistral Small sees."""
INPUT_TOKENS, OUTPUT_TOKENS = 2048, 512
TEMPERATURE = 0.15
KLEIN_ENDS, DEV_ENDS = ("<|im_end|>", "<|endoftext|>"), ("</s>",)


def klein_task(prompt: str) -> str:
    """The task for klein's Qwen3: dev's system message, then the prompt. The release has no task for klein."""
    return f"<|im_start|>system\n{system_message('upsample')}<|im_end|>\n{klein_prompt(prompt)}"


def dev_task(prompt: str, grid: tuple[int, int] | None = None) -> str:
    """The task for dev's Mistral. grid: rows and columns of a picture's tokens, which get a turn before the prompt."""
    if grid is None:
        return dev_prompt(prompt, system_message("upsample"))
    rows, columns = grid
    seen = "[IMG_BREAK]".join(["[IMG]" * columns] * rows) + "[IMG_END]"
    before, turn, after = dev_prompt(prompt, system_message("upsample_edit")).partition("[INST]")
    return f"{before}[INST]{seen}[/INST]{turn}{after}"


def read_task(tokenizer: Tokenizer, task: str) -> list[int]:
    """The token ids of a task. Raises InputError for more than the model takes."""
    ids = tokenizer.encode(task, add_special_tokens=False).ids
    if len(ids) > INPUT_TOKENS:
        raise InputError(f"the prompt and its instructions take {len(ids)} tokens, {INPUT_TOKENS} fit: shorten it")
    return ids


def write(
    logits: Tensor, ask: Callable[[int], Tensor], tokenizer: Tokenizer, ends: Collection[str], seed: int
) -> Iterator[str]:
    """Yields the text that a model generates, as it grows. The seed sets the sampling.

    logits: (V,) of the first token. ask: a token -> the logits of the next. ends: tokens that end the text.
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
    """Rows and columns of cells that Mistral sees of a picture, scaled down if a side is longer than LONGEST."""
    scale = min(1.0, LONGEST / max(image.size))
    width, height = (int(side * scale) for side in image.size)
    return -(-height // cell), -(-width // cell)
