"""`inkstream train --dry-run`: the memory and time of a recipe on a card. Imports torch late."""

from __future__ import annotations

import re
from typing import Any


def dry_run(recipe: Any, card: str | None, json: bool) -> int:
    """Print what a recipe needs. card: its name or memory, `8x NAME` for eight of them; None: this machine.

    Reads no weights. Returns the exit code: 0 if it fits, 2 if not.
    """
    from inkstream.cli.lines import in_gibibytes, print_facts, print_json
    from inkstream.engine.machine.memory import SPARE
    from inkstream.train.plan import foresee, optimisers_of, references_of, seconds_of
    from inkstream.types import InputError

    if recipe.objective.kind == "autoencoder" or not recipe.model.from_:
        raise InputError("--dry-run is for models that are trained on: name one in [model] from")
    cards = re.fullmatch(r"(\d+)\s*x\s*(\D.*)", card or "")
    processes, card = (int(cards[1]), cards[2]) if cards else (1, card)
    if processes < 1:
        raise InputError("--for 0x is no card: write a number from 1 on, as in --for '8x h100'")
    place, device, memory, speed = _place(card, recipe)
    spec, stored = model_of(recipe.model.from_)
    found = foresee(recipe, spec, device, stored, processes=processes)
    seconds = None if speed is None else seconds_of(found, recipe, spec, speed)
    fits = memory is None or found.peak <= SPARE * memory
    facts: dict[str, Any] = {
        "model": spec.name, "place": place, "weights_that_learn": found.numbers, "base_bytes": found.base,
        "learners_bytes": found.learners, "step_bytes": found.step, "peak_bytes": found.peak, "memory_bytes": memory,
        "fits": fits, "seconds_per_step": seconds, "seconds": None if seconds is None else seconds * recipe.run.steps,
    }  # fmt: skip
    if json:
        print_json(facts)
        return 0 if fits else 2
    width, height = recipe.data.sizes[0]
    kind, rank, steps = recipe.adapter.kind, recipe.adapter.rank, recipe.run.steps
    trains = "all weights" if kind == "none" else f"{kind} of rank {rank}"
    learners = len(optimisers_of(recipe))
    twice = "" if learners == 1 else f", {learners} times (student and critic)"
    seen = references_of(recipe)
    beside = f", each from {seen} reference{'s' if seen > 1 else ''} of that size" if seen else ""
    said = {
        "model": spec.name,
        "learns": f"{trains}, {found.numbers / 1e6:.1f} million{twice}",
        "step": f"{recipe.run.batch} of {width}x{height}{beside}",
        "frozen model": in_gibibytes(found.base),
        "what learns, and optimisers": in_gibibytes(found.learners),
        "computing": in_gibibytes(found.step),
        "peak": in_gibibytes(found.peak) + (f" of {in_gibibytes(memory)}" if memory else ""),
    }
    if seconds is not None:
        said["time"] = f"about {seconds:.2g} s a step, {in_hours(seconds * steps)} for {steps} steps"
    print(place if processes == 1 else f"{processes} processes, each on {place}")
    print_facts(said, "  ")
    print("it fits" if fits else "it does not fit: try --preset 8, smaller [data] sizes or more [run] accumulate")
    return 0 if fits else 2


def model_of(name: str) -> tuple[Any, Any]:
    """Return the spec of a model, and its transformer's weights on meta. Of a known model that is not here: None."""
    from inkstream.cli.download import is_downloaded
    from inkstream.engine.files.sources import locate
    from inkstream.families import SPECS

    if name in SPECS and SPECS[name].folder is None and not is_downloaded(name):
        return SPECS[name], None
    source = locate(name)
    return source.spec, source.parts["transformer"].tensors


def in_hours(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _place(card: str | None, recipe: Any) -> tuple[str, Any, int | None, Any]:
    """Return the name of the place, its device, its bytes of memory and its speed, as far as they are known."""
    import torch

    from inkstream.engine.machine.cards import find_card
    from inkstream.engine.machine.fit import measure_speed
    from inkstream.engine.machine.loader import choose_device
    from inkstream.engine.machine.memory import free_memory
    from inkstream.train.models import DTYPES

    if card is not None:
        found = find_card(card)
        if isinstance(found, int):
            return f"a card with {found / 2**30:g} GiB", torch.device("cuda"), found, None
        return found.title, torch.device("cuda"), found.memory_bytes, found.speed()
    device = choose_device(recipe.run.device or None)
    free, _ = free_memory(device)
    return f"this machine ({device})", device, free, measure_speed(device, DTYPES[recipe.run.dtype])
