"""What this machine has, and which models fit it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inkstream.cli.lines import in_gigabytes, print_facts
from inkstream.engine.licences import SETTING, in_words, is_commercial_only
from inkstream.families import SPECS

PACKAGES = ("inkstream", "torch", "tokenizers", "safetensors", "huggingface-hub", "pillow", "pydantic")
DTYPES = ("bf16", "fp32")
DRAWS = {False: "models of any licence", True: f"models for commercial use alone: {SETTING} is set"}
ROOM = 2_000_000_000
"""Bytes to leave for a picture of 1024x1024 while it is drawn."""


def examine() -> dict[str, Any]:
    """Versions, device, memory, disk, hub and the models that fit, as JSON."""
    import torch
    from huggingface_hub import constants

    from inkstream.engine.loader import DTYPES as BY_NAME
    from inkstream.engine.loader import choose_device, choose_dtype
    from inkstream.engine.memory import count_weights, free_memory, weigh

    device = choose_device()
    own = next(name for name in DTYPES if BY_NAME[name] == choose_dtype(None, device))
    free, total = free_memory(device)
    cache = Path(constants.HF_HUB_CACHE)
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    models = []
    for spec in SPECS.values():
        if spec.repo or spec.folder:
            weights = count_weights(spec)
            needs = {name: weigh(weights, name, device) for name in DTYPES}
            licence = {"licence": spec.licence, "commercial": spec.commercial}
            fact = {"name": spec.name, **licence, "weights": weights, "needs_bytes": needs}
            models.append(fact | {"verdict": judge(needs, own, free)})
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
            "dtype": own,
        },
        "hub": {
            "endpoint": constants.ENDPOINT,
            "cache": str(cache),
            "free_bytes": shutil.disk_usage(there).free,
            "offline": constants.HF_HUB_OFFLINE,
        },
        "commercial_only": is_commercial_only(),
        "models": models,
    }


def judge(needs: Mapping[str, int], own: str, free: int | None) -> str:
    """Whether weights that need so many bytes in each dtype fit, and how. own: the dtype the device takes unasked."""
    sizes = ", ".join(f"{in_gigabytes(size)} in {name}" for name, size in needs.items())
    fits = [name for name in (own, *needs) if free is None or needs[name] + ROOM <= free]
    if not fits:
        return f"does not fit: its weights take {sizes}, and {in_gigabytes(free or 0)} are free"
    return f"fits{'' if fits[0] == own else f' with --dtype {fits[0]}'}: its weights take {sizes}"


def print_findings(findings: dict[str, Any]) -> None:
    """The same as lines."""
    device, hub = findings["device"], findings["hub"]
    memory = " of ".join(in_gigabytes(n) if n else "unknown" for n in (device["free_bytes"], device["memory_bytes"]))
    lines = {
        "versions": ", ".join(f"{name} {version}" for name, version in findings["versions"].items()),
        "system": findings["system"],
        "device": f"{device['name']} ({device['title']}), {device['cores']} cores, {memory} free",
        "hub": hub["endpoint"] + (", not asked: HF_HUB_OFFLINE is set" if hub["offline"] else ""),
        "cache": f"{hub['cache']}, {in_gigabytes(hub['free_bytes'])} free",
    }
    models = {
        model["name"]: f"{model['verdict']}; {in_words(model['licence'], model['commercial'])}"
        for model in findings["models"]
    }
    print_facts({**lines, "draws with": DRAWS[findings["commercial_only"]], **models})
