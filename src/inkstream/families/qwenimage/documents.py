"""The JSON files of a published Qwen-Image 2.1 folder, made from a Spec."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from inkstream.families import qwen3_vl
from inkstream.families.scheduler import CLASS, SCHEDULER, write_scheduler
from inkstream.types import Spec


def documents(spec: Spec) -> dict[str, dict[str, Any]]:
    """Path in the folder -> content."""
    return {
        "model_index.json": {
            "_class_name": "QwenImage21Pipeline",
            "_diffusers_version": "0.42.0",
            "scheduler": ["diffusers", CLASS],
            "text_encoder": ["transformers", "Qwen3VLForConditionalGeneration"],
            "processor": ["transformers", "Qwen3VLProcessor"],
            "transformer": ["diffusers", "QwenImage21Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKLQwenImage21"],
            **({"sample_sigmas": list(spec.times[:-1])} if spec.times else {}),
        },
        "transformer/config.json": {
            "_class_name": "QwenImage21Transformer2DModel",
            "patch_size": 1,
            **asdict(spec.transformer),
            "eps": 1e-6,
            "causal_condition": True,
        },
        "text_encoder/config.json": qwen3_vl.document(spec.text_encoder),
        "vae/config.json": {"_class_name": "AutoencoderKLQwenImage21", **asdict(spec.vae), "is_residual": True},
        SCHEDULER: write_scheduler(spec),
    }
