"""FLUX.3 as a Family: text through Qwen3-VL, up to ten reference pictures, prompts with boxes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from inkstream.families import Documents, Part, Pictures
from inkstream.families.flux3.boxes import check_boxes
from inkstream.families.flux3.documents import documents
from inkstream.families.flux3.keys import DIFFUSERS, SINGLE_FILE
from inkstream.families.flux3.model import Flux3Transformer, Prepared
from inkstream.families.flux3.specs import (
    KLEIN,
    KLEIN_BASE,
    MOST_REFERENCES,
    Flux3Config,
    Flux3TextConfig,
    infer_config,
)
from inkstream.families.flux_autoencoder import AUTOENCODER
from inkstream.families.parts import chat_prompt, decode, encode, load_tokenizer, to_pixels, tokenize
from inkstream.families.qwen3_vl import PAD, text_encoder
from inkstream.families.references import MULTIPLE, SEVERAL_AREA, Size, prepare_references
from inkstream.families.scheduler import read_scheduler
from inkstream.nn.around import NOTHING, Around
from inkstream.nn.forward import Sample
from inkstream.nn.offload import where_it_computes
from inkstream.types import Conditioning, InputError, Spec

PROMPTS_KEPT = 16
PROMPT_TOKENS = 8192
PAD_MULTIPLE = 80
"""Prompts are padded to a multiple of so many tokens. The transformer attends to the padding: it was trained so."""
WHOLE_AREA, SHORTEST, LONGEST = 4 * 1024 * 1024, 64, 4096
"""Limits of the canvas of a single reference: its pixels, and its sides."""


class Flux3:
    """A loaded FLUX.3 model. See families.Family for the contract of each function."""

    parts: Mapping[str, Part] = {
        "transformer": Part(
            phases=("steps",),
            build=Flux3Transformer,
            config=Flux3Config,
            layouts={"native": SINGLE_FILE, "diffusers": DIFFUSERS},
            infer=infer_config,
            packs=("content_mode_blocks", "txt_mode_blocks", "single_blocks"),
            gguf="flux3",
        ),
        "text_encoder": text_encoder(Flux3TextConfig),
        "vae": AUTOENCODER,
    }
    controls: ClassVar[Mapping[str, Part]] = {}
    way = None
    joints = (
        ("transformer.joint_attention_dim", "text_encoder.joined_size"),
        ("transformer.in_channels", "vae.packed_channels"),
    )
    tokenizers: ClassVar = {"tokenizer": load_tokenizer}
    documents = staticmethod(documents)

    def __init__(self, spec: Spec, modules: Mapping[str, nn.Module], tokenizers: Mapping[str, Any]):
        self.spec = spec
        self.transformer: Flux3Transformer = modules["transformer"]  # type: ignore[assignment]
        self.text_encoder: Any = modules["text_encoder"]
        self.vae: Any = modules["vae"]
        self.tokenizer = tokenizers["tokenizer"]
        self._encode_once = lru_cache(PROMPTS_KEPT)(self._encode_once)

    @classmethod
    def recognise(cls, configs: Mapping[str, Any], documents: Documents, name: str) -> Spec:
        """The weights tell the flow map from the base model."""
        known = KLEIN if configs["transformer"].flow_map else KLEIN_BASE
        return read_scheduler(replace(known, name=name, multiple=configs["vae"].downscale, **configs), documents)

    def encode(self, prompt: str, references: int = 0) -> Conditioning:
        check_boxes(prompt, references)
        return self._encode_once(self.tokens(prompt))

    def tokens(self, prompt: str, references: int = 0) -> tuple[int, ...]:
        return tuple(tokenize(self.tokenizer, chat_prompt(prompt), PROMPT_TOKENS))

    def cut_at(self, prompt: str) -> int | None:
        return PROMPT_TOKENS if len(self.tokens(prompt)) >= PROMPT_TOKENS else None

    def encode_tokens(self, prompts: Sequence[tuple[int, ...]]) -> Conditioning:
        pad = self.tokenizer.token_to_id(PAD)
        if pad is None:
            raise InputError(f"the tokenizer has no {PAD}: take the one published with the model")
        texts = [len(ids) for ids in prompts]
        lengths = tuple(min(-(-text // PAD_MULTIPLE) * PAD_MULTIPLE, PROMPT_TOKENS) for text in texts)
        ids = [token for ids, length in zip(prompts, lengths) for token in (*ids, *[pad] * (length - len(ids)))]
        device, _ = where_it_computes(self.text_encoder)
        return Conditioning(self.text_encoder(torch.tensor(ids, device=device), lengths, texts), lengths)

    def _encode_once(self, ids: tuple[int, ...]) -> Conditioning:
        with torch.inference_mode(False), torch.no_grad():  # no inference tensors: a trainer may use the cached result
            return self.encode_tokens([ids])

    @staticmethod
    def size_for(spec: Spec, reference: Size) -> Size:
        return canvas_of(reference)[1]

    def look(self, cond: Conditioning, pictures: Pictures) -> Conditioning:
        """Adds the latents of the references: of a single one whole, of several the middle, up to 1 megapixel each.

        An inpainting's start picture is the first reference, as with FLUX.2. The release has no inpainting.
        """
        given = [*([] if pictures.image is None else [pictures.image]), *pictures.references]
        if len(given) > MOST_REFERENCES:
            raise InputError(
                f"{len(given)} pictures were given to look at and the model takes at most {MOST_REFERENCES}: "
                "leave some references out"
            )
        seen = [on_canvas(given[0])] if len(given) == 1 else prepare_references(given, SEVERAL_AREA)
        device, _ = where_it_computes(self.transformer)
        latents = tuple(self.encode_image(to_pixels(picture).to(device)[None])[0] for picture in seen)
        return replace(cond, references=latents) if latents else cond

    def prepare(
        self, cond: Conditioning, width: int, height: int, times: Sequence[float], around: Around = NOTHING
    ) -> list[Prepared]:
        _, h, w = self.latent_shape(width, height)
        texts = cond.tokens.split(list(cond.lengths))
        return self.transformer.prepare(texts, h, w, times, cond.references, around, cond.regions)

    def answer(self, samples: Sequence[Sample]) -> list[Tensor]:
        if not self.transformer.config.flow_map:
            return self.transformer(samples)
        goals = [sample.t if sample.to is None else sample.to for sample in samples]
        return self.transformer([replace(s, prepared=replace(s.prepared, to=to)) for s, to in zip(samples, goals)])

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        down = self.spec.vae.downscale
        return self.spec.vae.packed_channels, height // down, width // down

    def decode(self, latents: Tensor) -> Tensor:
        return decode(self.vae, latents)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return encode(self.vae, pixels)


def canvas_of(size: Size) -> tuple[Size, Size]:
    """The size that a single reference of this size is scaled down to, and that of its canvas, which keeps it whole.

    The canvas is made of whole tokens. Source: the release's reference_canvas, in diffusers' Flux3ImageProcessor.
    """
    scale = min(1.0, math.sqrt(WHOLE_AREA / (size[0] * size[1])), LONGEST / max(size))
    while True:
        width, height = (max(1, round(side * scale)) for side in size)
        across, down = (min(LONGEST, max(SHORTEST, -(-side // MULTIPLE) * MULTIPLE)) for side in (width, height))
        if across * down <= WHOLE_AREA:
            return (width, height), (across, down)
        scale *= 0.995


def on_canvas(picture: Image.Image) -> Image.Image:
    """The picture in the middle of its canvas. Its reflection fills the rest."""
    size, (width, height) = canvas_of(picture.size)
    picture = picture.convert("RGB")
    picture = picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    around = ((top, height - size[1] - top), (left, width - size[0] - left), (0, 0))
    mode = "reflect" if min(size) > MULTIPLE else "symmetric"  # a reflection leaves out the edge
    return Image.fromarray(np.pad(np.asarray(picture), around, mode=mode))
