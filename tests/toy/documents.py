"""The JSON files of a published toy folder, from a Spec."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from inkstream.families.scheduler import SCHEDULER, write_scheduler
from inkstream.types import Spec


def documents(spec: Spec) -> dict[str, dict[str, Any]]:
    """Path in the folder -> content."""
    return {
        "model_index.json": {
            "_class_name": "ToyPipeline",
            "text_encoder": ["transformers", "Qwen3Model"],
            "tokenizer": ["transformers", "Qwen2Tokenizer"],
            "transformer": ["diffusers", "ToyTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        "transformer/config.json": {"_class_name": "ToyTransformer2DModel", **asdict(spec.transformer)},
        "text_encoder/config.json": {"model_type": "qwen3", **asdict(spec.text_encoder)},
        "vae/config.json": {"_class_name": "AutoencoderKL", **asdict(spec.vae)},
        SCHEDULER: write_scheduler(spec),
    }
