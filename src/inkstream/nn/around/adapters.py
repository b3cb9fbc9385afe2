"""Adapters: they change the outputs of a model's layers for one picture and leave the model's weights unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from inkstream.types import InputError


class Product(Protocol):
    """The change that an adapter makes to one layer."""

    def __call__(self, x: Tensor, plain: Tensor, out: Tensor) -> None:
        """Adds the change to out, in place. All rows belong to pictures with this adapter.

        x: (N, I), the layer's input. plain: (N, O), the layer's own output; if the layer has one adapter, this is the
        same tensor as `out`. out: (N, O), the layer's output with the changes of the adapters before this one.
        """
        ...


@dataclass(frozen=True, eq=False)
class Adapter:
    """The changes of one adapter, by layer."""

    products: Mapping[nn.Module, Product]

    @staticmethod
    def of(model: nn.Module, products: Mapping[str, Product]) -> Adapter:
        """Builds an adapter; the keys of products are layer paths in an installed model.

        Raises InputError where a path is not a layer of the model.
        """
        layers = {path: layer for path, layer in model.named_modules() if hasattr(layer, "in_features")}
        if unknown := [path for path in products if path not in layers]:
            raise InputError(
                f"an adapter changes {unknown[0]}, which is not a layer of this model: use one made for this model"
            )
        return Adapter({layers[path]: product for path, product in products.items()})
