"""Softmax attention over packed sequences: they lie end to end, of any length, and each attends to itself alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F


def attend(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: Sequence[int], k_lengths: Sequence[int], causal: bool = False
) -> Tensor:
    """Attention within each sequence. q: (sum(q_lengths), H, E); k, v: (sum(k_lengths), G, E) -> like q.

    Heads of k and v may be fewer (G divides H: grouped queries). Scale is 1 / sqrt(E).
    """
    runs = [(n, len(list(run))) for n, run in groupby(zip(q_lengths, k_lengths, strict=True))]
    if len(runs) == 1:
        b = len(q_lengths)
        q, k, v = (s.unflatten(0, (b, -1)).transpose(1, 2) for s in (q, k, v))  # (B, H, L, E)
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(0, 1)
    # Neighbours of equal length go together: a trainer sorts its batch for this.
    queries, keys = [n * b for (n, _), b in runs], [n * b for (_, n), b in runs]
    parts = zip(q.split(queries), k.split(keys), v.split(keys), runs)
    return torch.cat([attend(q, k, v, [n] * b, [m] * b, causal) for q, k, v, ((n, m), b) in parts])
