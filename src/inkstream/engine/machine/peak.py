"""The peak memory of a computation, measured by running it on meta tensors, which have shapes and no data."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_of(compute: Callable[[], object]) -> int:
    """The most bytes that tensors made by `compute` hold at the same time.

    `compute` must work on meta tensors. Tensors that exist before, such as weights, do not count, nor does the
    workspace of libraries.
    """
    count = Counting()
    with torch.inference_mode(), _Attention(), count:
        held = compute()
    del held
    return count.most


class Counting(TorchDispatchMode):
    """Counts the bytes of live storages: adds each new storage once, and subtracts it when it is freed."""

    def __init__(self) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.alive: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return False  # code that tests whether a computation can be skipped does not skip it
        out = func(*args, **(kwargs or {}))
        given = {id_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and id_of(leaf) not in given:  # views and in-place results use given storage
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata  # pyright: ignore[reportPrivateUsage]
        if key in self.alive:
            return
        self.alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def id_of(tensor: Tensor) -> int:
    """The identity of a tensor's storage."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


class _Attention(TorchFunctionMode):
    """Counts attention as a fused kernel, which keeps no score matrix. On meta, torch would not choose one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))
