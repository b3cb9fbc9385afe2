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
from typing import Any

from inkstream.cli.lines import in_gibibytes, in_gigabytes, print_facts
from inkstream.engine.files.licences import SETTING, in_words, is_commercial_only
from inkstream.families import RECOMMENDED

PACKAGES = ("inkstream", "torch", "tokenizers", "safetensors", "huggingface-hub", "pillow", "pydantic")
DRAWS = {False: "models of any licence", True: f"models for commercial use only: {SETTING} is set"}


def examine(memory: int | None = None, timed: bool = True) -> dict[str, Any]:
    """Return versions, device, memory, disk, hub and the models that fit, as JSON.

    memory: bytes of another machine's GPU, instead of this machine. timed: measure the speed of this machine.
    """
    import torch
    from huggingface_hub import constants

    from inkstream.engine.machine.fit import fits, here, known, measure_speed
    from inkstream.engine.machine.loader import choose_device, choose_dtype
    from inkstream.engine.machine.memory import SPARE, count_weights, free_memory

    device = choose_device()
    dtype = choose_dtype(None, device)
    free, total = free_memory(device)
    kind, budget = here() if memory is None else ("cuda", int(SPARE * memory))
    speed = measure_speed(device, dtype) if memory is None and timed else None
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
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "system": platform.platform(),
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
        "for": {"kind": kind, "memory_bytes": memory or free, "budget_bytes": budget},
        "models": models,
        "recommended": recommend(models),
    }


def print_findings(findings: dict[str, Any], asked: bool = False) -> None:
    """Print the findings. asked: they are about another machine: facts of this one are left out."""
    device, hub, budget = findings["device"], findings["hub"], findings["for"]["budget_bytes"]
    memory = " of ".join(in_gigabytes(n) if n else "unknown" for n in (device["free_bytes"], device["memory_bytes"]))
    lines = {
        "versions": ", ".join(f"{name} {version}" for name, version in findings["versions"].items()),
        "system": findings["system"],
        "device": f"{device['name']} ({device['title']}), {device['cores']} cores, {memory} free",
        "hub": hub["endpoint"] + (", not used: HF_HUB_OFFLINE is set" if hub["offline"] else ""),
        "cache": f"{hub['cache']}, {in_gigabytes(hub['free_bytes'])} free",
    }
    models = {
        model["name"]: f"{judge(model['fits'], budget)}; {in_words(model['licence'], model['commercial'])}"
        for model in findings["models"]
    }
    card = f"{in_gibibytes(findings['for']['memory_bytes'])}, of which {in_gibibytes(budget or 0)} are planned with"
    about = {"a GPU with": card} if asked else lines
    print_facts({**about, "draws with": DRAWS[findings["commercial_only"]], **models})
    print(advise(findings["models"]))


def recommend(models: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the recommended model among those that fit and may be used, or None."""
    allowed = {m["name"] for m in models if m["fits"] and (m["commercial"] or not is_commercial_only())}
    return next((name for name in RECOMMENDED if name in allowed), None)


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


def in_time(seconds: float) -> str:
    """Return a duration as text, rounded to the precision of the estimate."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


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
