"""The one door to the products of a transformer, whose layers may be plain, packed, prepacked or shared."""

from __future__ import annotations

from torch import Tensor, nn

from inkstream.nn.forward import Forward, Rows
from inkstream.nn.quant import Rounded


def linear(layer: nn.Module, x: Tensor | Rounded, forward: Forward, rows: Rows) -> Tensor:
    """The layer's product, as the adapters of each row's sample change it. x: (N, I) -> (N, O).

    Of a layer whose inputs are shared with other processes (`parallel.share_layers`), the sum of what all give.
    """
    out = forward.adapt(layer, x, layer(x), rows)
    group = layer.__dict__.get("group")  # getattr of a module takes as long to find nothing as a small product
    return out if group is None else group.sum(out)


class Chain(nn.Sequential):
    """As nn.Sequential, its products through the door."""

    def forward(  # type: ignore[override]
        self, x: Tensor | Rounded, forward: Forward, rows: Rows
    ) -> Tensor:  # (N, I) -> (N, O)
        for layer in self:
            x = linear(layer, x, forward, rows) if hasattr(layer, "in_features") else layer(x)
        return x  # type: ignore[return-value]
