"""The adapter of a run: which layers it changes, its weights, and how a forward applies it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from inkstream.families import Part
from inkstream.nn.around.adapters import Adapter as Applied
from inkstream.nn.quant import full_weight
from inkstream.train.optim import reads_time
from inkstream.train.recipe import Adapter
from inkstream.types import InputError
from inkstream.weights.keymap import matches, translate
from inkstream.weights.lora.changes import Change, LayerChange, Lora, LowRank
from inkstream.weights.lora.changes import Part as Rows


@dataclass(frozen=True)
class Slot:
    """Some rows of a layer that get a change of their own, such as the queries of a fused QKV layer."""

    path: str  # the layer in our model
    rows: slice
    name: str  # the layer in diffusers' layout


def slots_of(part: Part, transformer: nn.Module, patterns: Sequence[str]) -> list[Slot]:
    """Return what the patterns choose, in the model's order. transformer: may be on meta.

    A pattern (`*` matches anything) matches our name of a layer, or diffusers' name of the layer or of some of its
    rows. Without patterns: attention and feed-forward of all blocks but refiners, which other trainers choose too.
    Raises InputError for a pattern that matches nothing.
    """
    slots = [
        slot
        for path, layer in transformer.named_modules()
        if hasattr(layer, "in_features")
        for slot in _rows_of(part, path, layer)
    ]
    if not patterns:
        packed = (s for s in slots if any(matches(pattern, s.path) for pattern in part.packs))
        return [slot for slot in packed if "refiner" not in slot.path and not reads_time(slot.path)]
    found: set[str] = set()
    for pattern in patterns:
        chosen = {s.name for s in slots if fnmatchcase(s.path, pattern) or fnmatchcase(s.name, pattern)}
        if not chosen:
            there = slots_of(part, transformer, ())[0].name
            raise InputError(f"[adapter] layers: {pattern!r} matches no layer of this model, which has such as {there}")
        found |= chosen
    return [slot for slot in slots if slot.name in found]


def _rows_of(part: Part, path: str, layer: nn.Module) -> Iterator[Slot]:
    """Yield the layer whole, or in the row blocks that are layers of their own in diffusers' layout."""
    height = int(layer.out_features)  # type: ignore[arg-type]
    numbers = torch.arange(height).view(height, 1).expand(height, int(layer.in_features))  # type: ignore[arg-type]
    theirs = translate(part.layouts.get("diffusers", ()), {f"{path}.weight": numbers}, back=True)
    blocks: list[Slot] = []
    for name, tensor in theirs.items():
        assert isinstance(tensor, Tensor)
        own = tensor.flatten(1)[:, 0]
        if len(theirs) > 1 and not torch.equal(own, torch.arange(int(own[0]), int(own[0]) + len(own))):
            break
        rows = slice(int(own[0]), int(own[0]) + len(own)) if len(theirs) > 1 else slice(None)
        blocks.append(Slot(path, rows, name.removesuffix(".weight")))
    whole = len(theirs) == 1 or sum(slot.rows.stop - slot.rows.start for slot in blocks) == height
    yield from blocks if whole else [Slot(path, slice(None), path)]


# Weights ------------------------------------------------------------------------------------------------------------


class LowRankWeights(nn.Module):
    """The weights of a LoRA of some rows. At the start it changes nothing: down is random and up is zero."""

    def __init__(
        self, weight: Callable[[], Tensor], shape: tuple[int, int], settings: Adapter, generator: torch.Generator
    ):
        super().__init__()
        height, width = shape
        self.down = nn.Parameter(kaiming(settings.rank, width, generator))
        self.up = nn.Parameter(torch.zeros(height, settings.rank))
        alpha = settings.alpha or settings.rank
        self.scale = alpha / (math.sqrt(settings.rank) if settings.kind == "rslora" else settings.rank)

    def change(self, weights: Mapping[str, Tensor]) -> Change:
        return LowRank(weights["down"], weights["up"], self.scale)


def kaiming(rank: int, width: int, generator: torch.Generator) -> Tensor:
    """Return uniform numbers with the bound 1 / sqrt(width), (rank, width), as PEFT and kohya begin with."""
    return (torch.rand(rank, width, generator=generator) * 2 - 1) / math.sqrt(width)


KINDS = {"lora": LowRankWeights, "rslora": LowRankWeights}
"""Kind of adapter -> the module that holds the weights of one of its changes."""


class LayerWeights(nn.Module):
    """The changes of one layer: what a forward calls, as `nn.around.adapters.Product`."""

    def __init__(self, layer: nn.Module, slots: Sequence[Slot], settings: Adapter, generator: torch.Generator):
        super().__init__()
        self.__dict__["layer"] = layer  # not a submodule: its weights are the model's
        self.slots = slots
        for number, slot in enumerate(slots):
            height = len(range(int(layer.out_features))[slot.rows])  # type: ignore[arg-type]
            shape = height, int(layer.in_features)  # type: ignore[arg-type]
            if settings.rank > min(shape):
                raise InputError(f"[adapter] rank = {settings.rank} is more than {slot.name}'s sides {shape}: lower it")
            self.add_module(
                str(number), KINDS[settings.kind](lambda slot=slot: self._weight(slot), shape, settings, generator)
            )

    def forward(self, x: Tensor, plain: Tensor, out: Tensor) -> None:
        for slot, weights in zip(self.slots, self.children()):
            change = weights.change(dict(weights.named_parameters()))  # type: ignore[operator]
            weight = self._weight(slot) if change.reads else None
            bias = getattr(self.__dict__["layer"], "bias", None)
            own = plain[:, slot.rows].clone() if change.reads else plain[:, slot.rows]  # out may be the same memory
            bound = change.bind(weight, None if bias is None else bias[slot.rows], lambda tensor: tensor.to(x))
            bound.add(x, own, out[:, slot.rows], 1.0)

    def _weight(self, slot: Slot) -> Tensor:
        return full_weight(self.__dict__["layer"])[slot.rows].float()


class AdapterWeights(nn.Module):
    """The weights of an adapter for a transformer, by layer. A layer's name has slashes for dots."""

    def __init__(self, transformer: nn.Module, slots: Sequence[Slot], settings: Adapter, seed: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.settings = settings
        self.layers = nn.ModuleDict()
        for path in dict.fromkeys(slot.path for slot in slots):
            own = [slot for slot in slots if slot.path == path]
            layer = transformer.get_submodule(path)
            self.layers[path.replace(".", "/")] = LayerWeights(layer, own, settings, generator)

    @property
    def slots(self) -> list[Slot]:
        return [slot for layer in self.layers.values() for slot in layer.slots]  # type: ignore[union-attr]

    def apply_to(self, transformer: nn.Module) -> Applied:
        """Return the adapter of a forward, which computes with these weights as they change."""
        return Applied.of(transformer, {path.replace("/", "."): own for path, own in self.layers.items()})  # type: ignore[misc]

    def weights_in(self, block: nn.Module) -> list[nn.Parameter]:
        """Return the weights that change the layers of a block."""
        layers = {id(layer) for layer in block.modules()}
        owns = [own for own in self.layers.values() if id(own.__dict__["layer"]) in layers]
        return [weight for own in owns for weight in own.parameters()]

    def lora(self, state: Mapping[str, Tensor]) -> Lora:
        """Return the adapter with the tensors of a state, named like this module's parameters."""
        layers: dict[str, LayerChange] = {}
        for key, layer in self.layers.items():
            assert isinstance(layer, LayerWeights)
            parts: list[Rows] = []
            for slot, (number, weights) in zip(layer.slots, layer.named_children()):
                prefix = f"layers.{key}.{number}."
                own = {name: state[prefix + name].float() for name, _ in weights.named_parameters()}
                parts.append(Rows(weights.change(own), slot.rows))  # type: ignore[operator]
            layers[key.replace("/", ".")] = LayerChange(parts)
        return Lora(layers)
