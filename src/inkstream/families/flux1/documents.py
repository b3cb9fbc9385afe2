"""The JSON files of a published FLUX.1 folder, as diffusers and transformers read them, made from a Spec."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from inkstream.families.scheduler import CLASS, SCHEDULER, write_scheduler
from inkstream.types import Spec


def documents(spec: Spec) -> dict[str, dict[str, Any]]:
    """Path in the folder -> content."""
    redux = spec.image_embedder is not None
    return {
        "model_index.json": {
            "_class_name": _pipeline(spec),
            "_diffusers_version": "0.34.0",  # the first version with Kontext
            "scheduler": ["diffusers", CLASS],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "T5EncoderModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "T5TokenizerFast"],
            "transformer": ["diffusers", "FluxTransformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            **(_REDUX if redux else {}),
        },
        "transformer/config.json": {
            "_class_name": "FluxTransformer2DModel", "patch_size": 1, **asdict(spec.transformer),
        },
        "text_encoder/config.json": {
            "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **asdict(spec.text_encoder),
        },
        "text_encoder_2/config.json": {
            "architectures": ["T5EncoderModel"], "model_type": "t5", "is_encoder_decoder": True,
            "tie_word_embeddings": False, **asdict(spec.text_encoder_2),
        },
        "vae/config.json": _vae(spec),
        SCHEDULER: write_scheduler(spec),
        **(_redux(spec) if redux else {}),
    }  # fmt: skip


_REDUX = {  # FluxPipeline does not know image_embedder; FluxPriorReduxPipeline knows both
    "image_encoder": ["transformers", "SiglipVisionModel"],
    "image_embedder": ["diffusers", "ReduxImageEncoder"],
}


def _redux(spec: Spec) -> dict[str, Any]:
    siglip = {"architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model"}
    return {
        "image_encoder/config.json": {**siglip, **asdict(spec.image_encoder)},
        "image_embedder/config.json": {"_class_name": "ReduxImageEncoder", **asdict(spec.image_embedder)},
    }


def _pipeline(spec: Spec) -> str:
    if spec.image_embedder is not None:
        return "FluxPipeline"
    kinds = {"fill": "FluxFillPipeline", "map": "FluxControlPipeline", "references": "FluxKontextPipeline"}
    return next((kind for ability, kind in kinds.items() if ability in spec.abilities), "FluxPipeline")


def _vae(spec: Spec) -> dict[str, Any]:
    levels = len(spec.vae.block_out_channels)
    return {
        "_class_name": "AutoencoderKL",
        **asdict(spec.vae),
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "force_upcast": True,
        "sample_size": 1024,
    }
