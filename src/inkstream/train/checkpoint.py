"""Checkpoints: a folder for each, safetensors and JSON alone, that appears under its name only when it is whole."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from inkstream.types import InputError
from inkstream.weights.files import read_tensors, write_state


@dataclass(frozen=True)
class Checkpoint:
    """All that the next step depends on, beside the recipe: the data and the noise are functions of the step."""

    step: int  # steps done
    weights: Mapping[str, Tensor]  # float32, `part.name`, of all learners
    ema: Mapping[str, Tensor]  # of those that keep one
    optimiser: Mapping[str, Tensor]
    recipe: Mapping[str, Any]
    cpu_seconds: float = 0.0  # that the run has used; older checkpoints do not say


def save_checkpoint(folder: Path, saved: Checkpoint, keep: int) -> Path:
    """Write folder/step-N and remove all but the last `keep`. What is there before stays whole until this one is."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(".step-*"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    path = folder / f"step-{saved.step:08d}"
    temporary = folder / f".{path.name}.{secrets.token_hex(4)}"
    temporary.mkdir()
    for name in ("weights", "ema", "optimiser"):
        write_state(temporary / f"{name}.safetensors", getattr(saved, name))
    state = {"step": saved.step, "cpu_seconds": saved.cpu_seconds, "recipe": saved.recipe}
    (temporary / "state.json").write_text(json.dumps(state, indent=2, ensure_ascii=False) + "\n", "utf-8")
    for file in (*temporary.iterdir(), temporary):
        _flush(file)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(temporary, path)
    _flush(folder)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole ones, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(path for path in found if (path / "state.json").is_file())


def load_checkpoint(folder: Path) -> Checkpoint:
    """The last checkpoint of a run. InputError where there is none."""
    found = list_checkpoints(folder)
    if not found:
        raise InputError(f"{folder} holds no checkpoint: start without --resume")
    path = found[-1]
    try:
        state = json.loads((path / "state.json").read_text("utf-8"))
        step, recipe, cpu_seconds = int(state["step"]), dict(state["recipe"]), float(state.get("cpu_seconds", 0))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}/state.json is damaged ({error}): remove {path} to go on from an older one") from error
    tensors = {name: read_tensors(path / f"{name}.safetensors") for name in ("weights", "ema", "optimiser")}
    return Checkpoint(step, tensors["weights"], tensors["ema"], tensors["optimiser"], recipe, cpu_seconds)


def _flush(path: Path) -> None:
    """To the disk: a rename may otherwise outlive what it names."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
