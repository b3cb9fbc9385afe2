"""Toy as a Family: our time and sign outside, the release's inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inkstream.families import Documents, Part, Pictures, Shapes
from inkstream.families.parts import (
    AUTOENCODER,
    PROMPT_TOKENS,
    QWEN3,
    chat_prompt,
    decode,
    encode,
    load_tokenizer,
    tokenize,
)
from inkstream.families.scheduler import read_scheduler
from inkstream.nn.around import NOTHING, Around
from inkstream.nn.forward import Sample
from inkstream.nn.offload import where_it_computes
from inkstream.types import Conditioning, Spec
from toy.documents import documents
from toy.keys import DIFFUSERS, NATIVE, PACKS
from toy.model import Prepared, ToyTransformer
from toy.specs import FAST, TOY, ToyConfig

PROMPTS_KEPT = 64


def infer_config(shapes: Shapes) -> ToyConfig:
    """Sizes of a transformer from its weights' shapes. KeyError where they are another model's."""
    dim, channels = shapes["x_embedder.weight"]
    (head,) = shapes["layers.0.attention.q_norm.weight"]
    layers = len({name.split(".")[1] for name in shapes if name.startswith("layers.")})
    axes = (head // 4, head * 3 // 8, head * 3 // 8)
    return ToyConfig(channels, dim, layers, dim // head, shapes["text_embedder.weight"][1], axes)


class Toy:
    """A loaded toy model. See families.Family for what each function promises."""

    parts: Mapping[str, Part] = {
        "transformer": Part(
            phases=("steps",),
            build=ToyTransformer,
            config=ToyConfig,
            layouts={"native": NATIVE, "diffusers": DIFFUSERS},
            infer=infer_config,
            packs=PACKS,
        ),
        "text_encoder": QWEN3,
        "vae": AUTOENCODER,
    }
    controls: ClassVar = {}
    way = None
    joints = (("transformer.text_dim", "text_encoder.hidden_size"), ("transformer.in_channels", "vae.latent_channels"))
    tokenizers: ClassVar = {"tokenizer": load_tokenizer}
    documents = staticmethod(documents)

    def __init__(self, spec: Spec, modules: Mapping[str, nn.Module], tokenizers: Mapping[str, Any]):
        self.spec = spec
        self.transformer: Any = modules["transformer"]
        self.text_encoder = modules["text_encoder"]
        self.vae: Any = modules["vae"]
        self.tokenizer = tokenizers["tokenizer"]
        self._encode_once = lru_cache(PROMPTS_KEPT)(self._encode_once)

    @classmethod
    def recognise(cls, configs: Mapping[str, Any], documents: Documents, name: str) -> Spec:
        """Shapes cannot tell the two apart: the name does."""
        known = FAST if "fast" in name.lower() else TOY
        return read_scheduler(replace(known, name=name, **configs), documents)

    # Prompts ----------------------------------------------------------------------------------------------------------

    def encode(self, prompt: str, references: int = 0) -> Conditioning:
        return self._encode_once(self.tokens(prompt))

    def tokens(self, prompt: str, references: int = 0) -> tuple[int, ...]:
        return tuple(tokenize(self.tokenizer, chat_prompt(prompt)))

    def cut_at(self, prompt: str) -> int | None:
        return PROMPT_TOKENS if len(self.tokens(prompt)) >= PROMPT_TOKENS else None

    def encode_tokens(self, prompts: Sequence[tuple[int, ...]]) -> Conditioning:
        device, _ = where_it_computes(self.text_encoder)
        lengths = tuple(len(ids) for ids in prompts)
        ids = torch.tensor([i for ids in prompts for i in ids], device=device)
        return Conditioning(self.text_encoder(ids, lengths), lengths)

    def _encode_once(self, ids: tuple[int, ...]) -> Conditioning:
        with torch.inference_mode(False), torch.no_grad():
            return self.encode_tokens([ids])

    # Pictures that it is shown ----------------------------------------------------------------------------------------

    @staticmethod
    def size_for(spec: Spec, reference: tuple[int, int]) -> tuple[int, int]:
        return reference

    def look(self, cond: Conditioning, pictures: Pictures) -> Conditioning:
        return cond  # it takes no references

    # Steps ------------------------------------------------------------------------------------------------------------

    def prepare(
        self, cond: Conditioning, width: int, height: int, times: Sequence[float], around: Around = NOTHING
    ) -> list[Prepared]:
        _, h, w = self.latent_shape(width, height)
        theirs = [1 - t for t in dict.fromkeys(times)]
        return self.transformer.prepare(cond.tokens.split(list(cond.lengths)), h, w, theirs, around)

    def answer(self, samples: Sequence[Sample]) -> list[Tensor]:
        theirs = [replace(sample, t=1 - sample.t) for sample in samples]
        return [-image_minus_noise for image_minus_noise in self.transformer(theirs)]

    # Pixels -----------------------------------------------------------------------------------------------------------

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        down = self.spec.vae.downscale
        return self.spec.vae.latent_channels, height // down, width // down

    def decode(self, latents: Tensor) -> Tensor:
        return decode(self.vae, latents)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return encode(self.vae, pixels)
