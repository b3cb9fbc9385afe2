"""FLUX.1's IP-Adapters of XLabs, versions 1 and 2: a picture to resemble, as tokens that the double blocks look at.

CLIP's vision model sums a picture up in one vector, of which a linear layer makes some tokens. In each double block the
picture's queries, normed and not rotated, attend to keys and values of these tokens, and the result is added behind the
block. Sources: XLabs' x-flux; diffusers' FluxIPAdapterAttnProcessor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from inkstream.families import Part, Pictures, Shapes
from inkstream.families.flux1.clip_vision import ClipVision, VisionConfig, infer_vision, pixels_of
from inkstream.nn.around import Around
from inkstream.nn.around.adapters import Adapter, Product
from inkstream.nn.around.residuals import Hints
from inkstream.nn.attention import attend
from inkstream.nn.flux import EPS
from inkstream.nn.forward import ANY, PLAIN, Rows, Sample
from inkstream.nn.layers import rms_norm
from inkstream.nn.linear import linear
from inkstream.nn.stack import Blocks, visits
from inkstream.types import Conditioning, ControlUse, InputError
from inkstream.weights.keymap import drop, rename

ENCODER = "openai/clip-vit-large-patch14"
"""The published image encoder."""
LAYER = "double_blocks.{}.img_attn.qkv"


@dataclass(frozen=True)
class IPAdapterConfig:
    """Sizes of an IP-Adapter, which its weights tell. vision: None in a file without the image encoder."""

    dim: int = 3072
    num_layers: int = 19
    tokens: int = 16
    token_width: int = 4096
    vector_width: int = 768
    vision: VisionConfig | None = None


class KeyValue(nn.Module):
    """The keys and values of one block."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.k = nn.Linear(width, dim)
        self.v = nn.Linear(width, dim)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return linear(self.k, tokens, PLAIN, ANY), linear(self.v, tokens, PLAIN, ANY)


class IPAdapter(nn.Module):
    """An IP-Adapter with its image encoder. See `families.ControlNet` for its contract."""

    def __init__(self, config: IPAdapterConfig):
        super().__init__()
        self.config = c = config
        self.proj = nn.Linear(c.vector_width, c.tokens * c.token_width)
        self.norm = nn.LayerNorm(c.token_width)
        self.blocks = Blocks(KeyValue(c.token_width, c.dim) for _ in range(c.num_layers))
        if c.vision is not None:
            self.encoder = ClipVision(c.vision)

    def check(self, family: Any, use: ControlUse) -> None:
        ours, model = self.config, family.transformer
        theirs = (model.config.dim, model.config.num_layers)
        if (ours.dim, ours.num_layers) != theirs:
            raise InputError(
                f"IP-Adapter {use.path} is for {ours.num_layers} blocks of width {ours.dim}, {family.spec.name} has "
                f"{theirs[1]} of {theirs[0]}: take one made for this model"
            )
        if ours.vision is None:
            raise InputError(
                f"IP-Adapter {use.path} has no image encoder: give a folder with its file and model.safetensors of "
                f"{ENCODER}"
            )
        if use.mode:
            raise InputError(f"IP-Adapter {use.path} has no modes: leave out #{use.mode}")
        if getattr(model, "is_shared", False):
            raise InputError(f"IP-Adapter {use.path} needs whole blocks on each GPU: take --parallel cfg or replicas")

    def look(self, family: Any, pictures: Pictures) -> Tensor:
        """CLIP's vector of the picture, then that of a black one, for the negative prompt: (2, E)."""
        (picture,) = pictures.references
        pixels = pixels_of([picture, Image.new("RGB", picture.size)], self.encoder.config.image_size)
        return self.encoder(pixels.to(self.proj.weight.device, self.proj.weight.dtype))

    def follow(
        self, family: Any, seen: Tensor, use: ControlUse, cond: Conditioning, times: Sequence[float], around: Around
    ) -> Around:
        model, c = family.transformer, self.config
        heads = model.config.num_attention_heads
        vectors = seen[: len(cond)].to(self.proj.weight.dtype)
        tokens = linear(self.proj, vectors, PLAIN, ANY).unflatten(-1, (c.tokens, c.token_width))
        tokens = self.norm(tokens).flatten(0, 1)
        known = [
            [each.unflatten(-1, (heads, -1)).split(c.tokens) for each in block(tokens)]
            for _, block in visits(self.blocks)
        ]  # by block, then keys or values, then by prompt
        device = self.proj.weight.device
        norms = [block.img_attn.norm.query_norm.scale.to(device) for block in model.double_blocks]
        queries: dict[int, list[Tensor]] = {}  # by block, in the forward that is running

        def keep(index: int) -> Product:
            def product(x: Tensor, plain: Tensor, out: Tensor) -> None:
                q = out[:, : c.dim].unflatten(-1, (heads, -1))
                queries.setdefault(index, []).append(rms_norm(q, norms[index], EPS))

            return product

        def begin(samples: Mapping[int, Sample]) -> Hints:
            queries.clear()

            def hint(stack: str, index: int, before: Tensor, after: Tensor, rows: Rows) -> Tensor | None:
                if stack != "double_blocks":
                    return None
                prompts = [samples[i].prompt for i in rows.samples]
                texts, pictures = rows.spans[: len(prompts)], rows.spans[len(prompts) :]
                lengths = [a.length + b.length for a, b in zip(pictures[::2], pictures[1::2])]
                k, v = (torch.cat([one[prompt] for prompt in prompts]) for one in known[index])
                q = torch.cat(queries.pop(index))
                added = attend(q, k, v, lengths, [c.tokens] * len(prompts), by=model.attention_by).flatten(1)
                return F.pad(use.scale * added, (0, 0, sum(span.length for span in texts), 0))  # none for texts

            return hint

        observer = Adapter.of(model, {LAYER.format(i): keep(i) for i in range(c.num_layers)})
        return Around(adapters=(observer,), residuals=(begin,))


def infer_config(shapes: Shapes) -> IPAdapterConfig:
    """Sizes from the shapes of the weights."""
    rows, vector = shapes["proj.weight"]
    (width,) = shapes["norm.weight"]
    return IPAdapterConfig(
        dim=shapes["blocks.0.k.weight"][0],
        num_layers=len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
        tokens=rows // width,
        token_width=width,
        vector_width=vector,
        vision=infer_vision(shapes, "encoder.") if any(name.startswith("encoder.") for name in shapes) else None,
    )


_BLOCK = "double_blocks.{}.processor.ip_adapter_double_stream"

IP_ADAPTER = Part(
    phases=("prompt", "steps"),
    build=IPAdapter,
    config=IPAdapterConfig,
    layouts={
        "xlabs": (
            rename("ip_adapter_proj_model.proj", "proj"),
            rename("ip_adapter_proj_model.norm", "norm"),
            *(rename(f"{_BLOCK}_{x}_proj", f"blocks.{{}}.{x}") for x in "kv"),
            *map(drop, ("text_model", "text_projection", "logit_scale", "vision_model.embeddings.position_ids")),
            *(rename(name, f"encoder.{name}") for name in ("vision_model", "visual_projection")),
        )
    },
    infer=infer_config,
)
"""XLabs' IP-Adapters, whose folder also holds CLIP."""
