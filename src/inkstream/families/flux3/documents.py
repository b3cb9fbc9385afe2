"""The JSON files of a published FLUX.3 folder, made from a Spec."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from inkstream.families import flux_autoencoder, qwen3_vl
from inkstream.families.scheduler import CLASS, SCHEDULER, write_scheduler
from inkstream.types import Spec


def documents(spec: Spec) -> dict[str, dict[str, Any]]:
    """Path in the folder -> content."""
    kind = "Flux3DistilledModularPipeline" if spec.transformer.flow_map else "Flux3ModularPipeline"
    return {
        "model_index.json": {
            "_class_name": kind,
            "_diffusers_version": "0.42.0",
            "scheduler": ["diffusers", CLASS],
            "text_encoder": ["transformers", "Qwen3VLForConditionalGeneration"],
            "tokenizer": ["transformers", "Qwen2TokenizerFast"],
            "transformer": ["diffusers", "Flux3Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKLFlux2"],
        },
        "transformer/config.json": {
            "_class_name": "Flux3Transformer2DModel",
            **asdict(spec.transformer),
            "timestep_channels": 256,
            "eps": 1e-6,
        },
        "text_encoder/config.json": qwen3_vl.document(spec.text_encoder),
        "vae/config.json": flux_autoencoder.document(spec.vae),
        SCHEDULER: write_scheduler(spec),
    }
