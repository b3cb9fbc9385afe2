"""CLIP-like metrics: how well a picture fits its prompt, told by two encoders whose weights the user has.

They are models of transformers (the extra `flux`). Nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from inkstream.types import InputError


@dataclass(frozen=True)
class Kind:
    """A metric. value: of the model's outputs. models: its `model_type`s. padding: of the prompt's tokens."""

    about: str
    models: tuple[str, ...]
    padding: bool | str
    value: Callable[[Any, Any], Tensor]


def _cosine(model: Any, out: Any) -> Tensor:
    return 100 * (out.logits_per_image / model.logit_scale.exp()).clamp(min=0)


KINDS = {
    "clip": Kind("CLIPScore: 100 times the cosine, at least 0 (arXiv 2104.08718)", ("clip",), True, _cosine),
    "pickscore": Kind("PickScore, learnt from people's choices (arXiv 2305.01569)", ("clip",), True,
                      lambda model, out: out.logits_per_image),
    "siglip": Kind("SigLIP's probability that picture and prompt belong together (arXiv 2303.15343)",
                   ("siglip", "siglip2"), "max_length", lambda model, out: out.logits_per_image.sigmoid()),
}  # fmt: skip
"""Names of metrics, as in `clip:FOLDER`."""


class Metric:
    """Values how well a picture fits its prompt. Prompts are cut to the length that the model reads."""

    def __init__(self, name: str):
        """Read the metric that a name such as `clip:FOLDER` says. Raises InputError if that is not possible."""
        kind, colon, place = name.partition(":")
        if kind not in KINDS or not colon or not place:
            raise InputError(
                f"metric {name[:100]!r} is not known: write {', '.join(f'{kind}:FOLDER' for kind in KINDS)}"
            )
        self.kind = KINDS[kind]
        folder = Path(place).expanduser()
        self.name = f"{kind}:{folder.name}"
        try:
            found = json.loads((folder / "config.json").read_bytes()).get("model_type")
        except (OSError, ValueError, AttributeError):
            raise InputError(f"{place} is no folder of a model: it needs config.json and the weights") from None
        if found not in self.kind.models:
            raise InputError(f"{place} is of the kind {found}, and {kind} needs {' or '.join(self.kind.models)}")
        try:
            from transformers import AutoModel, AutoProcessor
        except ImportError:
            raise InputError(f"metric {kind} needs transformers: pip install 'inkstream[flux]'") from None
        try:
            self.model: Any = AutoModel.from_pretrained(folder, local_files_only=True).eval()
            self.processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise InputError(f"{place} cannot be read ({reason}): give a folder as transformers saves it") from None
        self.length = self.model.config.text_config.max_position_embeddings

    @torch.inference_mode()
    def __call__(self, picture: Image.Image, prompt: str) -> float:
        inputs = self.processor(
            text=[prompt],
            images=[picture.convert("RGB")],
            padding=self.kind.padding,
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        )
        return float(self.kind.value(self.model, self.model(**inputs)))
