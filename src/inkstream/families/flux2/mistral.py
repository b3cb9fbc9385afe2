"""Mistral Small as FLUX.2 dev's text encoder, by transformers, without layers after the deepest state that is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from inkstream.families import Shapes
from inkstream.families.parts import LLAMA_CPP
from inkstream.nn.config import MistralConfig
from inkstream.types import InputError
from inkstream.weights.keymap import Rule, drop, rename

READ = 30
"""The layer count of files that hold only the layers that are read, such as ComfyUI's."""


class MistralText(nn.Module):
    """Mistral's decoder without its head. It returns the states at `depths`, before any final norm.

    Depth 0 is the embedding, k is the output of layer k. Raises InputError where transformers is not installed.
    """

    def __init__(self, config: MistralConfig, depths: Sequence[int]):
        super().__init__()
        self.depths = tuple(depths)
        self.model = build_mistral(config, max(depths))
        self.model.norm = nn.Identity()

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask: (B, L), mask 1 at text, 0 at padding -> (B, L, D * len(depths))."""
        out = self.model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        return torch.cat([out.hidden_states[depth] for depth in self.depths], dim=-1)


def build_mistral(config: MistralConfig, layers: int) -> Any:
    """transformers' MistralModel with this many layers. Raises InputError where transformers is not installed."""
    try:
        from transformers import MistralModel
        from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
    except ImportError:
        raise InputError(
            "FLUX.2 dev reads prompts through transformers, which is not installed: pip install 'inkstream[flux]'"
        ) from None
    theirs = their_config(config, layers)
    model: Any = MistralModel(theirs)
    with torch.device("cpu"):  # no file holds its buffers
        model.rotary_emb = MistralRotaryEmbedding(theirs)
    return model


def their_config(config: MistralConfig, layers: int) -> Any:
    """The config as transformers' class."""
    from transformers import MistralConfig as TheirConfig

    sizes = {field.name: getattr(config, field.name) for field in fields(MistralConfig)}
    theta = sizes.pop("rope_theta")
    return TheirConfig(
        **{**sizes, "num_hidden_layers": layers},
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        sliding_window=None,
        pad_token_id=None,
    )


def infer_mistral(shapes: Shapes) -> MistralConfig:
    """Sizes from the shapes of the weights. Heads are assumed to be 128 wide; the rest is as in Mistral Small."""
    vocabulary, width = shapes["model.embed_tokens.weight"]
    layers = len({name.split(".")[2] for name in shapes if name.startswith("model.layers.")})
    queries, keys = (shapes[f"model.layers.0.self_attn.{name}_proj.weight"][0] for name in "qk")
    if queries % MistralConfig.head_dim or keys % MistralConfig.head_dim:
        raise KeyError("head_dim")
    return MistralConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=MistralConfig.num_hidden_layers if layers == READ else layers,
        num_attention_heads=queries // MistralConfig.head_dim,
        num_key_value_heads=keys // MistralConfig.head_dim,
        intermediate_size=shapes["model.layers.0.mlp.gate_proj.weight"][0],
    )


def count_mistral(config: MistralConfig, depth: int) -> int:
    """The parameter count of the embedding and `depth` layers."""
    d, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    attention = 2 * d * heads + 2 * d * config.num_key_value_heads * config.head_dim
    return config.vocab_size * d + depth * (attention + 3 * d * config.intermediate_size + 2 * d)


LAYOUTS: Mapping[str, Sequence[Rule]] = {
    "transformers": (
        rename("language_model.model", "model"),
        rename("model.language_model", "model"),
        *map(drop, ("language_model.lm_head", "lm_head")),  # a text encoder does not generate
        *map(drop, ("vision_tower", "model.vision_tower", "multi_modal_projector", "model.multi_modal_projector")),
        drop("tekken_model"),  # ComfyUI's file holds the tokenizer too
    ),
    "gguf": (
        rename("token_embd", "model.embed_tokens"),
        *(
            rename(f"blk.{{}}.{theirs}", f"model.layers.{{}}.{ours}", interleaved=theirs in ("attn_q", "attn_k"))
            for theirs, ours in LLAMA_CPP.items()
        ),
        rename("output_norm", "model.norm"),
        *map(drop, ("output", "rope_freqs")),
    ),
}
"""In GGUF files, of llama.cpp's architecture llama, rows of queries and keys have its order for rotary embeddings."""
