"""Z-Image as a Family: converts between our time and sign and the release's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from inkstream.families import ADAPTER_DIALECTS, Documents, Part, Pictures, Shapes
from inkstream.families.parts import (
    AUTOENCODER,
    PROMPT_TOKENS,
    QWEN3,
    chat_prompt,
    decode,
    encode,
    load_tokenizer,
    to_pixels,
    tokenize,
)
from inkstream.families.references import check_references, fitted_size, prepare_references
from inkstream.families.scheduler import SCHEDULER, read_scheduler
from inkstream.families.zimage.control import UNION
from inkstream.families.zimage.documents import documents
from inkstream.families.zimage.keys import DIFFUSERS, NATIVE, NUNCHAKU, PACKS
from inkstream.families.zimage.model import CLEAN, Prepared, ZImageTransformer
from inkstream.families.zimage.segments import segment_lengths, segments_of, template
from inkstream.families.zimage.specs import BASE, OMNI, TURBO, ZImageConfig
from inkstream.nn.around import NOTHING, Around
from inkstream.nn.forward import Sample
from inkstream.nn.offload import where_it_computes
from inkstream.types import Conditioning, Spec

PROMPTS_KEPT = 64
MOST_REFERENCES = 10


def infer_config(shapes: Shapes) -> ZImageConfig:
    """Sizes of a transformer from its weights' shapes. The norm's width is the head's; the rest is as published."""
    dim, patch = shapes["x_embedder.weight"]
    layers, refiners = (
        len({k.split(".")[1] for k in shapes if k.startswith(name)}) for name in ("layers.", "noise_refiner.")
    )
    head = shapes["layers.0.attention.q_norm.weight"][0]
    siglip = shapes.get("siglip_embedder.0.weight")
    return ZImageConfig(
        in_channels=patch // 4,
        dim=dim,
        n_layers=layers,
        n_refiner_layers=refiners,
        n_heads=dim // head,
        cap_feat_dim=shapes["cap_embedder.0.weight"][0],
        siglip_feat_dim=siglip[0] if siglip else None,
        axes_dims=(head // 4, head * 3 // 8, head * 3 // 8),
    )


class ZImage:
    """A loaded Z-Image model. See families.Family for the contract of each function."""

    parts: Mapping[str, Part] = {
        "transformer": Part(
            phases=("steps",),
            build=ZImageTransformer,
            config=ZImageConfig,
            layouts={"native": NATIVE, "diffusers": DIFFUSERS, "nunchaku": NUNCHAKU},
            adapter_dialects=dict.fromkeys(ADAPTER_DIALECTS, "diffusers"),  # all programs name its parts of QKV
            infer=infer_config,
            packs=PACKS,
            gguf="lumina2",
        ),
        "text_encoder": QWEN3,
        "vae": AUTOENCODER,
    }
    controls: ClassVar[Mapping[str, Part]] = {"union": UNION}
    way = None
    joints = (
        ("transformer.cap_feat_dim", "text_encoder.hidden_size"),
        ("transformer.in_channels", "vae.latent_channels"),
    )
    tokenizers: ClassVar = {"tokenizer": load_tokenizer}
    documents = staticmethod(documents)

    def __init__(self, spec: Spec, modules: Mapping[str, nn.Module], tokenizers: Mapping[str, Any]):
        self.spec = spec
        self.transformer: ZImageTransformer = modules["transformer"]  # type: ignore[assignment]
        self.text_encoder = modules["text_encoder"]
        self.vae: Any = modules["vae"]
        self.tokenizer = tokenizers["tokenizer"]
        self._encode_once = lru_cache(PROMPTS_KEPT)(self._encode_once)

    @classmethod
    def recognise(cls, configs: Mapping[str, Any], documents: Documents, name: str) -> Spec:
        """A name with "turbo" or a scheduler shift of 3 means Turbo: shapes cannot tell Turbo from Base."""
        if configs["transformer"].siglip_feat_dim is not None:
            known = OMNI
        elif "turbo" in name.lower() or documents.get(SCHEDULER, {}).get("shift") == TURBO.shift:
            known = TURBO
        else:
            known = BASE
        side = configs["vae"].downscale * configs["transformer"].patch_size
        return read_scheduler(replace(known, name=name, multiple=side, **configs), documents)

    def encode(self, prompt: str, references: int = 0) -> Conditioning:
        return self._encode_once(self.tokens(prompt, references))

    def tokens(self, prompt: str, references: int = 0) -> tuple[int, ...]:
        segments = template(prompt, references) if references else [chat_prompt(prompt)]
        return tuple(i for segment in segments for i in tokenize(self.tokenizer, segment))

    def cut_at(self, prompt: str) -> int | None:
        return PROMPT_TOKENS if len(self.tokens(prompt)) >= PROMPT_TOKENS else None

    def encode_tokens(self, prompts: Sequence[tuple[int, ...]]) -> Conditioning:
        """A prompt with references is encoded segment by segment, and its states are packed as one entry."""
        device, _ = where_it_computes(self.text_encoder)
        segments = [len(segment) for ids in prompts for segment in segments_of(self.tokenizer, ids)]
        ids = torch.tensor([i for ids in prompts for i in ids], device=device)
        return Conditioning(self.text_encoder(ids, segments), tuple(len(ids) for ids in prompts))

    def _encode_once(self, ids: tuple[int, ...]) -> Conditioning:
        with torch.inference_mode(False), torch.no_grad():  # no inference tensors: a trainer may use the cached result
            return self.encode_tokens([ids])

    @staticmethod
    def size_for(spec: Spec, reference: tuple[int, int]) -> tuple[int, int]:
        return fitted_size(reference, spec.size[0] * spec.size[1])

    def look(self, cond: Conditioning, pictures: Pictures) -> Conditioning:
        """Adds the latents of the references. A reference has at most the pixels of the model's default size."""
        if not pictures.references:
            return cond
        area = self.spec.size[0] * self.spec.size[1]
        sizes = [picture.size for picture in pictures.references]
        check_references(sizes, (pictures.width, pictures.height), MOST_REFERENCES, area=area)
        device, _ = where_it_computes(self.transformer)
        seen = [to_pixels(picture).to(device)[None] for picture in prepare_references(pictures.references, area)]
        return replace(cond, references=tuple(self.encode_image(pixels)[0] for pixels in seen))

    def prepare(
        self, cond: Conditioning, width: int, height: int, times: Sequence[float], around: Around = NOTHING
    ) -> list[Prepared]:
        _, h, w = self.latent_shape(width, height)
        ours = [1 - t for t in times] + ([CLEAN] if cond.references else [])
        scales = self.transformer.scales(list(dict.fromkeys(ours)), around) if times else {}
        prompts = cond.tokens.split(list(cond.lengths))
        if cond.references:
            lengths = segment_lengths(self.tokenizer, len(cond.references))
            samples = [
                self.transformer.prepare_omni(prompt.split(lengths(len(prompt))), cond.references, (), h, w, around)
                for prompt in prompts
            ]
        else:
            samples = self.transformer.prepare_all(prompts, h, w, around, cond.regions)
        return [replace(sample, scales=scales) for sample in samples] if scales else samples

    def answer(self, samples: Sequence[Sample]) -> list[Tensor]:
        theirs = [replace(sample, t=1 - sample.t) for sample in samples]
        return [-image_minus_noise for image_minus_noise in self.transformer(theirs)]

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        down = self.spec.vae.downscale
        return self.spec.vae.latent_channels, height // down, width // down

    def decode(self, latents: Tensor) -> Tensor:
        return decode(self.vae, latents)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return encode(self.vae, pixels)
