"""Adapters are merged into a model's weights: the sum is made in float32 and is rounded once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from inkstream.quant.pack import fits, pack
from inkstream.quant.packed import Packed, Weight, unpack
from inkstream.quant.small import rotate
from inkstream.types import InputError
from inkstream.weights.lora.changes import Lora

SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
"""Dtypes as options name them."""
MUCH_LOST = 0.9
"""A kept share below this is told with a remedy."""


@dataclass(frozen=True, eq=False)
class Merged:
    """An adapter and its strengths: path of a layer, or name of another parameter -> the strength there."""

    name: str
    lora: Lora
    strengths: Mapping[str, float]


@dataclass(eq=False)
class Merge:
    """Adapters to merge into a transformer, and how much of their change the weights so far have kept.

    All changes are relative to the weights without adapters. wanted: the sum of <delta, delta> over the changed weights
    so far. kept: that of <delta, actual change>. forms: the dtypes and packed formats of what was changed.
    """

    adapters: Sequence[Merged]
    wanted: float = 0.0
    kept: float = 0.0
    forms: dict[str, None] = field(default_factory=dict[str, None])

    @cached_property
    def names(self) -> frozenset[str]:
        """The names of the weights that change."""
        found: set[str] = set()
        for one in self.adapters:
            for path, layer in one.lora.layers.items():
                found |= {f"{path}.weight"} if layer.parts else set()
                found |= {f"{path}.bias"} if layer.bias is not None else set()
            found |= one.lora.vectors.keys() | one.lora.replaced.keys()
        return frozenset(found)

    @property
    def share(self) -> float:
        """The kept share of the change: <delta, actual change> / <delta, delta>, which is 1 if nothing is rounded."""
        return self.kept / self.wanted if self.wanted else 1.0

    def line(self) -> str:
        """What was merged, and the kept share, in one line."""
        names, forms = " and ".join(one.name for one in self.adapters), " and ".join(self.forms)
        if not self.wanted:
            return f"merged {names}: it changes nothing"
        hint = "; --lora, which needs no merge, keeps all of it" if self.share < MUCH_LOST else ""
        return f"merged {names}: {self.share:.1%} of the change is kept ({forms}){hint}"

    def let_go(self) -> None:
        """Free the memory of the adapters once all weights are changed. The names of these weights stay known."""
        _ = self.names
        self.adapters = ()

    def check(self, weights: Mapping[str, Weight]) -> None:
        """Raise InputError if a changed weight is not there, or is packed in a format that is not written here.

        weights: of the model, by our names; they may be on meta.
        """
        for name in sorted(self.names):
            if (weight := weights.get(name)) is None:
                names = " and ".join(one.name for one in self.adapters)
                raise InputError(f"{names} changes {name}, which is not in this model's files: use --lora")
            refit(name, torch.empty(weight.shape, device="meta"), weight)

    def change(self, name: str, weight: Weight, form: Weight) -> Weight:
        """Return a weight with all changes, in the form of another: its dtype, or its packed format.

        A weight on meta stays there, and no share is counted. Raises InputError as `check` does.
        """
        if weight.is_meta:
            return refit(name, torch.empty(weight.shape, device="meta"), form)
        base = unpack(weight) if isinstance(weight, Packed) else weight.float()
        delta = self.delta(name, base)
        made = refit(name, base + delta, form)
        actual = (unpack(made) if isinstance(made, Packed) else made.float()) - base
        self.wanted += float((delta * delta).sum(dtype=torch.float64))
        self.kept += float((delta * actual).sum(dtype=torch.float64))
        self.forms[made.format if isinstance(made, Packed) else SHORT.get(made.dtype, str(made.dtype))] = None
        return made

    def delta(self, name: str, base: Tensor) -> Tensor:
        """Return the change of a weight by all adapters at their strengths. base: the weight, float32."""
        delta = torch.zeros_like(base)
        path, _, kind = name.rpartition(".")
        for one in self.adapters:
            lora = one.lora
            if name in lora.vectors:
                delta += one.strengths[name] * lora.vectors[name]
            elif name in lora.replaced:
                delta += one.strengths[name] * (lora.replaced[name] - base)
            elif (layer := lora.layers.get(path)) is not None and kind == "bias":
                delta += 0 if layer.bias is None else one.strengths[path] * layer.bias
            elif layer is not None:
                for part in layer.parts:
                    delta[part.rows] += one.strengths[path] * part.change.delta(base[part.rows])
        return delta


def refit(name: str, full: Tensor, form: Weight) -> Weight:
    """Round or pack a float32 tensor into the form of another weight. Works on meta.

    A weight whose packed blocks span rows, which no layer can hold, becomes bfloat16. Raises InputError, which names
    the weight, for a format that is not written here.
    """
    if not isinstance(form, Packed):
        return full.to(form.dtype)
    if len(form.data) != len(form) or form.ndim != 2:
        return full.to(torch.bfloat16)
    if not fits(form.format, form.shape):
        raise InputError(
            f"{name} is packed as {form.format}, which is only read here: use --lora, which needs no merge, "
            "or write another precision with inkstream lora merge --quant"
        )
    turned = rotate(full, form.rotated) if form.rotated and not full.is_meta else full  # which is its own inverse
    return replace(pack(form.format, turned, form.dynamic), rotated=form.rotated)


def merge_into(state: Mapping[str, Weight], merge: Merge, dtype: torch.dtype) -> dict[str, Weight]:
    """Return a model's weights with the changed ones in place: packed as they were, or rounded once to `dtype`.

    The others are the same objects. Works on meta.
    """
    return {name: merge.change(name, weight, form_after(weight, dtype)) if name in merge.names else weight
            for name, weight in state.items()}  # fmt: skip


def form_after(weight: Weight, dtype: torch.dtype) -> Weight:
    """Return, on meta, what has the form of a weight after a merge in a model that computes in `dtype`."""
    whole_rows = isinstance(weight, Packed) and len(weight.data) == len(weight) and weight.ndim == 2
    return weight.to("meta") if whole_rows else torch.empty(weight.shape, dtype=dtype, device="meta")
