"""The file of a trained adapter, with what a reader wants to know of it in its metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

import inkstream
from inkstream.engine.files.merging import names_of
from inkstream.train.models import DTYPES, Start
from inkstream.train.recipe import Recipe, as_tables, as_toml
from inkstream.types import Spec
from inkstream.weights.lora.write import write_lora

ARCHITECTURES = {"zimage": "Z-Image", "flux1": "flux-1-dev", "flux2": "flux-2-dev"}
"""Family -> its name in `modelspec.architecture`, as musubi-tuner and kohya's scripts write it."""


def adapter_name(recipe: Recipe, folder: Path) -> str:
    """Return the name of the adapter's files."""
    return recipe.model.name or folder.resolve().name


def write_adapter(path: Path, recipe: Recipe, begun: Start, tensors: Mapping[str, Tensor], step: int) -> Path:
    """Write the adapter that a checkpoint's tensors hold. The file appears when it is complete. Returns its path."""
    assert begun.adapter is not None
    own = {key.partition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith("adapter.")}
    path.parent.mkdir(parents=True, exist_ok=True)
    names, said = names_of(begun.spec), metadata_of(recipe, begun.spec, path.stem, step)
    return write_lora(path, begun.adapter.lora(own), names, recipe.adapter.format, said, DTYPES[recipe.run.export])


def metadata_of(recipe: Recipe, base: Spec, name: str, step: int) -> dict[str, str]:
    """Return what the file says of itself: keys of kohya's scripts (ss_*), of modelspec 1.0.1, and the whole recipe."""
    run, data = recipe.run, recipe.data
    sizes = ",".join(f"{width}x{height}" for width, height in data.sizes)
    facts = {
        "ss_base_model_version": base.family,
        "ss_sd_model_name": base.name,
        "ss_learning_rate": recipe.optimiser.lr,
        "ss_optimizer": recipe.optimiser.kind,
        "ss_resolution": sizes,
        "ss_batch_size_per_device": run.batch,
        "ss_steps": step,
        "ss_max_train_steps": run.steps,
        "ss_seed": run.seed,
        "ss_output_name": name,
        "modelspec.architecture": f"{ARCHITECTURES.get(base.family, base.family)}/lora",
        "modelspec.implementation": "inkstream",
        "modelspec.title": recipe.model.title or name,
        "modelspec.resolution": "x".join(map(str, data.sizes[0])),
        "modelspec.prediction_type": "flow",
        "modelspec.trigger_phrase": data.trigger,
        "inkstream.version": inkstream.__version__,
        "inkstream.recipe": as_toml(as_tables(recipe)),
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items() if value != ""}
