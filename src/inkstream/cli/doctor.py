"""`inkstream doctor`: the facts of a machine, and the models that fit it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inkstream.cli.lines import in_gibibytes, in_gigabytes, print_facts
from inkstream.engine.files.licences import SETTING, in_words, is_commercial_only
from inkstream.families import RECOMMENDED, SPECS
from inkstream.types import in_time

if TYPE_CHECKING:
    from inkstream.engine.machine.cards import Card

PACKAGES = ("inkstream", "torch", "tokenizers", "safetensors", "huggingface-hub", "pillow", "pydantic")
PATIENCE = 3600
"""Seconds for one picture. A model that takes longer is not recommended."""
WIDTH = max(map(len, SPECS))
"""Width of the names that `doctor` prints."""
DRAWS = {False: "models of any licence", True: f"models for commercial use only: {SETTING} is set"}


def examine_software() -> dict[str, Any]:
    """Return versions and system. Torch is not imported."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"versions": {"python": platform.python_version(), **versions}, "system": platform.platform()}


def examine(other: Card | int | None = None, timed: bool = True) -> dict[str, Any]:
    """Return versions, device, memory, disk, hub and the models that fit, as JSON.

    other: another machine's card or its bytes of memory, instead of this machine. timed: measure the speed of this
    machine.
    """
    import torch
    from huggingface_hub import constants

    from inkstream.engine.machine.cards import Card
    from inkstream.engine.machine.fit import fits, here, known, measure_speed
    from inkstream.engine.machine.loader import choose_device, choose_dtype
    from inkstream.engine.machine.memory import SPARE, count_weights, free_memory

    device = choose_device()
    dtype = choose_dtype(None, device)
    free, total = free_memory(device)
    memory = other.memory_bytes if isinstance(other, Card) else other
    kind, budget = here() if memory is None else ("cuda", int(SPARE * memory))
    speed = other.speed() if isinstance(other, Card) else None
    if other is None and timed:
        speed = measure_speed(device, dtype)
    cache = Path(constants.HF_HUB_CACHE)
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    models = [
        {
            "name": spec.name,
            "licence": spec.licence,
            "commercial": spec.commercial,
            "weights": count_weights(spec),
            "fits": [asdict(fit) for fit in fits(spec, kind, budget, speed)],
        }
        for spec in known()
    ]
    return {
        **examine_software(),
        "device": {
            "name": str(device),
            "title": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
            "memory_bytes": total,
            "free_bytes": free,
            "dtype": str(dtype).removeprefix("torch."),
        },
        "hub": {
            "endpoint": constants.ENDPOINT,
            "cache": str(cache),
            "free_bytes": shutil.disk_usage(there).free,
            "offline": constants.HF_HUB_OFFLINE,
        },
        "commercial_only": is_commercial_only(),
        "for": {
            "kind": kind,
            "card": other.title if isinstance(other, Card) else None,
            "memory_bytes": memory or free,
            "budget_bytes": budget,
        },
        "models": models,
        "recommended": recommend(models),
    }


def print_software() -> None:
    """Print versions and system: at once, because the rest takes seconds."""
    software = examine_software()
    versions = ", ".join(f"{name} {version}" for name, version in software["versions"].items())
    print_facts({"versions": versions, "system": software["system"]}, width=WIDTH)
    sys.stdout.flush()


def print_findings(findings: dict[str, Any], asked: bool = False) -> None:
    """Print the findings but for versions and system. asked: they are about another machine."""
    device, hub, budget = findings["device"], findings["hub"], findings["for"]["budget_bytes"]
    free = " of ".join(in_gigabytes(n) if n else "unknown" for n in (device["free_bytes"], device["memory_bytes"]))
    about = {
        "device": f"{device['name']} ({device['title']}), {device['cores']} cores, {free} free",
        "hub": hub["endpoint"] + (", not used: HF_HUB_OFFLINE is set" if hub["offline"] else ""),
        "cache": f"{hub['cache']}, {in_gigabytes(hub['free_bytes'])} free",
    }
    if asked:
        memory = in_gibibytes(findings["for"]["memory_bytes"])
        card = findings["for"]["card"] or "a GPU with"
        about = {card: f"{memory}, of which {in_gibibytes(budget or 0)} are planned with"}
    models = {
        model["name"]: f"{judge(model['fits'], budget)}; {in_words(model['licence'], model['commercial'])}"
        for model in findings["models"]
    }
    print_facts({**about, "draws with": DRAWS[findings["commercial_only"]], **models}, width=WIDTH)
    print(advise(findings["models"]))


def recommend(models: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the recommended model among those that fit and may be used, or None.

    A model whose pictures take longer than `PATIENCE` is recommended only if all others take longer too.
    """
    allowed = {m["name"]: m["fits"][0] for m in models if m["fits"] and (m["commercial"] or not is_commercial_only())}
    names = [name for name in RECOMMENDED if name in allowed]
    return next((name for name in names if (allowed[name]["seconds"] or 0) <= PATIENCE), next(iter(names), None))


def judge(fits: Sequence[Mapping[str, Any]], budget: int | None) -> str:
    """Return how a model fits: the recommended way, and the way with the least memory."""
    if not fits:
        return "does not fit" + ("" if budget is None else f" {in_gibibytes(budget)}")
    least = min(fits, key=lambda fit: fit["peak"])
    return describe(fits[0]) + ("" if least is fits[0] else f", smallest: {describe(least)}")


def describe(fit: Mapping[str, Any]) -> str:
    """Return one way in which a model fits, as text."""
    time = "" if fit["seconds"] is None else f", about {in_time(fit['seconds'])} a picture"
    return f"{fit['precision']} {fit['placement']} ({in_gibibytes(fit['peak'])}{time})"


def advise(models: Sequence[Mapping[str, Any]]) -> str:
    """Return the recommended model and the commands that draw with it."""
    name = recommend(models)
    if name is None:
        return "nothing fits: free some memory, or draw on another machine"
    fit = next(model["fits"][0] for model in models if model["name"] == name)
    if fit["precision"] == "bf16" or name == "pocket":
        return f"recommended: {name}, {describe(fit)}: inkstream generate 'a lighthouse in fog' -m {name}"
    folder = f"{name}-{fit['precision']}"
    return (
        f"recommended: {name}, {describe(fit)}: inkstream convert {name} {folder} --quant {fit['precision']}, then "
        f"inkstream generate 'a lighthouse in fog' -m ./{folder}"
    )
