"""How much memory a computation takes at its peak, found by doing it with tensors that have shapes and no data."""

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
    """Bytes of the tensors that `compute` makes, where most of them are alive at once.

    It is to work on meta tensors; what is there before it starts, its weights, does not count. Nor does what libraries
    take beside tensors.
    """
    count = _Count()
    with torch.inference_mode(), _Attention(), count:
        held = compute()
    del held
    return count.most


class _Count(TorchDispatchMode):
    """Adds the storage of every tensor that an operation returns, once, and takes it off when that is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return False  # whoever asks whether he may leave something out does not
        out = func(*args, **(kwargs or {}))
        given = {id_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and id_of(leaf) not in given:  # views and what is written in place are given
                self._add(leaf.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.alive:
            return
        self.alive[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def id_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class _Attention(TorchFunctionMode):
    """Fused kernels keep no matrix of scores; without data they would not be taken."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))
