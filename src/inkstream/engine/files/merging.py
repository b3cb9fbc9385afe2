"""Adapters that a user merges into a model are found and checked against it, before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from inkstream.engine.files.loras import factors_of, find_lora
from inkstream.engine.files.parts import Unset
from inkstream.engine.files.sources import Source
from inkstream.families import adapter_names
from inkstream.types import LoraUse, Spec
from inkstream.weights.lora.merge import Merge, Merged
from inkstream.weights.lora.names import Names
from inkstream.weights.lora.read import read_lora


def open_merge(uses: Sequence[LoraUse], folder: Path, source: Source) -> Merge:
    """Read adapters to merge into a model's transformer. folder: of the adapters that can be named.

    Raises InputError if one is not there or is for another model.
    """
    names = names_of(source.spec)
    return Merge([open_merged(use, folder, names) for use in uses])


def open_merged(use: LoraUse, folder: Path, names: Names) -> Merged:
    """Read one adapter, and its strength at each layer."""
    path = find_lora(use.path, folder)
    lora = read_lora(path, names)
    factors = factors_of(use, [*lora.layers, *lora.vectors, *lora.replaced])
    return Merged(path.stem, lora, {name: use.strength * factor for name, factor in factors.items()})


def names_of(spec: Spec) -> Names:
    """Return the names of a model's layers. Unlike `adapter_names`, it takes no time to draw weights."""
    with Unset():
        return adapter_names(spec)
