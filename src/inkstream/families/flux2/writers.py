"""FLUX.2's language models: the layers, norm and head that the text encoder leaves out, and dev's vision tower."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from inkstream.families import Part, Shapes
from inkstream.families.flux2.mistral import MistralText, build_mistral, infer_mistral, their_config
from inkstream.families.flux2.text import depths, pad_id
from inkstream.families.flux2.upsample import (
    AREA,
    DEV_ENDS,
    KLEIN_ENDS,
    dev_task,
    klein_task,
    read_task,
    size_seen,
    write,
)
from inkstream.families.parts import infer_qwen3
from inkstream.families.references import cap_area, join_references
from inkstream.nn.config import MistralConfig, Qwen3Config
from inkstream.nn.quant import full_weight
from inkstream.nn.qwen3 import Layer, Past, Qwen3, rope
from inkstream.nn.stack import visits
from inkstream.types import InputError
from inkstream.weights.keymap import drop, rename

MEAN, SPREAD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of the pixels for Mistral's vision tower; they are CLIP's."""


@dataclass(frozen=True)
class WholeQwen3(Qwen3Config):
    """Sizes of klein's full language model, whose first layers are the text encoder."""

    tie_word_embeddings: bool = True  # the 4B model's head is its embedding, the 8B model's is not


@dataclass(frozen=True)
class WholeMistral(MistralConfig):
    """Sizes of dev's full language model, whose first layers are the text encoder, and of its vision tower."""

    vision_config: Any = None  # as in its config.json; None: no vision tower
    spatial_merge_size: int = 2  # patches per side that are merged into one token
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = False
    vision_feature_layer: int = -1


class KleinWriter(nn.Module):
    """The last quarter of Qwen3's layers, its norm and its head."""

    def __init__(self, config: WholeQwen3):
        super().__init__()
        self.config = config
        rest = range(depths(config)[-1], config.num_hidden_layers)
        self.layers = nn.ModuleDict({str(i): Layer(config) for i in rest})
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        tied, sizes = config.tie_word_embeddings, (config.hidden_size, config.vocab_size)
        self.lm_head = None if tied else nn.Linear(*sizes, bias=False)

    def attach(self, encoder: Qwen3, tokenizer: Tokenizer) -> None:
        self.encoder = encoder
        self.tokenizer = tokenizer

    def write(self, prompt: str, references: Sequence[Image.Image], seed: int) -> Iterator[str]:
        config, first = self.config, len(self.encoder.layers)
        past: list[Past | None] = [None] * config.num_hidden_layers
        head = self.lm_head or tied_head(self.encoder.embed_tokens)
        known = 0

        def ask(*tokens: int) -> Tensor:
            nonlocal known
            ids = torch.tensor(tokens, device=self.norm.weight.device)
            cos, sin = rope([known + len(tokens)], config.head_dim, config.rope_theta, ids.device)

            x = self.encoder.embed_tokens(ids)
            for i, layer in chain(visits(self.encoder.layers), enumerate(self.layers.values(), first)):
                x, past[i] = layer.extend(x, (cos[known:], sin[known:]), past[i])  # type: ignore[operator]
            known += len(tokens)
            return head(self.norm(x[-1]))

        ids = read_task(self.tokenizer, klein_task(prompt))
        yield from write(ask(*ids), ask, self.tokenizer, KLEIN_ENDS, seed)


def tied_head(embedding: nn.Module) -> Callable[[Tensor], Tensor]:
    """The embedding table as an output head, computed where the table is stored."""
    weight = full_weight(embedding)
    return lambda x: F.linear(x.to(weight.device, weight.dtype), weight)


class DevWriter(nn.Module):
    """The last quarter of Mistral Small's layers, its norm, its head and its vision tower, by transformers."""

    def __init__(self, config: WholeMistral):
        super().__init__()
        self.config = config
        self.model = build_mistral(config, config.num_hidden_layers)
        self.model.embed_tokens = nn.Identity()  # `attach` puts the text encoder's modules here
        for i in range(depths(config)[-1]):
            self.model.layers[i] = nn.Identity()
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.vision_config is not None:
            self.vision_tower, self.multi_modal_projector = _eyes(config)

    def attach(self, encoder: MistralText, tokenizer: Tokenizer) -> None:
        self.model.embed_tokens = encoder.model.embed_tokens
        for i, layer in enumerate(encoder.model.layers):
            self.model.layers[i] = layer
        self.tokenizer = tokenizer

    def write(self, prompt: str, references: Sequence[Image.Image], seed: int) -> Iterator[str]:
        from transformers import DynamicCache

        past = DynamicCache()
        device = self.model.norm.weight.device

        def go_on(embedded: Tensor) -> Tensor:  # (L, D)
            # ids, mask, positions and cache are passed by place: transformers 5.24 renames past_key_values to cache
            out = self.model(None, None, None, past, embedded[None], use_cache=True)
            return self.lm_head(out.last_hidden_state[0, -1])

        def ask(token: int) -> Tensor:
            return go_on(self.model.embed_tokens(torch.tensor([token], device=device)))

        seen, grid = self.look(references) if references else (None, None)
        ids = torch.tensor(read_task(self.tokenizer, dev_task(prompt, grid)), device=device)
        embedded = self.model.embed_tokens(ids)
        if seen is not None:
            embedded[ids == pad_id(self.tokenizer, "[IMG]")] = seen
        yield from write(go_on(embedded), ask, self.tokenizer, DEV_ENDS, seed)

    def look(self, references: Sequence[Image.Image]) -> tuple[Tensor, tuple[int, int]]:
        """The tokens (N, D) of the pictures, joined side by side into one, and their rows and columns."""
        if self.config.vision_config is None:
            raise InputError("this text encoder cannot see pictures: leave out upsample or the references")
        page = cap_area(join_references(references), AREA)
        cell = self.vision_tower.patch_size * self.config.spatial_merge_size
        rows, columns = size_seen(page, cell)
        size = (rows * cell, columns * cell)
        pixels = np.asarray(page.resize(size[::-1], Image.Resampling.BICUBIC), np.float32) / 255
        pixels = torch.from_numpy(((pixels - MEAN) / SPREAD).astype(np.float32)).permute(2, 0, 1)[None]
        like = self.model.norm.weight
        out = self.vision_tower(pixels.to(like.device, like.dtype), image_sizes=[size], output_hidden_states=True)
        states = out.hidden_states[self.config.vision_feature_layer][0]
        return self.multi_modal_projector(states, [size]), (rows, columns)


def _eyes(config: WholeMistral) -> tuple[Any, Any]:
    """The vision tower, and the projector from its states to tokens."""
    from transformers import Mistral3Config, PixtralVisionConfig, PixtralVisionModel
    from transformers.models.mistral3.modeling_mistral3 import Mistral3MultiModalProjector

    sizes = PixtralVisionConfig(**config.vision_config)
    tower: Any = PixtralVisionModel(sizes)
    with torch.device("cpu"):  # no file holds its buffers
        tower.patch_positional_embedding = type(tower.patch_positional_embedding)(sizes)
    names = ("spatial_merge_size", "projector_hidden_act", "multimodal_projector_bias", "vision_feature_layer")
    joined = Mistral3Config(
        text_config=their_config(config, config.num_hidden_layers),
        vision_config=sizes,
        **{name: getattr(config, name) for name in names},
    )
    return tower, Mistral3MultiModalProjector(joined)


# As a Part ------------------------------------------------------------------------------------------------------------


def build(config: WholeQwen3 | WholeMistral) -> nn.Module:
    return KleinWriter(config) if isinstance(config, WholeQwen3) else DevWriter(config)


def infer(shapes: Shapes) -> WholeQwen3 | WholeMistral:
    """Sizes from the shapes of the weights. They do not show the vision tower's sizes, so it is left out."""
    if any(name.endswith("self_attn.q_norm.weight") for name in shapes):
        return WholeQwen3(**asdict(infer_qwen3(shapes)), tie_word_embeddings="lm_head.weight" not in shapes)
    return WholeMistral(**asdict(infer_mistral(shapes)))


def unread(config: WholeQwen3 | WholeMistral) -> tuple[str, ...]:
    """Name prefixes of the weights that the text encoder holds, and of parts that the config leaves out."""
    prefix = "" if isinstance(config, WholeQwen3) else "model."
    first = (f"{prefix}embed_tokens.", *(f"{prefix}layers.{i}." for i in range(depths(config)[-1])))
    if isinstance(config, WholeQwen3):
        return (*first, "lm_head.") if config.tie_word_embeddings else first
    return first if config.vision_config is not None else (*first, "vision_tower.", "multi_modal_projector.")


WRITER = Part(
    build=build,
    config=WholeQwen3,
    layouts={
        "klein": tuple(rename(f"model.{name}", name) for name in ("embed_tokens", "layers", "norm")),
        "dev": (
            rename("language_model.model", "model"),
            rename("language_model.lm_head", "lm_head"),
            rename("model.language_model", "model"),
            rename("model.vision_tower", "vision_tower"),
            rename("model.multi_modal_projector", "multi_modal_projector"),
            drop("tekken_model"),
        ),
    },
    infer=infer,
    unread=unread,
    others={"mistral": WholeMistral, "mistral3": WholeMistral},
)
"""klein's and dev's writer, in the files of their text encoders."""
