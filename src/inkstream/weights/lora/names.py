"""The layers that the keys in adapters' files name.

The paths in the keys are those of a model's published layouts, with dots or with underscores in their place. They are
looked up in a table made of the model's own layers, so that no name is split by guessing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from inkstream.weights.keymap import Rule, becomes, translate

COMMON = ("native", "diffusers")
"""The layouts of models. A name of another layout is a dialect of its own."""


@dataclass(frozen=True, eq=False)
class Place:
    """Where the layer of a file is in our model: some rows of one of our layers.

    order: row i of these rows is row order[i] of the file's layer; None if the order is the same.
    """

    layer: str
    rows: slice
    order: Tensor | None = None

    @property
    def height(self) -> int:
        return self.rows.stop - self.rows.start


@dataclass(frozen=True, eq=False)
class Names:
    """The layers of a model, and their names in the published layouts and in adapters' files.

    layers: path -> (O, I). vectors: other parameters by name -> shape. layouts: name -> the rules that translate it.
    written: the dialect of an adapter's file -> the layout that its names are from. biased: paths of the layers with a
    bias. widths: size of a layer's input -> the models in which it is the usual one.
    """

    layers: Mapping[str, tuple[int, int]]
    vectors: Mapping[str, tuple[int, ...]]
    layouts: Mapping[str, Sequence[Rule]]
    written: Mapping[str, str] = field(default_factory=dict)
    biased: frozenset[str] = frozenset()
    widths: Mapping[int, str] = field(default_factory=dict)

    def places(self, layout: str) -> dict[str, Place]:
        """The layers of a layout by their paths in it, in the model's order."""
        # Each row of a layer holds its own index, so that the translated layers say which rows they are made of.
        rows = {f"{path}.weight": torch.arange(height)[:, None] for path, (height, _) in self.layers.items()}
        owners = {
            their: path for path in self.layers for their in becomes(self.layouts[layout], f"{path}.weight", back=True)
        }
        return {
            their.removesuffix(".weight"): _place(owners[their], indices[:, 0])
            for their, indices in translate(self.layouts[layout], rows, back=True).items()
            if isinstance(indices, Tensor)
        }

    @cached_property
    def _places(self) -> dict[str, tuple[str, str, Place]]:
        """Path with underscores -> its layout, path and place. The first layout with a path counts."""
        found: dict[str, tuple[str, str, Place]] = {}
        for layout in self.layouts:
            for path, place in self.places(layout).items():
                found.setdefault(path.replace(".", "_"), (layout, path, place))
        return found

    @cached_property
    def _vectors(self) -> dict[str, str]:
        """Name with underscores of a parameter, with and without its last word -> our name."""
        found: dict[str, str] = {}
        for name in self.vectors:
            for rules in self.layouts.values():
                for their in becomes(rules, name, back=True):
                    found |= {their.replace(".", "_"): name, their.rpartition(".")[0].replace(".", "_"): name}
        return found

    def find(self, path: str) -> tuple[str, str, Place] | None:
        """The layout, path and place of a layer, by its path in a file with dots or underscores."""
        return self._places.get(path.replace(".", "_"))

    def find_vector(self, path: str) -> str | None:
        """Our name of a parameter that is not of a layer, by its name in a file, of which `.weight` may be missing."""
        return self._vectors.get(path.replace(".", "_"))


def _place(layer: str, indices: Tensor) -> Place:
    """The place of a layer whose row i is row indices[i] of ours."""
    start = int(indices.min())
    rows = slice(start, start + len(indices))
    order = (indices - start).argsort()
    return Place(layer, rows, None if torch.equal(order, torch.arange(len(order))) else order)
