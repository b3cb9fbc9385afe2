"""SPAN (Wan and others 2023): six blocks whose attention has no parameters, then pixels.

Files hold each convolution as its parts, which trained beside one another: `fold` makes one 3 x 3 convolution of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Shapes = Mapping[str, tuple[int, ...]]
MEAN = (0.4488, 0.4371, 0.4040)
"""Mean of red, green and blue in DIV2K, which networks with a norm subtract."""
_PART = re.compile(r"(.+)\.(sk|conv\.[012]|eval_conv)\.(weight|bias)")


@dataclass(frozen=True)
class SPANConfig:
    """Sizes of a SPAN. norm: whether pixels are centred and multiplied by 255 before the first layer."""

    feature_channels: int = 48
    upscale: int = 4
    norm: bool = True


class SPAN(nn.Module):
    def __init__(self, config: SPANConfig):
        super().__init__()
        width = config.feature_channels
        self.scale = config.upscale
        if config.norm:
            self.no_norm = None
        else:
            self.register_buffer("no_norm", torch.zeros(1))  # published files mark it so
        self.conv_1 = nn.Conv2d(3, width, 3, padding=1)
        for i in range(1, 7):
            self.add_module(f"block_{i}", Block(width))
        self.conv_cat = nn.Conv2d(4 * width, width, 1)
        self.conv_2 = nn.Conv2d(width, width, 3, padding=1)
        self.upsampler = nn.Sequential(nn.Conv2d(width, 3 * config.upscale**2, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, h, w) -> (B, 3, h * scale, w * scale)
        if self.no_norm is None:
            x = (x - torch.tensor(MEAN, device=x.device, dtype=x.dtype).view(1, 3, 1, 1)) * 255
        first = self.conv_1(x)
        results = [(first, first)]
        for i in range(1, 7):
            results.append(self.get_submodule(f"block_{i}")(results[-1][0]))
        last = self.conv_2(results[6][0])
        x = self.conv_cat(torch.cat((first, last, results[1][0], results[6][1]), 1))
        return F.pixel_shuffle(self.upsampler(x), self.scale)


class Block(nn.Module):
    """Three convolutions. Their result, around zero after a sigmoid, weighs itself and the input."""

    def __init__(self, width: int):
        super().__init__()
        self.c1_r = nn.Conv2d(width, width, 3, padding=1)
        self.c2_r = nn.Conv2d(width, width, 3, padding=1)
        self.c3_r = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The block's result, and that of its first convolution after the activation."""
        inner = F.silu(self.c1_r(x))
        out = self.c3_r(F.silu(self.c2_r(inner)))
        return (out + x) * (out.sigmoid() - 0.5), inner


# Files ----------------------------------------------------------------------------------------------------------------


def is_span(shapes: Shapes) -> bool:
    return {"conv_1.sk.weight", "block_1.c1_r.sk.weight", "conv_cat.weight", "upsampler.0.weight"} <= shapes.keys()


def fold(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with one 3 x 3 convolution in place of a chain of 1 x 1, 3 x 3 and 1 x 1 and a 1 x 1 beside it.

    The chain is padded before its first layer. So at the picture's edge, the fold differs from it by the first bias;
    networks are run folded. `eval_conv` is the fold of an earlier state and is dropped.
    """
    folded: dict[str, Tensor] = {}
    for name, weight in state.items():
        if not (part := _PART.fullmatch(name)):
            folded[name] = weight
        elif part[2] == "sk" and part[3] == "weight":
            kernel, bias = _fold_one({key: state[f"{part[1]}.{key}"].double() for key in _PARTS})
            folded |= {f"{part[1]}.weight": kernel.to(weight.dtype), f"{part[1]}.bias": bias.to(weight.dtype)}
    return folded


_PARTS = tuple(f"{layer}.{kind}" for layer in ("sk", "conv.0", "conv.1", "conv.2") for kind in ("weight", "bias"))


def _fold_one(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    first, middle, last = (parts[f"conv.{i}.weight"] for i in range(3))
    kernel = torch.einsum("om,mnij,nc->ocij", last[:, :, 0, 0], middle, first[:, :, 0, 0])
    kernel[:, :, 1, 1] += parts["sk.weight"][:, :, 0, 0]
    inner = torch.einsum("mnij,n->m", middle, parts["conv.0.bias"]) + parts["conv.1.bias"]
    return kernel, last[:, :, 0, 0] @ inner + parts["conv.2.bias"] + parts["sk.bias"]


def infer(shapes: Shapes) -> SPANConfig:
    width, channels = shapes["conv_1.weight"][:2]
    scale = math.isqrt(shapes["upsampler.0.weight"][0] // 3)
    if channels != 3:
        raise ValueError("it does not read three channels")
    return SPANConfig(feature_channels=width, upscale=scale, norm="no_norm" not in shapes)
