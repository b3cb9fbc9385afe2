"""Softmax attention over packed sequences: they lie end to end, of any length, and each attends to itself alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def attend(
    q: Tensor, k: Tensor, v: Tensor, q_lengths: Sequence[int], k_lengths: Sequence[int], causal: bool = False
) -> Tensor:
    """Attention within each sequence. q: (sum(q_lengths), H, E); k, v: (sum(k_lengths), G, E) -> like q.

    Heads of k and v may be fewer (G divides H: grouped queries). Scale is 1 / sqrt(E).
    """
    grouped = q.shape[1] != k.shape[1]
    if len(set(q_lengths)) == len(set(k_lengths)) == 1:
        b = len(q_lengths)
        q, k, v = (s.unflatten(0, (b, -1)).transpose(1, 2) for s in (q, k, v))  # (B, H, L, E)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(0, 1)
    parts = zip(q.split(list(q_lengths)), k.split(list(k_lengths)), v.split(list(k_lengths)))
    return torch.cat([attend(a, b, c, [len(a)], [len(b)], causal) for a, b, c in parts])
