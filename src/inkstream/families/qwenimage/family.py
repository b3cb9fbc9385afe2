"""Qwen-Image 2.1 as a Family: from text to pictures with transparency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inkstream.families import Documents, Part, Pictures
from inkstream.families.parts import chat_prompt, load_tokenizer, tokenize
from inkstream.families.qwen3_vl import text_encoder
from inkstream.families.qwenimage.autoencoder import AUTOENCODER
from inkstream.families.qwenimage.documents import documents
from inkstream.families.qwenimage.keys import COMFYUI, DIFFUSERS
from inkstream.families.qwenimage.model import Prepared, QwenImageTransformer
from inkstream.families.qwenimage.specs import BASE, TURBO, QwenImageConfig, QwenImageTextConfig, infer_config
from inkstream.families.scheduler import read_scheduler
from inkstream.nn.around import NOTHING, Around
from inkstream.nn.forward import Sample
from inkstream.nn.offload import where_it_computes
from inkstream.types import Conditioning, Spec

PROMPTS_KEPT = 16
PROMPT_TOKENS = 8192
SYSTEM = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
"""The system turn before every prompt. Its states are dropped: the transformer does not read them."""
EMPTY = " "
"""What stands for an empty prompt."""


class QwenImage:
    """A loaded Qwen-Image 2.1 model. See families.Family for the contract of each function."""

    parts: Mapping[str, Part] = {
        "transformer": Part(
            phases=("steps",),
            build=QwenImageTransformer,
            config=QwenImageConfig,
            layouts={"native": COMFYUI, "diffusers": DIFFUSERS},
            infer=infer_config,
            packs=("transformer_blocks",),
            gguf="qwen_image",
        ),
        "text_encoder": text_encoder(QwenImageTextConfig),
        "vae": AUTOENCODER,
    }
    controls: ClassVar[Mapping[str, Part]] = {}
    way = None
    joints = (("transformer.context_in_dim", "text_encoder.hidden_size"), ("transformer.in_channels", "vae.z_dim"))
    tokenizers: ClassVar = {"tokenizer": load_tokenizer}
    documents = staticmethod(documents)

    def __init__(self, spec: Spec, modules: Mapping[str, nn.Module], tokenizers: Mapping[str, Any]):
        self.spec = spec
        self.transformer: QwenImageTransformer = modules["transformer"]  # type: ignore[assignment]
        self.text_encoder: Any = modules["text_encoder"]
        self.vae: Any = modules["vae"]
        self.tokenizer = tokenizers["tokenizer"]
        self._encode_once = lru_cache(PROMPTS_KEPT)(self._encode_once)

    @classmethod
    def recognise(cls, configs: Mapping[str, Any], documents: Documents, name: str) -> Spec:
        """Turbo's folder has times of its own; a single file's name tells it."""
        sigmas = documents.get("model_index.json", {}).get("sample_sigmas")
        known = TURBO if sigmas or "turbo" in name.lower() else BASE
        if sigmas:
            known = replace(known, times=(*map(float, sigmas), 0.0), steps=len(sigmas))
        return read_scheduler(replace(known, name=name, **configs), documents)

    def encode(self, prompt: str, references: int = 0) -> Conditioning:
        return self._encode_once(self.tokens(prompt))

    def tokens(self, prompt: str, references: int = 0) -> tuple[int, ...]:
        return tuple(tokenize(self.tokenizer, SYSTEM + chat_prompt(prompt or EMPTY), PROMPT_TOKENS))

    def cut_at(self, prompt: str) -> int | None:
        return PROMPT_TOKENS if len(self.tokens(prompt)) >= PROMPT_TOKENS else None

    def encode_tokens(self, prompts: Sequence[tuple[int, ...]]) -> Conditioning:
        device, _ = where_it_computes(self.text_encoder)
        lengths = [len(ids) for ids in prompts]
        states = self.text_encoder(torch.tensor([i for ids in prompts for i in ids], device=device), lengths)
        dropped = len(tokenize(self.tokenizer, SYSTEM))
        kept = [own[dropped:] for own in states.split(lengths)]
        return Conditioning(torch.cat(kept), tuple(map(len, kept)))

    def _encode_once(self, ids: tuple[int, ...]) -> Conditioning:
        with torch.inference_mode(False), torch.no_grad():  # no inference tensors: a trainer may use the cached result
            return self.encode_tokens([ids])

    @staticmethod
    def size_for(spec: Spec, reference: tuple[int, int]) -> tuple[int, int]:
        return reference

    def look(self, cond: Conditioning, pictures: Pictures) -> Conditioning:
        return cond  # it takes no references

    def prepare(
        self, cond: Conditioning, width: int, height: int, times: Sequence[float], around: Around = NOTHING
    ) -> list[Prepared]:
        _, h, w = self.latent_shape(width, height)
        return self.transformer.prepare(cond.tokens.split(list(cond.lengths)), h, w, times, around)

    def answer(self, samples: Sequence[Sample]) -> list[Tensor]:
        return self.transformer(samples)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        down = self.spec.vae.downscale
        return self.spec.vae.z_dim, height // down, width // down

    def decode(self, latents: Tensor) -> Tensor:
        pixels = self.vae.decode(latents.to(where_it_computes(self.vae)[1]))
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def encode_image(self, pixels: Tensor) -> Tensor:
        opaque = torch.cat((pixels, torch.ones_like(pixels[:, :1])), dim=1) if pixels.shape[1] == 3 else pixels
        return self.vae.encode((opaque * 2 - 1).to(where_it_computes(self.vae)[1])).float()
