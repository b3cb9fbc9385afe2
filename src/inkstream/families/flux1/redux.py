"""Redux: SigLIP features of a picture as tokens after the prompt's tokens. SigLIP runs in transformers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from inkstream.families import Part, Shapes
from inkstream.families.flux1.specs import REDUX_REPO, ReduxConfig, SiglipConfig
from inkstream.families.flux1.text import need_transformers
from inkstream.weights.keymap import Rule, drop, rename


class Siglip(nn.Module):
    """SigLIP's vision model: pixels (B, 3, S, S) in [-1, 1] -> states (B, patches, D). pooled: with its head."""

    def __init__(self, config: SiglipConfig, pooled: bool = False):
        super().__init__()
        self.config = config
        transformers = need_transformers()
        model = transformers.SiglipVisionModel(
            transformers.SiglipVisionConfig(**asdict(config), vision_use_head=pooled)
        )
        self.vision_model: Any = getattr(model, "vision_model", model)  # earlier versions wrap it
        with torch.device("cpu"):  # no file holds this buffer
            self.vision_model.embeddings.position_ids = torch.arange(config.patches)[None]

    def forward(self, pixels: Tensor) -> Tensor:
        model, embeddings = self.vision_model, self.vision_model.embeddings
        patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = patches + embeddings.position_embedding.weight  # not by position_ids, which may be on another device
        return model.post_layernorm(model.encoder(inputs_embeds=x).last_hidden_state)

    def pool(self, pixels: Tensor) -> Tensor:
        """pixels (B, 3, S, S) in [-1, 1] -> a vector of each picture, (B, D)."""
        return self.vision_model.head(self(pixels))


class ReduxEmbedder(nn.Module):
    """Maps SigLIP's states to text tokens of the transformer. (..., redux_dim) -> (..., txt_in_features)."""

    def __init__(self, config: ReduxConfig):
        super().__init__()
        self.redux_up = nn.Linear(config.redux_dim, 3 * config.txt_in_features)
        self.redux_down = nn.Linear(3 * config.txt_in_features, config.txt_in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.redux_down(F.silu(self.redux_up(x)))


def to_tokens(encoder: Siglip, embedder: ReduxEmbedder, picture: Image.Image) -> Tensor:
    """The transformer's tokens of a picture, squeezed into SigLIP's square as in the release: (729, 4096)."""
    like = embedder.redux_up.bias
    pixels = siglip_pixels(picture, encoder.config.image_size)
    return embedder(encoder(pixels[None].to(like.device, like.dtype)))[0]


def siglip_pixels(picture: Image.Image, side: int) -> Tensor:
    """A picture as SigLIP reads it, squeezed into its square: (3, side, side) in [-1, 1]."""
    pixels = np.asarray(picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC), np.float32) / 127.5 - 1
    return torch.from_numpy(pixels).permute(2, 0, 1)


def infer_siglip(shapes: Shapes) -> SiglipConfig:
    """Sizes from the shapes of the weights. Heads are assumed to be 72 wide, as in so400m."""
    width, _, patch, _ = shapes["vision_model.embeddings.patch_embedding.weight"]
    patches, _ = shapes["vision_model.embeddings.position_embedding.weight"]
    if width % 72:
        raise KeyError("num_attention_heads")
    rows, usual = round(patches**0.5), SiglipConfig.image_size  # 384 is not a multiple of the patch size 14
    layers = {name.split(".")[3] for name in shapes if name.startswith("vision_model.encoder.layers.")}
    return SiglipConfig(
        image_size=usual if usual // patch == rows else patch * rows,
        patch_size=patch,
        hidden_size=width,
        intermediate_size=shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0],
        num_hidden_layers=len(layers),
        num_attention_heads=width // 72,
    )


def infer_redux(shapes: Shapes) -> ReduxConfig:
    return ReduxConfig(shapes["redux_up.weight"][1], shapes["redux_down.weight"][0])


def count_siglip(config: SiglipConfig) -> int:
    d, hidden = config.hidden_size, config.intermediate_size
    layer = 4 * (d * d + d) + 2 * d * hidden + hidden + d + 4 * d  # attention, MLP, two norms
    embeddings = (3 * config.patch_size**2 + 1 + config.patches) * d
    return embeddings + config.num_hidden_layers * layer + 2 * d


_WITHOUT_TEXT: tuple[Rule, ...] = tuple(map(drop, ("text_model", "logit_scale", "logit_bias")))

SIGLIP = Part(
    build=Siglip,
    config=SiglipConfig,
    layouts={
        "transformers": _WITHOUT_TEXT,
        "bare": tuple(
            rename(name, f"vision_model.{name}") for name in ("embeddings", "encoder", "post_layernorm", "head")
        ),
    },
    infer=infer_siglip,
    count=count_siglip,
    unread=lambda config: ("vision_model.head.",),
    repo=REDUX_REPO,
)

REDUX = Part(build=ReduxEmbedder, config=ReduxConfig, layouts={"native": ()}, infer=infer_redux, repo=REDUX_REPO)
"""The layout of flux1-redux-dev.safetensors; the diffusers folder has the same names."""
