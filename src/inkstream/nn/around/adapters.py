"""What changes the products of a model's layers for one picture, while the model's weights stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from inkstream.types import InputError


class Product(Protocol):
    """What an adapter does to one layer."""

    def __call__(self, x: Tensor, out: Tensor) -> Tensor:
        """x: (N, I) what the layer is given; out: (N, O) what it gives, as adapters before this one changed it -> what
        counts in its place, (N, O), a new tensor. All rows are of pictures with this adapter."""
        ...


@dataclass(frozen=True, eq=False)
class Adapter:
    """The products that it changes, by layer."""

    products: Mapping[nn.Module, Product]

    @staticmethod
    def of(model: nn.Module, products: Mapping[str, Product]) -> Adapter:
        """products: by the layer's path in an installed model. InputError where a path names no layer of it."""
        layers = {path: layer for path, layer in model.named_modules() if hasattr(layer, "in_features")}
        if unknown := [path for path in products if path not in layers]:
            raise InputError(f"an adapter changes {unknown[0]}, which is no layer of this model: take one made for it")
        return Adapter({layers[path]: product for path, product in products.items()})
