"""FLUX.1's IP-Adapter of InstantX: a picture to resemble, as tokens that the attention of every block looks at.

SigLIP's vision model sums a picture up in one vector, of which an MLP makes the tokens. In each block, queries before
their rotation also attend to keys and values of these tokens. The result is added to the attention's own, before the
layer that projects both: in double blocks for the picture's tokens, in single blocks for all tokens. Source: InstantX's
`IPAFluxAttnProcessor2_0`.
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
from inkstream.families.flux1.redux import Siglip, infer_siglip, siglip_pixels
from inkstream.families.flux1.specs import SiglipConfig
from inkstream.nn.around import Around
from inkstream.nn.around.adapters import Adapter, Product
from inkstream.nn.around.residuals import Hints
from inkstream.nn.attention import attend
from inkstream.nn.flux import EPS, Prepared
from inkstream.nn.forward import ANY, PLAIN, Rows, Sample
from inkstream.nn.layers import rms_norm
from inkstream.nn.linear import linear
from inkstream.nn.stack import Blocks, visits
from inkstream.types import Conditioning, ControlUse, InputError
from inkstream.weights.keymap import drop, rename

ENCODER = "google/siglip-so400m-patch14-384"
"""The published image encoder."""
KEY_EPS = 1e-5


@dataclass(frozen=True)
class InstantXConfig:
    """Sizes of an IP-Adapter, which its weights tell. vision: None in a file without the image encoder."""

    dim: int = 3072
    num_blocks: int = 57  # double blocks, then single blocks
    tokens: int = 128
    token_width: int = 4096
    vector_width: int = 1152
    vision: SiglipConfig | None = None


class KeyValue(nn.Module):
    """The keys and values of one block. Module names are the release's."""

    def __init__(self, width: int, dim: int):
        super().__init__()
        self.to_k_ip = nn.Linear(width, dim, bias=False)
        self.to_v_ip = nn.Linear(width, dim, bias=False)

    def forward(self, tokens: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """(L, width) -> keys and values, each (L, H, E). Keys have an RMS norm without a weight."""
        k, v = (linear(layer, tokens, PLAIN, ANY).unflatten(-1, (heads, -1)) for layer in (self.to_k_ip, self.to_v_ip))
        return rms_norm(k, torch.ones(k.shape[-1], dtype=k.dtype, device=k.device), KEY_EPS), v


class InstantXAdapter(nn.Module):
    """An IP-Adapter with its image encoder. See `families.ControlNet` for its contract."""

    def __init__(self, config: InstantXConfig):
        super().__init__()
        self.config = c = config
        width = 2 * c.vector_width
        self.image_proj: Any = nn.ModuleDict(
            {
                "proj": nn.Sequential(
                    nn.Linear(c.vector_width, width), nn.GELU(), nn.Linear(width, c.tokens * c.token_width)
                ),
                "norm": nn.LayerNorm(c.token_width),
            }
        )
        self.ip_adapter = Blocks(KeyValue(c.token_width, c.dim) for _ in range(c.num_blocks))
        if c.vision is not None:
            self.encoder = Siglip(c.vision, pooled=True)

    def check(self, family: Any, use: ControlUse) -> None:
        ours, model = self.config, family.transformer
        blocks = model.config.num_layers + model.config.num_single_layers
        if (ours.dim, ours.num_blocks) != (model.config.dim, blocks):
            raise InputError(
                f"IP-Adapter {use.path} is for {ours.num_blocks} blocks of width {ours.dim}, {family.spec.name} has "
                f"{blocks} of {model.config.dim}: take one made for this model"
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
        """SigLIP's vector of the picture, then that of a black one, for the negative prompt: (2, E)."""
        (picture,) = pictures.references
        like = self.image_proj["norm"].weight
        side = self.encoder.config.image_size
        pixels = [siglip_pixels(each, side) for each in (picture, Image.new("RGB", picture.size))]
        return self.encoder.pool(torch.stack(pixels).to(like.device, like.dtype))

    def follow(
        self, family: Any, seen: Tensor, use: ControlUse, cond: Conditioning, times: Sequence[float], around: Around
    ) -> Around:
        model, c = family.transformer, self.config
        heads, doubles = model.config.num_attention_heads, model.config.num_layers
        tokens = self.image_proj["proj"](seen[: len(cond)].to(self.image_proj["norm"].weight.dtype))
        tokens = self.image_proj["norm"](tokens.unflatten(-1, (c.tokens, c.token_width))).flatten(0, 1)
        known = [[each.split(c.tokens) for each in block(tokens, heads)] for _, block in visits(self.ip_adapter)]
        texts: list[int] = []  # of each sample of the forward that is running: the lengths of its text and pictures
        pictures: list[int] = []
        targets: list[int] = []
        prompts: list[int] = []
        queries: dict[int, Tensor] = {}

        def begin(samples: Mapping[int, Sample]) -> Hints:
            own: list[Prepared] = [sample.prepared for sample in samples.values()]
            queries.clear()
            texts[:] = [len(one.text) for one in own]
            targets[:] = [one.grid[0] * one.grid[1] for one in own]
            pictures[:] = [target + len(one.references) for target, one in zip(targets, own)]
            prompts[:] = [sample.prompt for sample in samples.values()]
            return nothing

        def keep(index: int, scale: Tensor) -> Product:
            def product(x: Tensor, plain: Tensor, out: Tensor) -> None:
                queries[index] = rms_norm(out[:, : c.dim].unflatten(-1, (heads, -1)), scale, EPS)

            return product

        def add(index: int, layer: nn.Module) -> Product:
            def product(x: Tensor, plain: Tensor, out: Tensor) -> None:
                q = queries.pop(index)
                lengths = pictures if index < doubles else [a + b for a, b in zip(texts, pictures)]
                if len(q) != len(out):  # the last block returns the targets alone
                    parts = zip(q.split(lengths), texts, targets)
                    q, lengths = torch.cat([part[text : text + target] for part, text, target in parts]), targets
                k, v = (torch.cat([one[prompt] for prompt in prompts]) for one in known[index])
                more = attend(q, k, v, lengths, [c.tokens] * len(prompts), by=model.attention_by).flatten(1)
                whole = F.pad(use.scale * more, (0, x.shape[1] - c.dim))  # a single block's layer also projects its MLP
                out += without_bias(layer, whole)

            return product

        products: dict[str, Product] = {}
        for index, block in enumerate((*model.double_blocks, *model.single_blocks)):
            name = f"double_blocks.{index}" if index < doubles else f"single_blocks.{index - doubles}"
            enter, leave, norm = (
                ("img_attn.qkv", "img_attn.proj", block.img_attn.norm)
                if index < doubles
                else ("linear1", "linear2", block.norm)
            )
            products[f"{name}.{enter}"] = keep(index, norm.query_norm.scale.to(seen.device))
            products[f"{name}.{leave}"] = add(index, block.get_submodule(leave))
        return Around(adapters=(Adapter.of(model, products),), residuals=(begin,))


def nothing(stack: str, index: int, before: Tensor, after: Tensor, rows: Rows) -> None:
    """Adds nothing behind blocks: all is added inside them."""


def without_bias(layer: Any, x: Tensor) -> Tensor:
    """A layer's product alone."""
    out = linear(layer, x, PLAIN, ANY)
    return out if layer.bias is None else out - layer.bias


def infer_config(shapes: Shapes) -> InstantXConfig:
    """Sizes from the shapes of the weights."""
    rows, _ = shapes["image_proj.proj.2.weight"]
    (width,) = shapes["image_proj.norm.weight"]
    own = {name.removeprefix("encoder."): shape for name, shape in shapes.items() if name.startswith("encoder.")}
    return InstantXConfig(
        dim=shapes["ip_adapter.0.to_k_ip.weight"][0],
        num_blocks=len({name.split(".")[1] for name in shapes if name.startswith("ip_adapter.")}),
        tokens=rows // width,
        token_width=width,
        vector_width=shapes["image_proj.proj.0.weight"][1],
        vision=infer_siglip(own) if own else None,
    )


IP_ADAPTER_INSTANTX = Part(
    phases=("prompt", "steps"),
    build=InstantXAdapter,
    config=InstantXConfig,
    layouts={
        "instantx": (
            *map(drop, ("text_model", "logit_scale", "logit_bias")),
            rename("vision_model", "encoder.vision_model"),
        )
    },
    infer=infer_config,
)
"""InstantX's FLUX.1-dev IP-Adapter as safetensors, whose folder also holds SigLIP."""
