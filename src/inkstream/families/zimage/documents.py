"""The JSON files of a published Z-Image folder, as diffusers and transformers read them, made from a Spec."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from inkstream.families.scheduler import CLASS, SCHEDULER, write_scheduler
from inkstream.families.zimage.specs import ZImageConfig
from inkstream.nn.config import Qwen3Config, VAEConfig
from inkstream.types import Spec


def documents(spec: Spec) -> dict[str, dict[str, Any]]:
    """Path in the folder -> content."""
    return {
        "model_index.json": {
            "_class_name": "ZImagePipeline",
            "_diffusers_version": "0.36.0",  # the first version with the pipeline
            "scheduler": ["diffusers", CLASS],
            "text_encoder": ["transformers", "Qwen3Model"],
            "tokenizer": ["transformers", "Qwen2Tokenizer"],
            "transformer": ["diffusers", "ZImageTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
        "transformer/config.json": _transformer(spec.transformer),
        "text_encoder/config.json": _text_encoder(spec.text_encoder),
        "vae/config.json": _vae(spec.vae),
        SCHEDULER: write_scheduler(spec),
    }


def _transformer(config: ZImageConfig) -> dict[str, Any]:
    sizes = asdict(config)
    return {
        "_class_name": "ZImageTransformer2DModel",
        "all_patch_size": [sizes.pop("patch_size")],
        "all_f_patch_size": [1],
        **sizes,
        "n_kv_heads": config.n_heads,
        "qk_norm": True,
    }


def _text_encoder(config: Qwen3Config) -> dict[str, Any]:
    sizes = asdict(config)
    theta = sizes.pop("rope_theta")
    return {
        "architectures": ["Qwen3Model"],
        "model_type": "qwen3",
        **sizes,
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": 40_960,
        "rope_theta": theta,  # read by transformers 4; version 5 reads rope_parameters
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": True,
    }


def _vae(config: VAEConfig) -> dict[str, Any]:
    levels = len(config.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        **asdict(config),
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "force_upcast": True,
        "sample_size": 1024,
    }
