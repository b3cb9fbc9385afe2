"""CLIP's vision model (arXiv 2103.00020): a picture as one vector. IP-Adapters look through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from inkstream.families import Shapes
from inkstream.nn.forward import ANY, PLAIN
from inkstream.nn.linear import linear
from inkstream.nn.stack import Blocks, visits

MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
HEAD = 64
"""The width of a head in every CLIP."""
EPS = 1e-5


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision model, ViT-L/14 by default."""

    image_size: int = 224
    patch_size: int = 14
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    projection_dim: int = 768


class ClipVision(nn.Module):
    """(B, 3, S, S) normalised pixels -> (B, projection_dim). Module names are the release's, with its spelling."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.vision_model = VisionModel(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return linear(self.visual_projection, self.vision_model(pixels), PLAIN, ANY)


class VisionModel(nn.Module):
    """(B, 3, S, S) -> (B, hidden_size), the state of the class token."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.embeddings = Embeddings(c)
        self.pre_layrnorm = nn.LayerNorm(c.hidden_size, EPS)
        self.encoder = Encoder(c)
        self.post_layernorm = nn.LayerNorm(c.hidden_size, EPS)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.pre_layrnorm(self.embeddings(pixels))
        for _, layer in visits(self.encoder.layers):
            x = layer(x)
        return self.post_layernorm(x[:, 0])


class Encoder(nn.Module):
    def __init__(self, c: VisionConfig):
        super().__init__()
        self.layers = Blocks(Layer(c) for _ in range(c.num_hidden_layers))


class Embeddings(nn.Module):
    """A class token, then the patches, with learned positions."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(c.hidden_size))
        self.patch_embedding = nn.Conv2d(3, c.hidden_size, c.patch_size, c.patch_size, bias=False)
        self.position_embedding = nn.Embedding((c.image_size // c.patch_size) ** 2 + 1, c.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)  # (B, patches, D)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat((first, patches), dim=1) + self.position_embedding.weight


class Layer(nn.Module):
    """Pre-norm attention and MLP, with OpenAI's quick GELU."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        d = c.hidden_size
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(d, d) for name in ("q", "k", "v", "out")})
        self.layer_norm1 = nn.LayerNorm(d, EPS)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(d, c.intermediate_size), "fc2": nn.Linear(c.intermediate_size, d)})
        self.layer_norm2 = nn.LayerNorm(d, EPS)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, D)
        attention, mlp, normed = self.self_attn, self.mlp, self.layer_norm1(x)
        q, k, v = (
            linear(attention[f"{name}_proj"], normed, PLAIN, ANY).unflatten(-1, (-1, HEAD)).transpose(1, 2)
            for name in "qkv"
        )
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + linear(attention["out_proj"], seen, PLAIN, ANY)
        hidden = linear(mlp["fc1"], self.layer_norm2(x), PLAIN, ANY)
        return x + linear(mlp["fc2"], hidden * (1.702 * hidden).sigmoid(), PLAIN, ANY)


def pixels_of(pictures: Sequence[Image.Image], side: int) -> Tensor:
    """The middle squares of pictures as the model reads them: (B, 3, side, side) float32."""
    squares: list[Tensor] = []
    for picture in pictures:
        scale = side / min(picture.size)
        size = [max(side, int(edge * scale)) for edge in picture.size]
        left, top = ((edge - side) // 2 for edge in size)
        resized = picture.convert("RGB").resize((size[0], size[1]), Image.Resampling.BICUBIC)
        square = np.asarray(resized.crop((left, top, left + side, top + side)), np.float32) / 255
        squares.append(
            torch.from_numpy((square - np.array(MEAN, np.float32)) / np.array(DEVIATION, np.float32)).permute(2, 0, 1)
        )
    return torch.stack(squares)


def infer_vision(shapes: Shapes, prefix: str) -> VisionConfig:
    """Sizes from the shapes of the weights, whose names begin with the prefix."""
    own = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    width, _, patch, _ = own["vision_model.embeddings.patch_embedding.weight"]
    positions, _ = own["vision_model.embeddings.position_embedding.weight"]
    if width % HEAD:
        raise KeyError("num_attention_heads")
    layers = "vision_model.encoder.layers."
    return VisionConfig(
        image_size=patch * round((positions - 1) ** 0.5),
        patch_size=patch,
        hidden_size=width,
        intermediate_size=own[f"{layers}0.mlp.fc1.weight"][0],
        num_hidden_layers=len({name.split(".")[3] for name in own if name.startswith(layers)}),
        projection_dim=own["visual_projection.weight"][0],
    )
