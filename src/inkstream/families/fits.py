"""Which models an adapter's file fits, decided by the sizes in its header. Torch is not imported."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from inkstream.types import Spec


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model, or those that a file names.

    inputs: widths of the inputs of linear layers. inside: those of layers in blocks. blocks: name of a stack of blocks
    -> its number of blocks. A model has the names of all its published layouts.
    """

    inputs: frozenset[int]
    inside: frozenset[int]
    blocks: Mapping[str, int]


def sizes_of(spec: Spec) -> Sizes:
    """The sizes of a model's transformer."""
    return SIZES[spec.family](spec.transformer)


def fits(file: Sizes, model: Sizes) -> bool | None:
    """Whether an adapter with these sizes fits a model. None: nothing speaks against it, but no width is known."""
    if not (file.inputs <= model.inputs and file.inside <= model.inside):
        return False
    if any(count > model.blocks.get(name, 0) for name, count in file.blocks.items()):
        return False
    return True if file.inputs else None


_BLOCK = re.compile(
    r"(double_blocks|single_blocks|transformer_blocks|single_transformer_blocks|layers|\w+?_refiner)[._](\d+)[._].+"
)


def block_of(path: str) -> tuple[str, int] | None:
    """The stack and the index of the block that a layer is in, by its path with dots or underscores."""
    found = _BLOCK.fullmatch(path)
    return (found[1], int(found[2])) if found else None


def _zimage(config: Any) -> Sizes:
    inside = frozenset((config.dim, int(config.dim / 3 * 8), min(config.dim, 256)))
    others = {config.in_channels * config.patch_size**2, config.cap_feat_dim, 256, 1024}
    blocks = {"layers": config.n_layers, "noise_refiner": config.n_refiner_layers}
    blocks["context_refiner"] = config.n_refiner_layers
    if config.siglip_feat_dim is not None:
        others.add(config.siglip_feat_dim)
        blocks["siglip_refiner"] = config.n_refiner_layers
    return Sizes(inside | others, inside, blocks)


def _flux1(config: Any) -> Sizes:
    width = config.attention_head_dim * config.num_attention_heads
    inside = frozenset((width, 4 * width, 5 * width))
    others = {config.in_channels, config.joint_attention_dim, config.pooled_projection_dim, 256}
    return Sizes(inside | others, inside, _flux_blocks(config))


def _flux2(config: Any) -> Sizes:
    width = config.attention_head_dim * config.num_attention_heads
    hidden = int(config.mlp_ratio * width)
    inside = frozenset((width, hidden, width + hidden))
    others = {config.in_channels, config.joint_attention_dim, 256}
    return Sizes(inside | others, inside, _flux_blocks(config))


def _flux3(config: Any) -> Sizes:
    hidden = int(config.mlp_ratio * config.dim)
    inside = frozenset((config.dim, hidden))
    others = {config.in_channels, config.cond_in_channels, config.joint_attention_dim, 256}
    blocks = {"single_blocks": config.num_single_layers, "single_transformer_blocks": config.num_single_layers}
    return Sizes(inside | others, inside, blocks)


def _qwenimage(config: Any) -> Sizes:
    inside = frozenset((config.dim, config.mlp_ratio * config.dim))
    others = {config.in_channels, config.context_in_dim, 256}
    return Sizes(inside | others, inside, {"transformer_blocks": config.num_layers})


def _flux_blocks(config: Any) -> dict[str, int]:
    double, single = config.num_layers, config.num_single_layers
    return {
        "double_blocks": double,
        "single_blocks": single,
        "transformer_blocks": double,
        "single_transformer_blocks": single,
    }


SIZES = {"zimage": _zimage, "flux1": _flux1, "flux2": _flux2, "flux3": _flux3, "qwenimage": _qwenimage}
"""Family -> the sizes by its config. A test compares them with the layers of each known model."""
