"""The tensors of one layer in an adapter's file, by their roles, as changes of its weight and its bias."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inkstream.types import InputError
from inkstream.weights.files import few
from inkstream.weights.lora.changes import Change, Full, LowRank, Replacement
from inkstream.weights.lora.factors import IA3, Dora, Factor, GLoRA, LoHa, LoKr
from inkstream.weights.lora.peft import Config
from inkstream.weights.lora.rotations import InputRotation, OutputRotation, peft_boft, peft_oft

UNSUPPORTED = {
    "lora_mid": "a factor of a convolution",
    "bm": "a factor of a convolution",
    "hada_t1": "a factor of a convolution",
    "hada_t2": "a factor of a convolution",
    "lokr_t1": "a factor of a convolution",
    "lokr_t2": "a factor of a convolution",
    "oft_diag": "OFT of an early LyCORIS",
    "set_bias": "another bias",
    "reshape_weight": "a layer of another size",
}
"""Roles of tensors that no layer of our models can take -> what they are."""

TOGETHER = (
    ("down", "up"),
    ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    ("lokr_w1_a", "lokr_w1_b"),
    ("lokr_w2_a", "lokr_w2_b"),
    ("a1", "a2", "b1", "b2"),
    ("on_input", "weight"),
)
"""Roles of tensors that need one another."""

COMPANIONS = {
    "dora_scale": ("up", "hada_w1_a", "lokr_w1", "lokr_w1_a"),
    "magnitude": ("up",),
    "up_bias": ("up",),
    "alpha": ("up", "hada_w1_a", "lokr_w1", "lokr_w1_a", "oft_blocks", "a1", "diff", "on_input"),
    "rescale": ("oft_blocks",),
    "boft_s": ("boft_R",),
    "lokr_w1": ("lokr_w2", "lokr_w2_a"),
    "lokr_w1_a": ("lokr_w2", "lokr_w2_a"),
    "lokr_w2": ("lokr_w1", "lokr_w1_a"),
    "lokr_w2_a": ("lokr_w1", "lokr_w1_a"),
}
"""Role of a tensor -> roles of which it needs one."""


DENSE = frozenset(("hada_w1_a", "oft_R", "boft_R", "on_input", "ia3_l"))
"""Roles of tensors whose change may be as large as the layer's weight when it is bound."""


@dataclass(frozen=True, eq=False)
class Layer:
    """The tensors of one layer of a file.

    path: in its layout. size: (O, I) of our layer, or of our rows. biased: whether that has a bias. keys, tensors: by
    role; tensors are float32.
    """

    path: str
    size: tuple[int, int]
    biased: bool
    keys: Mapping[str, str]
    tensors: Mapping[str, Tensor]

    def number(self, role: str) -> float:
        """A tensor of one number."""
        if self.tensors[role].numel() != 1:
            raise self.misfit(role, (1,))
        return float(self.tensors[role])

    def matrix(self, role: str) -> Tensor:
        """A tensor with two axes. It may be stored as a convolution of size 1."""
        tensor = self.tensors[role]
        if tensor.ndim > 2 and tensor.shape[2:].numel() == 1:
            tensor = tensor.flatten(1)
        if tensor.ndim != 2 or tensor.numel() == 0:
            raise InputError(f"{self.keys[role]} is {by(tensor.shape)}, not a matrix: download the file again")
        return tensor

    def product(self, left: str, right: str) -> tuple[Tensor, Tensor]:
        """Two matrices that can be multiplied."""
        a, b = self.matrix(left), self.matrix(right)
        if a.shape[1] != len(b):
            raise InputError(
                f"{self.keys[left]} is {by(a.shape)}, but {self.keys[right]} is {by(b.shape)}: download the file again"
            )
        return a, b

    def lines(self, role: str) -> Tensor:
        """Numbers for each row as (O, 1), or for each column as (1, I). Without a second axis they are of rows."""
        tensor = self.tensors[role]
        if tensor.ndim >= 2 and tensor.shape[0] == 1 and tensor.numel() == self.size[1]:
            return tensor.reshape(1, -1)
        return self.rows(role)

    def rows(self, role: str) -> Tensor:
        """One number for each row, (O, 1)."""
        if self.tensors[role].numel() != self.size[0]:
            raise self.misfit(role, self.size)
        return self.tensors[role].reshape(-1, 1)

    def misfit(self, role: str, size: Sequence[int]) -> InputError:
        shape = by(self.tensors[role].shape)
        return InputError(f"{self.keys[role]} is {shape}, which does not fit {by(size)}: use another adapter")


def changes_of(layer: Layer, config: Config) -> list[Change]:
    """The changes of a layer's weight. Raises InputError if one is not whole, of an unknown kind, or does not fit."""
    _check_complete(layer)
    builders = {build: None for role, build in BUILDERS.items() if role in layer.tensors}
    return [build(layer, config) for build in builders]


def bias_of(layer: Layer, config: Config) -> Tensor | None:
    """The change of a layer's bias, (O,), if there is one."""
    found = [layer.rows(role)[:, 0] for role in ("diff_b", "b_norm") if role in layer.tensors]
    if "up_bias" in layer.tensors:
        found.append(_scale(layer, config, len(layer.matrix("down"))) * layer.rows("up_bias")[:, 0])
    return torch.stack(found).sum(0) if found else None


def by(shape: Sequence[int]) -> str:
    """A shape as text: 64x32."""
    return "x".join(map(str, shape)) or "a number"


def _check_complete(layer: Layer) -> None:
    own = layer.keys
    if own.keys() <= {"weight"}:
        raise InputError(f"{own['weight']} is a whole weight, as a model has it: give an adapter")
    if "w_norm" in own:
        raise InputError(f"{own['w_norm']} is a change of a norm, but {layer.path} is a linear layer: use another file")
    for role in own:
        if role in UNSUPPORTED:
            raise InputError(f"{own[role]} is {UNSUPPORTED[role]}, which is not supported: use another adapter")
    for roles in TOGETHER:
        missing = [role for role in roles if role not in own]
        if missing and len(missing) < len(roles):
            present = next(own[role] for role in roles if role in own)
            raise InputError(f"{present} is there, but {layer.path} lacks {few(missing)}: download the file again")
    for role, others in COMPANIONS.items():
        if role in own and not any(other in own for other in others):
            missing = " or ".join(others)
            raise InputError(f"{own[role]} is there, but {layer.path} lacks {missing}: download the file again")


def _scale(layer: Layer, config: Config, rank: int) -> float:
    """alpha / r. The file's own alpha comes first, then PEFT's configuration; without both it is 1."""
    return layer.number("alpha") / rank if "alpha" in layer.tensors else config.scale(layer.path, rank)


def _lora(layer: Layer, config: Config) -> Change:
    up, down = layer.product("up", "down")
    if len(down) > max(layer.size):
        raise InputError(
            f"{layer.keys['down']} has rank {len(down)}, but its layer is {by(layer.size)}: take another file"
        )
    return _scaled_to_norms(LowRank(down, up, _scale(layer, config, len(down))), layer)


def _loha(layer: Layer, config: Config) -> Change:
    a1, b1 = layer.product("hada_w1_a", "hada_w1_b")
    a2, b2 = layer.product("hada_w2_a", "hada_w2_b")
    if (len(a1), b1.shape[1]) != (len(a2), b2.shape[1]):
        raise layer.misfit("hada_w2_a", (len(a1), len(b2)))
    return _scaled_to_norms(LoHa(a1, b1, a2, b2, _scale(layer, config, len(b1))), layer)


def _lokr(layer: Layer, config: Config) -> Change:
    def factor(name: str) -> Factor:
        return layer.matrix(name) if name in layer.tensors else layer.product(f"{name}_a", f"{name}_b")

    change = LoKr(factor("lokr_w1"), factor("lokr_w2"))
    if config.kind == "LOKR":  # PEFT's scale is alpha / r in any case
        scale = config.scale(layer.path, config.rank(layer.path))
    else:
        scale = 1.0 if change.rank is None else _scale(layer, config, change.rank)
    return _scaled_to_norms(LoKr(change.w1, change.w2, scale), layer)


def _scaled_to_norms(change: Change, layer: Layer) -> Change:
    """The DoRA of a change, if the file has norms."""
    for role in ("dora_scale", "magnitude"):
        if role in layer.tensors:
            return Dora(change, layer.lines(role))
    return change


def _glora(layer: Layer, config: Config) -> Change:
    a1, a2 = layer.product("a1", "a2")
    b1, b2 = layer.product("b1", "b2")
    if not len(a1) == a2.shape[1] == b2.shape[1]:
        raise layer.misfit("a1", (b2.shape[1], len(a2)))
    return GLoRA(a1, a2, b1, b2, _scale(layer, config, len(b2)))


def _output_rotation(layer: Layer, config: Config) -> Change:
    blocks, height = layer.tensors["oft_blocks"], layer.size[0]
    if blocks.ndim not in (3, 4) or not _tile(blocks, height):
        raise layer.misfit("oft_blocks", (height,))
    limit = layer.number("alpha") * height if "alpha" in layer.tensors else 0.0
    return OutputRotation(blocks, layer.size, limit, layer.rows("rescale") if "rescale" in layer.tensors else None)


def _peft_oft(layer: Layer, config: Config) -> Change:
    entries = config.entries
    terms = entries.get("num_cayley_neumann_terms", 5) if entries.get("use_cayley_neumann", True) else None
    eps = entries.get("eps", 6e-5) if entries.get("coft") else None
    try:
        return InputRotation(peft_oft(layer.matrix("oft_R"), layer.size[1], terms, eps), layer.size)
    except ValueError as error:
        raise layer.misfit("oft_R", layer.size) from error


def _peft_boft(layer: Layer, config: Config) -> Change:
    blocks = layer.tensors["boft_R"]
    if blocks.ndim != 4 or not _tile(blocks, layer.size[1]):
        raise layer.misfit("boft_R", (layer.size[1],))
    rescale = layer.rows("boft_s") if "boft_s" in layer.tensors else torch.ones(layer.size[0], 1)
    return InputRotation(peft_boft(blocks), layer.size, rescale)


def _tile(blocks: Tensor, count: int) -> bool:
    """Whether square blocks (..., n, b, b) rotate this many numbers, in a butterfly if there are several stages."""
    number, size = blocks.shape[-3], blocks.shape[-1]
    fit = number * size == count and blocks.shape[-2] == size
    if blocks.ndim == 3:
        return fit
    return fit and len(blocks) > 0 and size % 2 == 0 and count % (size << (len(blocks) - 1)) == 0


def _peft_ia3(layer: Layer, config: Config) -> Change:
    gain = layer.lines("ia3_l") - 1
    if gain.shape == (layer.size[0], 1) and layer.biased:
        raise InputError(f"{layer.keys['ia3_l']} scales the layer's bias too, which is not supported: use a LoRA")
    return IA3(gain, layer.size)


def _ia3(layer: Layer, config: Config) -> Change:
    on_input = layer.number("on_input") != 0
    if layer.tensors["weight"].numel() != layer.size[on_input]:
        raise layer.misfit("weight", layer.size)
    return IA3(layer.tensors["weight"].reshape((1, -1) if on_input else (-1, 1)), layer.size)


BUILDERS: Mapping[str, Callable[[Layer, Config], Change]] = {
    "up": _lora,
    "hada_w1_a": _loha,
    "lokr_w1": _lokr,
    "lokr_w1_a": _lokr,
    "a1": _glora,
    "oft_blocks": _output_rotation,
    "oft_R": _peft_oft,
    "boft_R": _peft_boft,
    "ia3_l": _peft_ia3,
    "on_input": _ia3,
    "diff": lambda layer, config: Full(layer.matrix("diff")),
    "set_weight": lambda layer, config: Replacement(layer.matrix("set_weight")),
}
"""Role of a tensor -> the change that it is part of. `oft_R` without a configuration has PEFT's defaults."""
