"""The adapter of a run: which layers it changes, its weights, and how a forward applies it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from inkstream.engine.drawing.adapters import bind
from inkstream.engine.files.merging import names_of
from inkstream.families import family_of
from inkstream.nn.around.adapters import Adapter as Applied
from inkstream.nn.quant import full_weight
from inkstream.train.optim import reads_time
from inkstream.train.recipe import Adapter
from inkstream.types import InputError, Spec
from inkstream.weights.keymap import matches
from inkstream.weights.lora.changes import Change, LayerChange, Lora, LowRank
from inkstream.weights.lora.changes import Part as Rows
from inkstream.weights.lora.factors import Dora, LoKr


@dataclass(frozen=True)
class Slot:
    """Some rows of a layer that get a change of their own, such as the queries of a fused QKV layer."""

    path: str  # the layer in our model
    rows: slice
    name: str  # these rows as a layer of the adapter's file


def slots_of(spec: Spec, settings: Adapter) -> list[Slot]:
    """Return what an adapter changes, in the model's order.

    A pattern (`*` matches anything) matches our name of a layer, or the file's name of the layer or of some of its
    rows. Without patterns: attention and feed-forward of all blocks but refiners, which other trainers choose too.
    Raises InputError for a pattern that matches nothing.
    """
    names, packs = names_of(spec), family_of(spec.family).parts["transformer"].packs
    places = names.places(names.written[settings.format]).items()
    slots = [Slot(place.layer, place.rows, name) for name, place in places]
    inside = [slot for slot in slots if any(matches(pattern, slot.path) for pattern in packs)]
    usual = [slot for slot in inside if "refiner" not in slot.path and not reads_time(slot.path)]
    if not settings.layers:
        return usual
    found: set[str] = set()
    for pattern in settings.layers:
        chosen = {s.name for s in slots if fnmatchcase(s.path, pattern) or fnmatchcase(s.name, pattern)}
        if not chosen:
            there = f"this model, which has such as {usual[0].name}"
            raise InputError(f"[adapter] layers: {pattern!r} matches no layer of {there}")
        found |= chosen
    return [slot for slot in slots if slot.name in found]


# Weights ------------------------------------------------------------------------------------------------------------


Shape = tuple[int, int]
"""(O, I) of the rows that a change is for."""


class LowRankWeights(nn.Module):
    """The weights of a LoRA. At the start it changes nothing: down is random, as in PEFT and kohya, and up is zero."""

    def __init__(self, shape: Shape, settings: Adapter, generator: torch.Generator, weight: Callable[[], Tensor]):
        super().__init__()
        height, width = shape
        self.down = nn.Parameter(kaiming(settings.rank, width, generator))
        self.up = nn.Parameter(torch.zeros(height, settings.rank))
        root = math.sqrt(settings.rank) if settings.kind == "rslora" else settings.rank
        self.scale = (settings.alpha or settings.rank) / root

    def change(self, own: Mapping[str, Tensor]) -> Change:
        return LowRank(own["down"], own["up"], self.scale)


class DoraWeights(LowRankWeights):
    """The weights of a DoRA. The norms of the rows begin as those of the model's weight, and `gain` is what they gain.

    So they stay exact where the computation is in bfloat16.
    """

    norms: Tensor

    def __init__(self, shape: Shape, settings: Adapter, generator: torch.Generator, weight: Callable[[], Tensor]):
        super().__init__(shape, settings, generator, weight)
        self.gain = nn.Parameter(torch.zeros(shape[0], 1))
        self.register_buffer("norms", weight().norm(dim=1, keepdim=True).cpu())

    def change(self, own: Mapping[str, Tensor]) -> Change:
        gain = own["gain"].float()
        return Dora(super().change(own), self.norms.to(gain.device) * (1 + gain))


class KroneckerWeights(nn.Module):
    """The weights of a LoKr. The second factor is low-rank if that is smaller. A factor begins as zero."""

    def __init__(self, shape: Shape, settings: Adapter, generator: torch.Generator, weight: Callable[[], Tensor]):
        super().__init__()
        rows, columns = (divisor(side, settings.factor) for side in shape)
        height, width = shape[0] // rows, shape[1] // columns
        self.w1 = nn.Parameter(kaiming(rows, columns, generator))
        self.scale = 1.0
        if settings.rank * (height + width) < height * width:
            self.w2_b = nn.Parameter(kaiming(settings.rank, width, generator))
            self.w2_a = nn.Parameter(torch.zeros(height, settings.rank))
            self.scale = (settings.alpha or settings.rank) / settings.rank
        else:
            self.w2 = nn.Parameter(torch.zeros(height, width))

    def change(self, own: Mapping[str, Tensor]) -> Change:
        return LoKr(own["w1"], own["w2"] if "w2" in own else (own["w2_a"], own["w2_b"]), self.scale)


def kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return uniform numbers with the bound 1 / sqrt(columns)."""
    return (torch.rand(rows, columns, generator=generator) * 2 - 1) / math.sqrt(columns)


def divisor(side: int, most: int) -> int:
    """Return the largest divisor of a side that is at most `most`."""
    return next(number for number in range(most, 0, -1) if side % number == 0)


KINDS = {"lora": LowRankWeights, "rslora": LowRankWeights, "dora": DoraWeights, "lokr": KroneckerWeights}
"""Kind of adapter -> the module that holds the weights of one of its changes."""


class LayerWeights(nn.Module):
    """The changes of one layer: what a forward calls, as `nn.around.adapters.Product`."""

    def __init__(self, layer: nn.Module, slots: Sequence[Slot], settings: Adapter, generator: torch.Generator):
        super().__init__()
        self.__dict__["layer"] = layer  # not a submodule: its weights are the model's
        self.slots = slots
        for number, slot in enumerate(slots):
            shape = slot.rows.stop - slot.rows.start, int(layer.in_features)  # type: ignore[arg-type]
            if settings.kind != "lokr" and settings.rank > min(shape):
                raise InputError(f"[adapter] rank = {settings.rank} is more than {slot.name}'s sides {shape}: lower it")
            kind = KINDS[settings.kind]
            self.add_module(str(number), kind(shape, settings, generator, lambda rows=slot.rows: self._weight()[rows]))

    def forward(self, x: Tensor, plain: Tensor, out: Tensor) -> None:
        changes = [weights.change(dict(weights.named_parameters())) for weights in self.children()]  # type: ignore[operator]
        reads = any(change.reads for change in changes)
        weight, bias = self._weight() if reads else None, getattr(self.__dict__["layer"], "bias", None)
        plain = plain.clone() if reads else plain  # otherwise it may be the same memory as out
        for slot, change in zip(self.slots, changes):
            rows = slot.rows
            own = None if weight is None else weight[rows]
            bound = change.bind(own, None if bias is None else bias[rows], lambda tensor: tensor.to(x))
            bound.add(x, plain[:, rows], out[:, rows], 1.0)

    def _weight(self) -> Tensor:
        return full_weight(self.__dict__["layer"]).float()


def fixed(lora: Lora, transformer: nn.Module, dtype: torch.dtype, device: torch.device) -> Applied:
    """Return a file's adapter for a forward, at strength 1. dtype: that the transformer computes in.

    Raises InputError if it changes more than layers.
    """
    if others := [*lora.vectors, *lora.replaced]:
        raise InputError(f"an adapter changes {others[0]}, which is no layer's: it can only be merged")
    layers = lora.layers.items()
    return Applied.of(transformer, {p: bind(transformer.get_submodule(p), own, device, dtype) for p, own in layers})


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
