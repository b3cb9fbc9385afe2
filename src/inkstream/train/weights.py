"""Float32 master weights of modules that compute in float32 or bfloat16 and may be sharded."""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from inkstream.train.parallel import ALONE, Team, cut, own_part, whole
from inkstream.types import InputError


class Weights:
    """Master weights, which the optimiser changes. `masters`: this process's float32 weights or shards, by `part.name`.

    If modules compute in float32, the masters share the memory of their weights. If modules compute in bfloat16, their
    weights are copies, which `publish` updates. only: patterns of the weights that learn, without the part's name.
    """

    def __init__(
        self, modules: Mapping[str, nn.Module], dtype: torch.dtype, team: Team = ALONE, only: Sequence[str] = ("*",)
    ):
        self.team = team
        self.live = {
            f"{part}.{name}": p
            for part, module in modules.items()
            for name, p in module.named_parameters()
            if any(fnmatchcase(name, pattern) for pattern in only)
        }
        if not self.live:
            raise InputError(f"[model] only = {list(only)} names no weight: take a pattern such as layers.*")
        learning = {id(p) for p in self.live.values()}
        for p in (p for module in modules.values() for p in module.parameters()):
            if id(p) not in learning and not isinstance(p, DTensor):
                p.data = p.data.to(dtype)
        self.masters: dict[str, Tensor] = {}
        for name, p in self.live.items():
            own = own_part(p.detach())
            if dtype != torch.float32 and not isinstance(p, DTensor):
                own = own.float().clone()
                p.data = p.data.to(dtype)
            self.masters[name] = own
            p.requires_grad_(True)
        self._copied = {name: p for name, p in self.live.items() if p.dtype != torch.float32}

    @torch.no_grad()
    def collect(self, clip: float) -> Tensor:
        """Move the gradients to the masters, average them over the team, and clip their total norm to `clip`.

        Returns the norm before clipping. clip = 0 does not clip.
        """
        for name, p in self.live.items():
            self.masters[name].grad = None if p.grad is None else own_part(p.grad).float()
            p.grad = None
        given = {name: master.grad for name, master in self.masters.items() if master.grad is not None}
        shared = {name for name in given if isinstance(self.live[name], DTensor)}
        self.team.average([gradient for name, gradient in given.items() if name not in shared])
        squares = torch.stack([g.square().sum() for name, g in given.items() if name not in shared]).sum()
        if shared:
            squares += self.team.sum(torch.stack([given[name].square().sum() for name in shared]).sum())
        norm = squares.sqrt()
        if clip:
            torch._foreach_mul_(list(given.values()), (clip / (norm + 1e-6)).clamp(max=1.0))
        return norm

    def forget(self) -> None:
        """Drop the modules' gradients."""
        for p in self.live.values():
            p.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters into the modules' weights and drop the masters' gradients."""
        if self._copied:
            torch._foreach_copy_(list(self._copied.values()), [self.masters[name] for name in self._copied])
        for master in self.masters.values():
            master.grad = None

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gather the shards of tensors, named like the masters, from all processes. All processes must call it."""
        return {name: whole(tensor, self.live[name]) for name, tensor in tensors.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Load full weights from a state into the masters and the modules."""
        self.fill(self.masters, state)
        self.publish()

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Copy full tensors of a state into this process's shards."""
        for name, tensor in tensors.items():
            tensor.copy_(cut(state[name], self.live[name]))

    @contextmanager
    def using(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Context manager: modules use these tensors, named like the masters; if none, they keep their weights."""
        if not tensors:
            yield
            return
        own = [own_part(p.detach()) for p in self.live.values()]
        with torch.no_grad():
            kept = [p.clone() for p in own]
            torch._foreach_copy_(own, [tensors[name] for name in self.live])
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(own, kept)
