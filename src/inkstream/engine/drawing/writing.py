"""Expanding a prompt by a model's own grammar, separately for each picture. No torch.

The request keeps the typed prompt. The same prompt and seed always give the same expanded prompt, so the request alone
draws the picture again. A language model expands prompts in another way: see `Model.upsample`.
"""

from __future__ import annotations

import importlib
import shlex
from functools import lru_cache
from typing import TYPE_CHECKING

from inkstream.engine.drawing.templates import is_template
from inkstream.types import Request, Spec

if TYPE_CHECKING:
    from inkstream.pocket.writer import Written

WRITERS = {"scenes": "inkstream.pocket.writer:write"}
"""Spec.writer -> the path of the function (prompt, seed, negative prompt, keep) -> Written: the expanded prompt, notes.

keep: whether words that the grammar does not know stay in the prompt, because an adapter may know them.
"""
REAL_MODEL = "z-image-turbo"
"""The model that the notes recommend for prompts outside the grammar."""


def writes_out(request: Request, spec: Spec) -> bool:
    """Whether the model's grammar expands the prompt. `upsample` decides; by default, only without a start picture."""
    asked = request.image is None if request.upsample is None else request.upsample
    return bool(spec.writer) and asked


def written_out(request: Request, spec: Spec) -> str:
    """The prompt that the model gets for the request's first picture. The request must have a seed."""
    return _write(request, spec).prompt if writes_out(request, spec) else request.prompt


def notes(request: Request, spec: Spec) -> list[str]:
    """A line for each part of the prompt that the grammar did not understand, and one with a model to take instead."""
    if not writes_out(request, spec):
        return []
    lines = list(_write(request, spec).notes)
    if lines:
        lines.append(f"for anything else: inkstream generate {shlex.quote(request.prompt)} -m {REAL_MODEL}")
    return lines


def wording(typed: str, drawn: Request, spec: Spec) -> dict[str, str]:
    """The metadata of a written-out prompt: the typed one, and the one that a grammar made of the request's.

    typed: a template, or what a language model expanded.
    """
    kept = {"told": written_out(drawn, spec)} if writes_out(drawn, spec) else {}
    if typed != drawn.prompt:
        kept["template" if is_template(typed) else "upsampled_from"] = typed
    return kept


def _write(request: Request, spec: Spec) -> Written:
    return _write_once(spec.writer, request.prompt, request.seed or 0, request.negative_prompt, bool(request.loras))


@lru_cache(256)
def _write_once(writer: str, prompt: str, seed: int, negative: str, keep: bool) -> Written:
    module, _, function = WRITERS[writer].partition(":")
    return getattr(importlib.import_module(module), function)(prompt, seed, negative, keep)
