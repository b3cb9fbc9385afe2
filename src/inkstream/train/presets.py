"""Settings by the memory of the card, and the recipe of `inkstream train quick`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from inkstream.train.pictures import open_source
from inkstream.train.reading import as_recipe, change_table
from inkstream.train.recipe import Data, Recipe
from inkstream.types import InputError, Spec

Tables = dict[str, dict[str, Any]]

PRESETS: Mapping[int, Tables] = {
    8: {"adapter": {"base": "fp8", "stream": True}, "run": {"batch": 1, "accumulate": 1}},
    12: {"adapter": {"base": "fp8"}, "run": {"batch": 1, "accumulate": 1, "checkpointing": True}},
    16: {"adapter": {"base": "fp8"}, "run": {"batch": 2, "accumulate": 1, "checkpointing": True}},
    24: {"adapter": {}, "run": {"batch": 2, "accumulate": 1, "checkpointing": True}},
    80: {"adapter": {}, "run": {"batch": 8, "accumulate": 1, "checkpointing": True}},
}
"""Memory of a card in GiB -> what trains an adapter of rank 32 of the 6B model at 1024 x 1024 pixels there."""

SMALL = 200_000_000
"""Parameters below which a transformer needs no preset: it trains in float32, on a CPU too."""


def preset_for(memory: int) -> int:
    """Return the largest preset for a memory in bytes. Raises InputError if there is none so small."""
    size = round(memory / 2**30)  # systems report a little less than what is sold
    fitting = [preset for preset in PRESETS if preset <= size]
    if not fitting:
        least = min(PRESETS)
        raise InputError(f"{size} GiB of memory are less than the smallest preset, {least} GiB: take a smaller model")
    return max(fitting)


def with_preset(tables: Tables, preset: int) -> Tables:
    """Return a recipe's tables with those of a preset laid over them. Raises InputError for an unknown preset."""
    if preset not in PRESETS:
        raise InputError(f"--preset {preset} is not known: take {', '.join(map(str, PRESETS))}")
    over = {**PRESETS[preset], "run": {"dtype": "bf16", **PRESETS[preset]["run"]}}
    return {**tables, **{name: {**tables.get(name, {}), **table} for name, table in over.items()}}


def quick_recipe(
    photos: Path, trigger: str, model: str, spec: Spec, numbers: int, preset: int | None, changes: Iterable[str] = ()
) -> Recipe:
    """Return a recipe that teaches a model what a folder of pictures shows, in a LoRA.

    trigger: the words for it. model: as in [model] from; spec: of it. numbers: of its transformer's weights. preset: a
    key of PRESETS; None for a small model. changes: as in `read_recipe`. Raises InputError if the pictures cannot be
    learnt from.
    """
    if not photos.is_dir():
        raise InputError(f"{photos} is not a folder: give a folder of pictures")
    data: dict[str, Any] = {"source": str(photos), "trigger": trigger, "buckets": 2 * spec.multiple}
    _, count = open_source(Data(**data, sizes=(spec.size,)))
    small = numbers < SMALL
    steps = min(max(40 * count, 200), 600) if small else min(max(150 * count, 1000), 3000)
    every = max(steps // 10, 1)
    tables: Tables = {
        "model": {"from": model, "name": name_of(trigger)},
        "adapter": {"kind": "lora", "rank": 16 if small else 32},
        "data": {**data, "sizes": [list(spec.size)]},
        "objective": {"dropout": 0.05},
        "optimiser": {"lr": 1e-3 if small else 1e-4, "betas": [0.9, 0.99], "warmup": 20, "ema": 0.99},
        "run": {
            "steps": steps, "batch": 4 if small else 1, "save": every, "keep": 3, "preview": 2 * every,
            "export": "bf16",
            "prompts": [trigger, f"{trigger} on a table", f"{trigger} on the beach", "a red apple on a table"],
        },
    }  # fmt: skip
    tables = deepcopy(tables if small or preset is None else with_preset(tables, preset))
    if small:
        tables["run"]["dtype"] = "fp32"
    for change in changes:
        change_table(tables, change)
    return as_recipe(tables)


def name_of(trigger: str) -> str:
    """Return a file's name for a trigger."""
    return re.sub(r"[^\w-]+", "-", trigger).strip("-").lower() or "adapter"
