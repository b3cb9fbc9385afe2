"""Whether a model that is distilled to few steps still draws in few steps with an adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from inkstream.engine.drawing.complete import complete
from inkstream.engine.drawing.model import Model, advance
from inkstream.engine.files.merging import names_of
from inkstream.nn.around import NOTHING, Around
from inkstream.train.adapters import fixed
from inkstream.train.models import DTYPES, start
from inkstream.train.recipe import Model as Base
from inkstream.train.recipe import Recipe
from inkstream.train.tasks import tile
from inkstream.types import Request, Spec
from inkstream.weights.lora.read import read_lora

FEW = 8
"""The most steps that distilled models draw in."""
SOFT = 0.6
"""The share of their sharpness below which pictures count as broken."""
WEAK = 0.02
"""The mean change of pixels, of the whole range, below which an adapter counts as without effect."""


def is_distilled(spec: Spec) -> bool:
    """Return whether a model is distilled to few steps without guidance."""
    return spec.steps <= FEW and "guidance" not in spec.abilities


def unlearning(spec: Spec) -> str:
    """Return the warning for a distilled model that is trained on without an assistant."""
    return (
        f"{spec.name} is distilled to {spec.steps} steps, and training unlearns this: name a de-distillation adapter "
        "in [adapter] assistant, or train on the model that it was distilled from, with this one in [adapter] transfer"
    )


def sharpness(picture: Image.Image) -> float:
    """Return the mean difference of neighbour pixels, in levels of 0 to 255."""
    levels = np.asarray(picture.convert("L"), np.float32)
    return float(np.abs(np.diff(levels, axis=0)).mean() + np.abs(np.diff(levels, axis=1)).mean())


def softened(picture: Image.Image, before: Image.Image) -> str:
    """Return a warning if pictures are much less sharp than before, as where few-step drawing breaks; else ""."""
    share = sharpness(picture) / max(sharpness(before), 1e-6)
    if share >= SOFT:
        return ""
    return (
        f"the pictures are {share:.0%} as sharp as without the adapter: drawing in few steps breaks; "
        "take an earlier step, a lower lr, or an [adapter] assistant"
    )


def check_transfer(recipe: Recipe, path: Path, sheet: Path, device: torch.device) -> list[str]:
    """Draw the prompts with a distilled model, without the adapter above and with it below. Returns warnings.

    path: the adapter's file. sheet: where the pictures go. Raises InputError if the adapter does not fit the model.
    """
    begun = start(replace(recipe, model=Base(from_=recipe.adapter.transfer)), device)
    model = Model(begun.family(), device, DTYPES[recipe.run.dtype])
    lora = read_lora(path, names_of(model.spec))
    around = Around(adapters=(fixed(lora, begun.modules["transformer"], model.dtype, device),))
    plain, ours = (
        torch.stack([draw(model, prompt, seed, each) for seed, prompt in enumerate(recipe.run.prompts)])
        for each in (NOTHING, around)
    )
    sheet.parent.mkdir(parents=True, exist_ok=True)
    tile(torch.cat([plain, ours]), len(plain)).save(sheet)
    warnings = [softened(tile(ours), tile(plain))]
    if (effect := float((ours - plain).abs().mean())) < WEAK:
        warnings.append(
            f"the adapter changes the pictures of {model.spec.name} by {effect:.1%} of the range: draw with a strength "
            "above 1, or train for more steps"
        )
    return [f"{model.spec.name}: {text}" for text in warnings if text]


def draw(model: Model, prompt: str, seed: int, around: Around) -> Tensor:
    """Return a picture of the run's first size in the model's own steps, (3, H, W) in [0, 1]."""
    request = complete(Request.model_validate({"prompt": prompt, "seed": seed}), model.spec)
    run = model.start(request, model.encode(request), None, around=around)
    while run.query is not None:
        advance(model.family, [run])
    return model.finish(run)
