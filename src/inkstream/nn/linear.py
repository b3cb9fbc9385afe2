"""The one function for linear layers of a transformer, whose weights may be plain, packed, prepacked or shared out."""

from __future__ import annotations

from torch import Tensor, nn

from inkstream.nn.forward import Forward, Rows
from inkstream.nn.quant import Rounded


def linear(layer: nn.Module, x: Tensor | Rounded, forward: Forward, rows: Rows) -> Tensor:
    """The layer's output, changed by the adapters of each row's sample. x: (N, I) -> (N, O).

    If the layer's inputs are shared with other processes (`parallel.share_layers`), the outputs are all-reduced.
    """
    out = forward.product(layer, x, rows)
    group = layer.__dict__.get("group")  # a failing getattr of a module takes as long as a small product
    return out if group is None else group.sum(out)


class Chain(nn.Sequential):
    """Like nn.Sequential, with its linear layers called by `linear`."""

    def forward(  # type: ignore[override]
        self, x: Tensor | Rounded, forward: Forward, rows: Rows
    ) -> Tensor:  # (N, I) -> (N, O)
        for layer in self:
            x = linear(layer, x, forward, rows) if hasattr(layer, "in_features") else layer(x)
        return x  # type: ignore[return-value]
