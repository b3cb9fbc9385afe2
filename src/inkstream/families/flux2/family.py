"""FLUX.2 as a Family: klein's text encoder is Qwen3, dev's is Mistral Small. Both take reference pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from inkstream.families import CARD, Documents, Part, Pictures, Shapes
from inkstream.families.flux2.control import FUN
from inkstream.families.flux2.documents import documents
from inkstream.families.flux2.keys import CUT_SHORT, DIFFUSERS, SINGLE_FILE
from inkstream.families.flux2.mistral import count_mistral
from inkstream.families.flux2.model import Flux2Transformer
from inkstream.families.flux2.specs import (
    DEV,
    KLEIN_4B,
    KLEIN_9B_KV,
    MOST_REFERENCES,
    SPECS,
    Flux2Config,
    infer_config,
)
from inkstream.families.flux2.text import (
    DEV_PAD,
    DEV_TEXT_ENCODER,
    KLEIN_PAD,
    KLEIN_TEXT_ENCODER,
    PROMPT_TOKENS,
    depths,
    dev_tokens,
    encode_dev,
    encode_klein,
    klein_tokens,
    load_mistral_tokenizer,
    pad_id,
)
from inkstream.families.flux2.writers import WRITER
from inkstream.families.flux_autoencoder import AUTOENCODER
from inkstream.families.parts import decode, encode, load_tokenizer
from inkstream.families.references import check_references, default_size, prepare_references
from inkstream.families.scheduler import read_scheduler
from inkstream.nn.around import NOTHING, Around
from inkstream.nn.config import MistralConfig, Qwen3Config
from inkstream.nn.flux import Prepared
from inkstream.nn.forward import Sample
from inkstream.nn.offload import where_it_computes
from inkstream.nn.qwen3 import Qwen3
from inkstream.types import Conditioning, InputError, Spec

PROMPTS_KEPT = 16


def build_text_encoder(config: Qwen3Config | MistralConfig) -> nn.Module:
    return (KLEIN_TEXT_ENCODER if isinstance(config, Qwen3Config) else DEV_TEXT_ENCODER).build(config)


def count_text_encoder(config: Qwen3Config | MistralConfig) -> int:
    if isinstance(config, MistralConfig):
        return count_mistral(config, depths(config)[-1])
    with torch.device("meta"):
        return sum(weight.numel() for weight in build_text_encoder(config).parameters())


def infer_text_encoder(shapes: Shapes) -> Qwen3Config | MistralConfig:
    """Weights with a query norm are Qwen3's; Mistral has none."""
    is_qwen = any(name.endswith("self_attn.q_norm.weight") for name in shapes)
    return (KLEIN_TEXT_ENCODER if is_qwen else DEV_TEXT_ENCODER).infer(shapes)


def read_tokenizer(folder: Path) -> Tokenizer:
    """Reads Qwen3's or Mistral's tokenizer, recognised by its special tokens. Raises InputError if it is neither.

    Qwen2.5's tokenizer, and earlier copies of it in ComfyUI, lack the tokens of thoughts that klein's template has.
    """
    try:
        return load_mistral_tokenizer(folder)
    except InputError:
        tokenizer = load_tokenizer(folder)
    for token in ("<think>", "</think>", KLEIN_PAD):
        if tokenizer.encode(token, add_special_tokens=False).ids != [tokenizer.token_to_id(token)]:
            raise InputError(
                f"the tokenizer in {folder} has no {token}, which every prompt of FLUX.2 klein holds: take Qwen3's, "
                f"with `hf download {KLEIN_4B.repo} --include 'tokenizer/*'`"
            )
    return tokenizer


class Flux2:
    """A loaded FLUX.2 model. See families.Family for the contract of each function."""

    parts: Mapping[str, Part] = {
        "transformer": Part(
            phases=("steps",),
            build=Flux2Transformer,
            config=Flux2Config,
            layouts={"native": SINGLE_FILE, "diffusers": DIFFUSERS},
            adapter_layouts={"cut short": CUT_SHORT},
            infer=infer_config,
            packs=("double_blocks", "single_blocks"),
            gguf="flux",
        ),
        "text_encoder": Part(
            build=build_text_encoder,
            config=Qwen3Config,
            layouts={
                **{f"klein {name}": rules for name, rules in KLEIN_TEXT_ENCODER.layouts.items()},
                **{f"dev {name}": rules for name, rules in DEV_TEXT_ENCODER.layouts.items()},
            },
            infer=infer_text_encoder,
            unread=lambda config: (KLEIN_TEXT_ENCODER if isinstance(config, Qwen3Config) else DEV_TEXT_ENCODER).unread(
                config
            ),
            neutral=lambda config: KLEIN_TEXT_ENCODER.neutral(config) if isinstance(config, Qwen3Config) else {},
            count=count_text_encoder,
            packs=("layers", "embed_tokens", "model.layers", "model.embed_tokens"),
            writer=WRITER,
            comfyui=lambda config: KLEIN_TEXT_ENCODER.comfyui(config) if isinstance(config, Qwen3Config) else "",
            others={"mistral": MistralConfig, "mistral3": MistralConfig},
        ),
        "vae": AUTOENCODER,
    }
    controls: ClassVar[Mapping[str, Part]] = {"FLUX.2": FUN}
    way = None
    joints = (
        ("transformer.joint_attention_dim", "text_encoder.joined_size"),
        ("transformer.in_channels", "vae.packed_channels"),
    )
    tokenizers: ClassVar = {"tokenizer": read_tokenizer}
    documents = staticmethod(documents)
    size_for = staticmethod(lambda spec, reference: default_size(reference))

    def __init__(self, spec: Spec, modules: Mapping[str, nn.Module], tokenizers: Mapping[str, Any]):
        self.spec = spec
        self.transformer: Flux2Transformer = modules["transformer"]  # type: ignore[assignment]
        self.text_encoder: Any = modules["text_encoder"]
        self.vae: Any = modules["vae"]
        self.tokenizer = tokenizers["tokenizer"]
        self._encode_once = lru_cache(PROMPTS_KEPT)(self._encode_once)

    @classmethod
    def recognise(cls, configs: Mapping[str, Any], documents: Documents, name: str) -> Spec:
        """A model with guidance is dev. The layer count tells klein 4B from 9B.

        The card tells base, distilled and KV apart, or else the pipeline's class and `is_distilled`, or the name.
        """
        transformer: Flux2Config = configs["transformer"]

        def scheduled(known: Spec) -> Spec:
            own = replace(known, name=name, multiple=configs["vae"].downscale, **configs)
            return read_scheduler(own, documents, dynamic="empirical")

        if transformer.guidance_embeds:
            return scheduled(DEV)
        index, card = documents.get("model_index.json", {}), documents.get(CARD, {})
        words, kind = name.lower(), str(index.get("_class_name", ""))
        size = "9b" if transformer.num_single_layers > KLEIN_4B.transformer.num_single_layers else "4b"
        base, distilled = SPECS[f"flux2-klein-base-{size}"], SPECS[f"flux2-klein-{size}"]
        if "guides" in card:
            kv, is_base = "references_once" in card.get("abilities", ()), card["guides"] == base.guides
        else:
            kv = re.search(r"(^|[-_ ])kv($|[-_. ])", words) is not None or "KV" in kind
            is_base = "base" in words or index.get("is_distilled") is False
            if not (kv or is_base or "klein" in words or index.get("is_distilled") is True):
                raise InputError(
                    f"{name} is a FLUX.2 klein, but its weights do not show whether it is base or distilled: "
                    "name the file or folder after it, as in flux-2-klein-base-4b or flux-2-klein-4b, "
                    f'or put {CARD} beside it with {{"guides": "{base.guides}"}} or {{"guides": "{distilled.guides}"}}'
                )
        known = KLEIN_9B_KV if kv else base if is_base else distilled
        return scheduled(known)

    def encode(self, prompt: str, references: int = 0) -> Conditioning:
        return self._encode_once(self.tokens(prompt))

    def tokens(self, prompt: str, references: int = 0) -> tuple[int, ...]:
        return (klein_tokens if self._is_klein else dev_tokens)(self.tokenizer, prompt)

    def cut_at(self, prompt: str) -> int | None:
        return PROMPT_TOKENS if len(self.tokens(prompt)) >= PROMPT_TOKENS else None

    def encode_tokens(self, prompts: Sequence[tuple[int, ...]]) -> Conditioning:
        if self._is_klein:
            return encode_klein(self.text_encoder, prompts, pad_id(self.tokenizer, KLEIN_PAD))
        return encode_dev(self.text_encoder, prompts, pad_id(self.tokenizer, DEV_PAD))

    def _encode_once(self, ids: tuple[int, ...]) -> Conditioning:
        with torch.inference_mode(False), torch.no_grad():  # no inference tensors: a trainer may use the cached result
            return self.encode_tokens([ids])

    @property
    def _is_klein(self) -> bool:
        return isinstance(self.text_encoder, Qwen3)

    def look(self, cond: Conditioning, pictures: Pictures) -> Conditioning:
        """Adds the latents of an inpainting's start picture, at the drawing's size, and of the references, at theirs.

        Source of the first: diffusers' Flux2KleinInpaintPipeline.
        """
        size = pictures.width, pictures.height
        own = pictures.image if "source" in self.spec.abilities else None
        source = [] if own is None else [own]
        if not (source or pictures.references):
            return cond
        check_references([picture.size for picture in pictures.references], size, MOST_REFERENCES, sources=len(source))
        device, _ = where_it_computes(self.transformer)
        seen = [torch.from_numpy(np.array(picture)) for picture in source + prepare_references(pictures.references)]
        latents = [self.encode_image(pixels.to(device).permute(2, 0, 1)[None].float() / 255)[0] for pixels in seen]
        return replace(cond, references=tuple(latents))

    def prepare(
        self, cond: Conditioning, width: int, height: int, times: Sequence[float], around: Around = NOTHING
    ) -> list[Prepared]:
        _, h, w = self.latent_shape(width, height)
        texts = cond.tokens.split(list(cond.lengths))
        reads_once = "references_once" in self.spec.abilities
        given = (cond.guidance, times, cond.references, reads_once, around, cond.regions)
        return self.transformer.prepare(texts, h, w, *given)

    def answer(self, samples: Sequence[Sample]) -> list[Tensor]:
        return self.transformer(samples)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        down = self.spec.vae.downscale
        return self.spec.vae.packed_channels, height // down, width // down

    def decode(self, latents: Tensor) -> Tensor:
        return decode(self.vae, latents)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return encode(self.vae, pixels)
