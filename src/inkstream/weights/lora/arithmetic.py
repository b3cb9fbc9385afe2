"""Adapters as matrices: norms, products and best approximations of their changes.

A low-rank change is never made dense: its factors are reduced by QR to a core of the size of its rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from inkstream.types import InputError
from inkstream.weights.lora.changes import Change, LayerChange, LowRank
from inkstream.weights.lora.cuts import rows_of


def whole_change(layer: LayerChange, height: int, path: str, weight: Tensor | None = None) -> Change | Tensor | None:
    """Return the change of a layer's whole weight: one `Change` where that needs no weight, else the dense change.

    weight: (O, I) float32 of the model, or None. Returns None if only the bias changes. Raises InputError, which names
    the layer, if a change is relative to the weight and there is none.
    """
    reading = [part.change.algebra for part in layer.parts if part.change.reads]
    if not reading:
        return rows_of(layer.parts, slice(0, height), height, path)
    if weight is None:
        raise InputError(f"the {reading[0]} of {path} depends on the model's weights: give the model with -m MODEL")
    delta = torch.zeros_like(weight)
    for part in layer.parts:
        delta[part.rows] += part.change.delta(weight[part.rows])
    return delta


def dense(change: Change | Tensor) -> Tensor:
    """Return a change as a matrix (O, I). The change must not read the weight."""
    return change if isinstance(change, Tensor) else change.delta(None)


def dot(a: Change | Tensor, b: Change | Tensor) -> float:
    """Return the inner product <A, B>, the sum of the products of all numbers, in float64.

    For two low-rank changes it is sum((upA.T @ upB) * (downA @ downB.T)), without a dense matrix.
    """
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        ups, downs = a.up.double().T @ b.up.double(), a.down.double() @ b.down.double().T
        return a.scale * b.scale * float((ups * downs).sum())
    return float((dense(a) * dense(b)).sum(dtype=torch.float64))


def decompose(change: Change | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular values of a change, (r,) descending, with left (O, r) and right (r, I) vectors; float32.

    A dense matrix is decomposed by the eigenvectors of its smaller Gram matrix in float64, so singular values below
    1e-8 of the largest are noise. Those that are zero are left out.
    """
    if isinstance(change, LowRank):
        left, upper = torch.linalg.qr(change.up.double())
        right, lower = torch.linalg.qr(change.down.double().T)
        u, values, v = torch.linalg.svd(change.scale * upper @ lower.T, full_matrices=False)
        u, v = left @ u, v @ right.T
    else:
        matrix = dense(change).double()
        is_wide = matrix.shape[0] <= matrix.shape[1]
        squares, vectors = torch.linalg.eigh(matrix @ matrix.T if is_wide else matrix.T @ matrix)
        values, vectors = squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
        other = (vectors.T @ matrix if is_wide else (matrix @ vectors).T) / values.clamp(min=1e-300)[:, None]
        u, v = (vectors, other) if is_wide else (other.T, vectors.T)
    there = values > 1e-8 * values.max() if len(values) else values > 0
    return values[there].float(), u[:, there].float(), v[there].float()


def rank_for(values: Tensor, rank: int | None, keep: float | None) -> int:
    """Return the rank to keep of singular values: `rank`, or the smallest that keeps a share of the Frobenius norm.

    values: (r,) descending. The share is norm(values[:rank]) / norm(values).
    """
    if keep is None:
        return min(rank or 0, len(values))
    shares = values.double().square().cumsum(0) / values.double().square().sum()
    return min(int((shares < keep**2 * (1 - 1e-12)).sum()) + 1, len(values))


def approximate(change: Change | Tensor, rank: int | None, keep: float | None) -> tuple[LowRank | None, Tensor]:
    """Return the nearest change of a rank in the Frobenius norm, or the smallest that keeps a share of the norm.

    Both factors get the square root of the singular values. The second result are all singular values, of which the
    first `rank` are kept. The change is None if it is zero.
    """
    values, left, right = decompose(change)
    if not len(values):
        return None, values
    count = rank_for(values, rank, keep)
    roots = values[:count].sqrt()
    return LowRank((roots[:, None] * right[:count]).contiguous(), (left[:, :count] * roots).contiguous()), values
