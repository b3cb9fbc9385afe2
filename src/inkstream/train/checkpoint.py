"""Checkpoints: each one is a folder of safetensors and JSON files, and it gets its final name when it is complete."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from inkstream.disk import PART, flush_to_disk, whole_folder
from inkstream.types import InputError
from inkstream.weights.files import read_tensors, write_state


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a step. Data and noise are functions of the step, so a checkpoint does not hold them."""

    step: int  # number of steps done
    weights: Mapping[str, Tensor]  # float32 weights of all learners, by `part.name`
    ema: Mapping[str, Tensor]  # averaged weights of the learners that keep an average
    optimiser: Mapping[str, Tensor]
    recipe: Mapping[str, Any]
    cpu_seconds: float = 0.0  # CPU time of the run so far; 0 in older checkpoints


def save_checkpoint(folder: Path, saved: Checkpoint, keep: int) -> Path:
    """Write folder/step-N, then remove all checkpoints but the last `keep`. The write is atomic."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f".*{PART}"):  # left by a killed process
        shutil.rmtree(left, ignore_errors=True)
    path = folder / f"step-{saved.step:08d}"
    state = {"step": saved.step, "cpu_seconds": saved.cpu_seconds, "recipe": saved.recipe}
    with whole_folder(path, flush=True, replace=True) as temporary:
        for name in ("weights", "ema", "optimiser"):
            write_state(temporary / f"{name}.safetensors", getattr(saved, name))
        (temporary / "state.json").write_text(json.dumps(state, indent=2, ensure_ascii=False) + "\n", "utf-8")
    flush_to_disk(folder)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the paths of the complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(path for path in found if (path / "state.json").is_file())


def load_checkpoint(folder: Path) -> Checkpoint:
    """Load the last checkpoint of a run. Raises InputError if there is none or it is damaged."""
    found = list_checkpoints(folder)
    if not found:
        raise InputError(f"{folder} holds no checkpoint: start without --resume")
    path = found[-1]
    try:
        state = json.loads((path / "state.json").read_text("utf-8"))
        step, recipe, cpu_seconds = int(state["step"]), dict(state["recipe"]), float(state.get("cpu_seconds", 0))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}/state.json is damaged ({error}): remove {path} to resume an older one") from error
    tensors = {name: read_tensors(path / f"{name}.safetensors") for name in ("weights", "ema", "optimiser")}
    return Checkpoint(step, tensors["weights"], tensors["ema"], tensors["optimiser"], recipe, cpu_seconds)
