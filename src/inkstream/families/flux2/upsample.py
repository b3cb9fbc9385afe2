"""Prompt upsampling: FLUX.2 dev's own language model writes a fuller prompt, or one instruction for an edit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from inkstream.families.flux2.references import cap_area, join_references
from inkstream.families.flux2.text import system_message

if TYPE_CHECKING:
    from PIL.Image import Image

AREA = 768 * 768
"""What the model is shown of the reference pictures, in pixels."""
INPUT_TOKENS, OUTPUT_TOKENS = 2048, 512
TEMPERATURE = 0.15


def upsample_prompt(model: Any, processor: Any, prompt: str, references: Sequence[Image] = (), seed: int = 0) -> str:
    """The prompt, rewritten. With references, an instruction of 50 to 80 words for what to do with them.

    model: transformers' Mistral3ForConditionalGeneration, all of it; processor: the one published with it. The random
    state outside is left as it was.
    """
    inputs = processor.apply_chat_template(
        [messages(prompt, references)],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        truncation=True,
        max_length=INPUT_TOKENS,
    ).to(model.device)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        ids = model.generate(**inputs, max_new_tokens=OUTPUT_TOKENS, do_sample=True, temperature=TEMPERATURE)
    new = ids[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=True)[0].strip()


def messages(prompt: str, references: Sequence[Image]) -> list[dict[str, Any]]:
    """The conversation, as transformers' chat templates take it; pictures are shown as one, side by side."""

    def turn(role: str, **content: Any) -> dict[str, Any]:
        return {"role": role, "content": [content]}

    system = turn("system", type="text", text=system_message("upsample_edit" if references else "upsample"))
    picture = [turn("user", type="image", image=cap_area(join_references(references), AREA))] if references else []
    return [system, *picture, turn("user", type="text", text=prompt.replace("[IMG]", ""))]
