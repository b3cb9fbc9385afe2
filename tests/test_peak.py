"""The peak memory of a computation, counted on meta tensors."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from inkstream.engine.machine.peak import peak_of

META = torch.device("meta")
KB = 1024


def kilobytes(count, dtype=torch.float32):
    return torch.empty(count * KB // dtype.itemsize, dtype=dtype, device=META)


def test_live_tensors_count_and_freed_ones_do_not():
    x = kilobytes(4)

    def chain():
        y = x + 1
        y = y + 1  # two tensors are alive, then the first is freed
        y = y + 1
        return y + 1

    assert peak_of(chain) == 8 * KB


def test_views_and_in_place_writes_take_no_memory():
    x = kilobytes(4)

    def compute():
        y = x * 2
        y.add_(1)
        y.view(2, -1).transpose(0, 1)[1:].mul_(3)
        return y

    assert peak_of(compute) == 4 * KB


def test_existing_weights_do_not_count():
    with torch.device("meta"):
        layer = torch.nn.Linear(256, 512)
    x = torch.empty(8, 256, device=META)
    assert peak_of(lambda: layer(x)) == 8 * 512 * 4


def test_attention_keeps_no_score_matrix():
    q = torch.empty(1, 2, 4096, 64, device=META)
    assert peak_of(lambda: F.scaled_dot_product_attention(q, q, q)) == q.nbytes


def test_the_size_of_a_dtype_counts():
    x = kilobytes(4, torch.bfloat16)
    assert peak_of(lambda: x.float()) == 8 * KB
    assert peak_of(lambda: x + x) == 4 * KB


def test_real_tensors_are_counted_in_the_same_way():
    x = torch.ones(256, 256)
    assert peak_of(lambda: (x @ x) + 1) == 2 * x.nbytes
