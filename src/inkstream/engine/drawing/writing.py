"""Prompts that a model has written out by a grammar of its own, a picture at a time. No torch.

The request keeps the prompt as it was typed: the same prompt and seed always give the same words, so the request alone
draws the picture again. Prompts that a language model writes out are another matter: see `Model.upsample`.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from functools import lru_cache

from inkstream.pocket.writer import Written, write
from inkstream.types import Request, Spec

WRITERS: dict[str, Callable[[str, int, str], Written]] = {"scenes": write}
"""Spec.writer -> (prompt, seed, negative prompt) -> what the model is told."""
REAL_MODEL = "z-image-turbo"


def writes_out(request: Request, spec: Spec) -> bool:
    """Whether the grammar of the model writes the prompt out: unless the request says no or starts from a picture."""
    asked = request.image is None if request.upsample is None else request.upsample
    return bool(spec.writer) and asked


def written_out(request: Request, spec: Spec) -> str:
    """What the model is told of the request's first picture. The request has a seed."""
    return _write(request, spec).prompt if writes_out(request, spec) else request.prompt


def notes(request: Request, spec: Spec) -> list[str]:
    """What the grammar did not understand of a prompt, a line each, and which model to take instead."""
    if not writes_out(request, spec):
        return []
    lines = list(_write(request, spec).notes)
    if lines:
        lines.append(f"for anything else: inkstream generate {shlex.quote(request.prompt)} -m {REAL_MODEL}")
    return lines


def wording(typed: str, drawn: Request, spec: Spec) -> dict[str, str]:
    """What a picture's metadata says of a prompt that was expanded: the prompt as typed, or what the model was told."""
    if typed != drawn.prompt:
        return {"upsampled_from": typed}
    return {"told": written_out(drawn, spec)} if writes_out(drawn, spec) else {}


def _write(request: Request, spec: Spec) -> Written:
    return _write_once(spec.writer, request.prompt, request.seed or 0, request.negative_prompt)


@lru_cache(256)
def _write_once(writer: str, prompt: str, seed: int, negative: str) -> Written:
    return WRITERS[writer](prompt, seed, negative)
