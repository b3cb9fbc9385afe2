"""The JSON files of a published FLUX.2 folder, as diffusers and transformers read them, made from a Spec."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from inkstream.families.flux2.specs import Flux2Config
from inkstream.families.flux_autoencoder import document
from inkstream.families.scheduler import CLASS, SCHEDULER, write_scheduler
from inkstream.nn.config import MistralConfig, Qwen3Config
from inkstream.types import Spec


def documents(spec: Spec) -> dict[str, dict[str, Any]]:
    """Path in the folder -> content."""
    klein = isinstance(spec.text_encoder, Qwen3Config)
    kv = "references_once" in spec.abilities
    pipeline = ("Flux2KleinKVPipeline" if kv else "Flux2KleinPipeline") if klein else "Flux2Pipeline"
    index: dict[str, Any] = {
        "_class_name": pipeline,
        "_diffusers_version": "0.37.0",  # the first version with klein
        "scheduler": ["diffusers", CLASS],
        "text_encoder": ["transformers", "Qwen3ForCausalLM" if klein else "Mistral3ForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2TokenizerFast" if klein else "PixtralProcessor"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    if klein and not kv:
        index["is_distilled"] = spec.guides == "none"
    return {
        "model_index.json": index,
        "transformer/config.json": _transformer(spec.transformer),
        "text_encoder/config.json": _qwen3(spec.text_encoder) if klein else _mistral(spec.text_encoder),
        "vae/config.json": document(spec.vae),
        SCHEDULER: write_scheduler(spec),
    }


def _transformer(config: Flux2Config) -> dict[str, Any]:
    sizes = asdict(config)
    return {
        "_class_name": "Flux2Transformer2DModel",
        "patch_size": 1,
        **sizes,
        "timestep_guidance_channels": 256,
        "eps": 1e-6,
    }


def _qwen3(config: Qwen3Config) -> dict[str, Any]:
    sizes = asdict(config)
    theta = sizes.pop("rope_theta")
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **sizes,
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": 40_960,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": True,
    }


def _mistral(config: MistralConfig) -> dict[str, Any]:
    sizes = asdict(config)
    theta = sizes.pop("rope_theta")
    rope = {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "text_config": {"model_type": "mistral", **sizes, **rope, "hidden_act": "silu", "sliding_window": None},
    }
