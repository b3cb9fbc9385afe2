"""FLUX.1's prompts: one vector from CLIP, 256 or 512 states from T5, both by transformers. Padding is not masked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inkstream.families import Part, Shapes
from inkstream.nn.config import CLIPTextConfig, T5Config
from inkstream.nn.offload import where_it_computes
from inkstream.types import Conditioning, InputError
from inkstream.weights.keymap import drop, rename

CLIP_TOKENS = 77
T5_TOKENS, SCHNELL_TOKENS = 512, 256
"""T5 prompts are truncated or padded to this length. schnell was trained on 256, the others on 512."""


def clip_tokens(tokenizer: Any, prompt: str) -> tuple[int, ...]:
    """The prompt's 77 tokens, truncated or padded. tokenizer: transformers' CLIPTokenizer."""
    return _padded(tokenizer, prompt, CLIP_TOKENS)


def t5_tokens(tokenizer: Any, prompt: str, length: int) -> tuple[int, ...]:
    """The prompt's `length` tokens, truncated or padded. tokenizer: transformers' T5Tokenizer."""
    return _padded(tokenizer, prompt, length)


def encode_clip(encoder: CLIPText, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Prompts, as returned by `clip_tokens` -> (P, D), one vector each."""
    return encoder(torch.tensor(prompts, device=where_it_computes(encoder)[0]))


def encode_t5(encoder: T5Text, prompts: Sequence[Sequence[int]]) -> Conditioning:
    """Encodes prompts, as returned by `t5_tokens`, all of one length. The transformer reads padding states too."""
    states = encoder(torch.tensor(prompts, device=where_it_computes(encoder)[0]))  # (P, L, D)
    return Conditioning(states.flatten(0, 1), (states.shape[1],) * len(prompts))


def load_clip_tokenizer(path: Path | str) -> Any:
    """Reads CLIP's tokenizer from a folder. Raises InputError if it is unreadable."""
    return _load_tokenizer(path, "CLIPTokenizer")


def load_t5_tokenizer(path: Path | str) -> Any:
    """Reads T5's tokenizer from a folder. Raises InputError if it is unreadable."""
    return _load_tokenizer(path, "T5Tokenizer")


class CLIPText(nn.Module):
    """CLIP's text model: ids (B, 77) -> the state at each prompt's end (B, D)."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        transformers = need_transformers()
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**asdict(config)))
        self.text_model: Any = getattr(model, "text_model", model)  # earlier versions wrap it
        with torch.device("cpu"):  # no file holds this buffer
            self.text_model.embeddings.position_ids = torch.arange(config.max_position_embeddings)[None]

    def forward(self, ids: Tensor) -> Tensor:
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        return self.text_model(input_ids=ids, position_ids=positions).pooler_output


class T5Text(nn.Module):
    """T5's encoder: ids (B, L) -> states (B, L, D)."""

    def __init__(self, config: T5Config):
        super().__init__()
        transformers = need_transformers()
        theirs = transformers.T5Config(**asdict(config), is_encoder_decoder=False, use_cache=False)
        self.encoder: Any = transformers.models.t5.modeling_t5.T5Stack(theirs)

    def forward(self, ids: Tensor) -> Tensor:
        return self.encoder(input_ids=ids).last_hidden_state


def infer_clip(shapes: Shapes) -> CLIPTextConfig:
    """Sizes from the shapes of the weights. Heads are assumed to be 64 wide; the rest is as in CLIP ViT-L/14."""
    vocabulary, width = shapes["text_model.embeddings.token_embedding.weight"]
    if width % 64:
        raise KeyError("num_attention_heads")
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=_count(shapes, "text_model.encoder.layers."),
        num_attention_heads=width // 64,
        intermediate_size=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        max_position_embeddings=shapes["text_model.embeddings.position_embedding.weight"][0],
    )


def infer_t5(shapes: Shapes) -> T5Config:
    """Sizes from the shapes of the weights. The rest is as in T5 1.1."""
    vocabulary, width = shapes["encoder.embed_tokens.weight"]
    attention = "encoder.block.0.layer.0.SelfAttention."
    buckets, heads = shapes[attention + "relative_attention_bias.weight"]
    return T5Config(
        vocab_size=vocabulary,
        d_model=width,
        d_kv=shapes[attention + "q.weight"][0] // heads,
        d_ff=shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
        num_layers=_count(shapes, "encoder.block."),
        num_heads=heads,
        relative_attention_num_buckets=buckets,
    )


def count_clip(config: CLIPTextConfig) -> int:
    d, hidden = config.hidden_size, config.intermediate_size
    layer = 4 * (d * d + d) + 2 * d * hidden + hidden + d + 4 * d  # attention, MLP, two norms
    return (config.vocab_size + config.max_position_embeddings) * d + config.num_hidden_layers * layer + 2 * d


def count_t5(config: T5Config) -> int:
    d, inner = config.d_model, config.num_heads * config.d_kv
    layer = 4 * d * inner + 3 * d * config.d_ff + 2 * d
    buckets = config.relative_attention_num_buckets * config.num_heads
    return config.vocab_size * d + buckets + config.num_layers * layer + d


_LLAMA_CPP = (
    rename("token_embd", "encoder.embed_tokens"),
    rename("enc.output_norm", "encoder.final_layer_norm"),
    *map(drop, ("dec", "output")),  # of files with the whole T5
    *(
        rename(f"enc.blk.{{}}.{theirs}", f"encoder.block.{{}}.layer.{ours}")
        for theirs, ours in (
            ("attn_norm", "0.layer_norm"),
            ("attn_q", "0.SelfAttention.q"),
            ("attn_k", "0.SelfAttention.k"),
            ("attn_v", "0.SelfAttention.v"),
            ("attn_o", "0.SelfAttention.o"),
            ("attn_rel_b", "0.SelfAttention.relative_attention_bias"),
            ("ffn_norm", "1.layer_norm"),
            ("ffn_gate", "1.DenseReluDense.wi_0"),
            ("ffn_up", "1.DenseReluDense.wi_1"),
            ("ffn_down", "1.DenseReluDense.wo"),
        )
    ),
)

CLIP = Part(
    build=CLIPText,
    count=count_clip,
    config=CLIPTextConfig,
    layouts={
        "transformers": (
            drop("text_model.embeddings.position_ids"),
            *map(drop, ("text_projection", "logit_scale", "vision_model", "visual_projection")),
        ),
        "bare": tuple(rename(name, f"text_model.{name}") for name in ("embeddings", "encoder", "final_layer_norm")),
    },
    infer=infer_clip,
    comfyui=lambda config: "comfy/sd1_tokenizer",
)

T5 = Part(
    build=T5Text,
    count=count_t5,
    config=T5Config,
    layouts={
        "diffusers": (
            drop("encoder.embed_tokens"),  # files often hold both
            rename("shared", "encoder.embed_tokens"),
            *map(drop, ("spiece_model", "decoder", "lm_head")),
        ),
        "encoder": (drop("spiece_model"),),
        "gguf": _LLAMA_CPP,
    },
    infer=infer_t5,
    packs=(
        "encoder.embed_tokens",
        "encoder.block.{}.layer.{}.DenseReluDense",
        *(f"encoder.block.{{}}.layer.{{}}.SelfAttention.{name}" for name in "qkvo"),
    ),
    gguf="t5encoder",
    comfyui=lambda config: "comfy/text_encoders/t5_tokenizer",
)


def _padded(tokenizer: Any, prompt: str, length: int) -> tuple[int, ...]:
    return tuple(tokenizer(prompt, padding="max_length", max_length=length, truncation=True).input_ids)


def _load_tokenizer(path: Path | str, kind: str) -> Any:
    try:
        return getattr(need_transformers(), kind).from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(f"the tokenizer in {path} cannot be read ({reason}): copy the model's there") from None


def _count(shapes: Shapes, prefix: str) -> int:
    """How many different name segments follow the prefix."""
    return len({name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)})


def need_transformers() -> Any:
    """Imports transformers, which takes seconds. Raises InputError if it is not installed."""
    try:
        import transformers
    except ImportError:
        raise InputError(
            "FLUX.1 reads prompts through transformers, which is not installed: pip install 'inkstream[flux]'"
        ) from None
    return transformers
