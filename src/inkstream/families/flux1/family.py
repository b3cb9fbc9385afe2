"""FLUX.1 as a Family: text encoders CLIP and T5; picture inputs of Kontext, Fill, Canny, Depth and Redux."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from inkstream.families import Documents, Part, Pictures
from inkstream.families.flux1.control import CONTROLNET
from inkstream.families.flux1.documents import documents
from inkstream.families.flux1.ip_adapter import IP_ADAPTER
from inkstream.families.flux1.ip_adapter_instantx import IP_ADAPTER_INSTANTX
from inkstream.families.flux1.keys import DIFFUSERS, NUNCHAKU, SINGLE_FILE, XLABS
from inkstream.families.flux1.kontext import kontext_size, prepare_reference
from inkstream.families.flux1.model import PATCH, Flux1Transformer
from inkstream.families.flux1.redux import REDUX, SIGLIP, to_tokens
from inkstream.families.flux1.specs import (
    CANNY,
    DEPTH,
    DEV,
    FILL,
    KONTEXT,
    KREA,
    SCHNELL,
    UNDISTILLED,
    Flux1Config,
    infer_config,
    with_redux,
)
from inkstream.families.flux1.text import (
    CLIP,
    CLIP_TOKENS,
    SCHNELL_TOKENS,
    T5,
    T5_TOKENS,
    clip_tokens,
    encode_clip,
    encode_t5,
    load_clip_tokenizer,
    load_t5_tokenizer,
    t5_tokens,
)
from inkstream.families.parts import AUTOENCODER, decode, encode, to_pixels
from inkstream.families.scheduler import read_scheduler
from inkstream.nn.around import NOTHING, Around
from inkstream.nn.flux import Prepared
from inkstream.nn.forward import Sample
from inkstream.nn.offload import where_it_computes
from inkstream.types import Conditioning, Spec

PROMPTS_KEPT = 16
CELL = 8
"""Pixels per side of a latent cell. A mask has CELL * CELL channels, one for each pixel of a cell."""
MAP_AREA = 1024 * 1024
MAP_LONGEST = 8192
"""The longest side that a Request may ask for."""


class Flux1:
    """A loaded FLUX.1 model. See families.Family for the contract of each function."""

    parts: Mapping[str, Part] = {
        "transformer": Part(
            phases=("steps",),
            build=Flux1Transformer,
            config=Flux1Config,
            layouts={"native": SINGLE_FILE, "diffusers": DIFFUSERS, "nunchaku": NUNCHAKU},
            adapter_layouts={"xlabs": XLABS},
            infer=infer_config,
            packs=("double_blocks", "single_blocks"),
            gguf="flux",
        ),
        "text_encoder": CLIP,
        "text_encoder_2": T5,
        "vae": AUTOENCODER,
        "image_encoder": SIGLIP,
        "image_embedder": REDUX,
    }
    controls: ClassVar[Mapping[str, Part]] = {
        "FLUX.1": CONTROLNET,
        "IP-Adapter": IP_ADAPTER,
        "InstantX IP-Adapter": IP_ADAPTER_INSTANTX,
    }
    way = None
    joints = (
        ("transformer.pooled_projection_dim", "text_encoder.hidden_size"),
        ("transformer.joint_attention_dim", "text_encoder_2.d_model"),
        ("transformer.patch_channels", "vae.patch_channels"),
        ("transformer.joint_attention_dim", "image_embedder.txt_in_features"),
    )
    tokenizers: ClassVar = {"tokenizer": load_clip_tokenizer, "tokenizer_2": load_t5_tokenizer}
    documents = staticmethod(documents)

    def __init__(self, spec: Spec, modules: Mapping[str, nn.Module], tokenizers: Mapping[str, Any]):
        self.spec = spec
        self.transformer: Flux1Transformer = modules["transformer"]  # type: ignore[assignment]
        self.clip: Any = modules["text_encoder"]
        self.t5: Any = modules["text_encoder_2"]
        self.vae: Any = modules["vae"]
        self.image_encoder: Any = modules.get("image_encoder")
        self.image_embedder: Any = modules.get("image_embedder")
        self.clip_tokenizer, self.t5_tokenizer = tokenizers["tokenizer"], tokenizers["tokenizer_2"]
        self._encode_once = lru_cache(PROMPTS_KEPT)(self._encode_once)

    @classmethod
    def recognise(cls, configs: Mapping[str, Any], documents: Documents, name: str) -> Spec:
        """A model with extra channels is Fill or a map model. Its name or pipeline tells others with guidance apart.

        A model that does not is undistilled if its scheduler's shift is dynamic or its name says so, else schnell. The
        default is dev. Redux is attached to models without picture inputs of their own.
        """
        transformer: Flux1Config = configs["transformer"]
        redux = {part: configs[part] for part in ("image_encoder", "image_embedder") if part in configs}
        configs = {part: config for part, config in configs.items() if part not in redux}
        beside = transformer.in_channels - transformer.patch_channels
        words = f"{name} {documents.get('model_index.json', {}).get('_class_name', '')}".lower()
        if not transformer.guidance_embeds:
            shifts = read_scheduler(replace(SCHNELL, name=name), documents).shift_rule == "dynamic"
            known = UNDISTILLED if shifts or re.search(r"de-?distill|un-?distill|open-?flux", words) else SCHNELL
        elif beside > transformer.patch_channels:
            known = FILL
        elif beside:
            known = DEPTH if "depth" in words else CANNY
        else:
            known = KONTEXT if "kontext" in words else KREA if "krea" in words else DEV
        spec = replace(known, name=name, multiple=configs["vae"].downscale * PATCH, **configs)
        spec = read_scheduler(spec, documents)
        takes_pictures = spec.abilities & {"references", "fill", "map"}
        return with_redux(spec, **redux) if len(redux) == 2 and not takes_pictures else spec

    def encode(self, prompt: str, references: int = 0) -> Conditioning:
        return self._encode_once(self.tokens(prompt))

    def tokens(self, prompt: str, references: int = 0) -> tuple[int, ...]:
        """CLIP's 77 tokens, then T5's tokens."""
        length = SCHNELL_TOKENS if self.spec.guides == "none" else T5_TOKENS
        return clip_tokens(self.clip_tokenizer, prompt) + t5_tokens(self.t5_tokenizer, prompt, length)

    def cut_at(self, prompt: str) -> int | None:
        ids = self.tokens(prompt)[CLIP_TOKENS:]
        return len(ids) if ids[-1] != self.t5_tokenizer.pad_token_id else None

    def encode_tokens(self, prompts: Sequence[tuple[int, ...]]) -> Conditioning:
        pooled = encode_clip(self.clip, [ids[:CLIP_TOKENS] for ids in prompts])
        return replace(encode_t5(self.t5, [ids[CLIP_TOKENS:] for ids in prompts]), pooled=pooled)

    def _encode_once(self, ids: tuple[int, ...]) -> Conditioning:
        with torch.inference_mode(False), torch.no_grad():  # no inference tensors: a trainer may use the cached result
            return self.encode_tokens([ids])

    @staticmethod
    def size_for(spec: Spec, reference: tuple[int, int]) -> tuple[int, int]:
        """Kontext: the nearest trained size. Map models: a megapixel in the map's shape. Redux: the default size."""
        if "map" in spec.abilities:
            return map_size(*reference, spec.multiple)
        return kontext_size(*reference) if spec.image_embedder is None else spec.size

    def look(self, cond: Conditioning, pictures: Pictures) -> Conditioning:
        """Adds pictures to the conditioning.

        Kontext: references at a trained size. Fill: the masked picture and the mask. Map models: a map of edges or
        depths. Redux: the tokens of each reference after the prompt's.
        """
        able = self.spec.abilities
        if "map" in able:
            (followed,) = pictures.references
            size = (pictures.width, pictures.height)
            return replace(cond, beside=self._seen(followed.resize(size, Image.Resampling.LANCZOS)))
        if "fill" in able:
            assert pictures.image is not None
            assert pictures.mask is not None
            return replace(cond, beside=self._to_fill(pictures.image, pictures.mask))
        if not pictures.references:
            return cond
        if self.image_embedder is not None:
            seen = [to_tokens(self.image_encoder, self.image_embedder, r) for r in pictures.references]
            prompt, *negative = cond.tokens.split(list(cond.lengths))
            prompt = torch.cat((prompt, *(tokens.to(prompt.dtype) for tokens in seen)))
            return replace(cond, tokens=torch.cat((prompt, *negative)), lengths=(len(prompt), *cond.lengths[1:]))
        return replace(cond, references=tuple(self._seen(prepare_reference(r)) for r in pictures.references))

    def _seen(self, picture: Image.Image) -> Tensor:
        """A picture's latents (C, h, w)."""
        return self.encode_image(to_pixels(picture).to(self._device)[None])[0]

    def _to_fill(self, image: Image.Image, mask: Image.Image) -> Tensor:
        """Latents of the picture without the masked area, then the mask, one channel per pixel: (16 + 64, h, w)."""
        pixels = to_pixels(image).to(self._device)
        masked = to_pixels(mask)[:1] >= 0.5  # (1, H, W)
        masked = masked.float().to(self._device)
        kept = (pixels * 2 - 1) * (1 - masked)  # the masked area becomes gray
        latents = self.encode_image((kept / 2 + 0.5)[None])[0]
        return torch.cat((latents, nn.functional.pixel_unshuffle(masked, CELL)))

    @property
    def _device(self) -> torch.device:
        return where_it_computes(self.transformer)[0]

    def prepare(
        self, cond: Conditioning, width: int, height: int, times: Sequence[float], around: Around = NOTHING
    ) -> list[Prepared]:
        _, h, w = self.latent_shape(width, height)
        texts = cond.tokens.split(list(cond.lengths))
        assert cond.pooled is not None
        pooled = cond.pooled.unbind()
        given = (cond.guidance, times, cond.beside, cond.references, around, cond.regions)
        return self.transformer.prepare(texts, pooled, h, w, *given)

    def answer(self, samples: Sequence[Sample]) -> list[Tensor]:
        return self.transformer(samples)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        down = self.spec.vae.downscale
        return self.spec.vae.latent_channels, height // down, width // down

    def decode(self, latents: Tensor) -> Tensor:
        return decode(self.vae, latents)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return encode(self.vae, pixels)


def map_size(width: int, height: int, multiple: int) -> tuple[int, int]:
    """The size to draw a map at: the map's shape, with about the release's 1024 x 1024 pixels, whatever the map's size.

    A square map gives the release's size. Other maps keep their shape, where the release squeezes them into a square.
    """
    scale = math.sqrt(MAP_AREA / (width * height))

    def side(pixels: int) -> int:
        return min(MAP_LONGEST, max(multiple, round(pixels * scale / multiple) * multiple))

    return side(width), side(height)
