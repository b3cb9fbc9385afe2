"""Qwen3-VL's language model as a text encoder, which families share: its Part, its tokens, its config.json."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from inkstream.families import Part, Shapes
from inkstream.families.parts import QWEN3, infer_qwen3, neutral_layer
from inkstream.nn.config import Qwen3VLConfig
from inkstream.nn.qwen3 import Qwen3
from inkstream.weights.keymap import Rule, drop, rename

PAD = "<|endoftext|>"
PADS_AT = 1
"""The position of all padding tokens, with which models were trained that attend to padding."""

_TRANSFORMERS: tuple[Rule, ...] = (
    *(
        rename(f"{prefix}{name}", name)
        for prefix in ("model.language_model.", "language_model.", "model.")
        for name in ("embed_tokens", "layers", "norm")
    ),
    drop("model.visual"),
    drop("visual"),
    drop("lm_head"),  # a text encoder does not generate
)


def text_encoder(config: type[Qwen3VLConfig]) -> Part:
    """The Part of a text encoder. config: a dataclass with `depths`, the states that the family reads."""

    def infer(shapes: Shapes) -> Any:
        sizes = asdict(infer_qwen3(shapes))
        return config(**{**sizes, "rope_theta": Qwen3VLConfig.rope_theta})

    return replace(
        QWEN3,
        build=lambda config: Qwen3(config, config.depths, PADS_AT),
        config=config,
        layouts={"transformers": _TRANSFORMERS, "gguf": QWEN3.layouts["gguf"]},
        infer=infer,
        unread=lambda config: (*(f"layers.{i}." for i in _unread(config)), "norm."),
        neutral=neutral,
        gguf="qwen3vl",
    )


def _unread(config: Any) -> range:
    return range(max(config.depths), config.num_hidden_layers)


def neutral(config: Any) -> dict[str, Tensor]:
    """Weights of the layers that are not read, which add nothing to their input, and of the final norm."""
    layers = [neutral_layer(replace(config, num_hidden_layers=i + 1)) for i in _unread(config)]
    return {key: tensor for layer in layers for key, tensor in layer.items()}


def document(config: Qwen3VLConfig) -> dict[str, Any]:
    """The text encoder's config.json, without the vision tower."""
    sizes = asdict(config)
    theta = sizes.pop("rope_theta")
    section = [round(config.head_dim * share) for share in (3 / 16, 5 / 32, 5 / 32)]
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_interleaved": True, "mrope_section": section}
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "text_config": {"model_type": "qwen3_vl_text", **sizes, "rope_theta": theta, "rope_parameters": rope},
        "tie_word_embeddings": True,
    }
