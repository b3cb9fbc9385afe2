"""Expanding a prompt by a model's own grammar, separately for each picture. No torch.

The request keeps the typed prompt. The same prompt, seed and adapters always give the same expanded prompt, so the
request draws the picture again. A language model expands prompts in another way: see `Model.upsample`.
"""

from __future__ import annotations

import importlib
import shlex
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from inkstream.engine.drawing.templates import is_template
from inkstream.engine.files.lora_facts import read_facts
from inkstream.engine.files.loras import find_lora
from inkstream.types import Done, LoraUse, Request, Spec

if TYPE_CHECKING:
    from inkstream.pocket.writer import Written

WRITERS = {"scenes": "inkstream.pocket.writer:write", "edits": "inkstream.pocket.editor:write"}
"""Spec.writer -> the path of the function (prompt, seed, negative prompt, keep) -> Written: the expanded prompt, notes.

keep: whether words that the grammar does not know stay: all, none, or these.
"""
REAL_MODEL = "z-image-turbo"
"""The model that the notes recommend for prompts outside the grammar."""


def writes_out(request: Request, spec: Spec) -> bool:
    """Whether the model's grammar expands the prompt. `upsample` decides; by default, only without a start picture.

    A grammar of edits reads prompts with references, and another one only those without.
    """
    asked = request.image is None if request.upsample is None else request.upsample
    return bool(spec.writer) and asked and bool(request.reference) == (spec.writer == "edits")


def written_out(request: Request, spec: Spec, loras: Path) -> str:
    """The prompt that the model gets for the request's first picture. The request must have a seed.

    loras: the folder of the adapters that requests name.
    """
    return _write(request, spec, loras).prompt if writes_out(request, spec) else request.prompt


def notes(request: Request, spec: Spec, loras: Path) -> list[str]:
    """A line for each part of the prompt that the grammar did not understand, and one with a model to take instead.

    loras: as in `written_out`.
    """
    if not writes_out(request, spec):
        return []
    lines = list(_write(request, spec, loras).notes)
    if lines:
        lines.append(f"for anything else: inkstream generate {shlex.quote(request.prompt)} -m {REAL_MODEL}")
    return lines


def wording(typed: str, done: Done) -> dict[str, str]:
    """The metadata of a written-out prompt: the typed one, and the one that a grammar made of the request's.

    And what was checked of the picture. typed: a template, or what a language model expanded.
    """
    kept = {name: text for name in ("told", "checked") if (text := getattr(done, name))}
    if typed != done.request.prompt:
        kept["template" if is_template(typed) else "upsampled_from"] = typed
    return kept


def cost_of(done: Done) -> dict[str, float]:
    """The metadata of what a remote model took for a picture, in US dollars; empty for a picture drawn here."""
    return {} if done.cost is None else {"cost_usd": done.cost}


def _kept_words(request: Request, loras: Path) -> bool | frozenset[str]:
    """The words that stay in the prompt although the grammar does not know them, because an adapter knows them.

    The adapters' files name them as triggers; True, which is all words, if a file names none.
    """
    facts = [read_facts(find_lora(LoraUse.read(lora).path, loras)) for lora in request.loras]
    if not all(each.triggers for each in facts):
        return True
    return frozenset(word for each in facts for phrase in each.triggers for word in phrase.casefold().split())


def _write(request: Request, spec: Spec, loras: Path) -> Written:
    keep = _kept_words(request, loras)
    return _write_once(spec.writer, request.prompt, request.seed or 0, request.negative_prompt, keep)


@lru_cache(256)
def _write_once(writer: str, prompt: str, seed: int, negative: str, keep: bool | frozenset[str]) -> Written:
    module, _, function = WRITERS[writer].partition(":")
    return getattr(importlib.import_module(module), function)(prompt, seed, negative, keep)
