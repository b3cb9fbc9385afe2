"""What learns, in float32, beside the modules that compute with it: in bfloat16 perhaps, or shared out."""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from inkstream.train.parallel import ALONE, Team, cut, own_part, whole


class Weights:
    """`masters` are what the optimiser moves, by `part.name`: float32, of this process alone.

    In float32 they share the memory of the modules' own weights; in bfloat16 those are copies, made by `publish`.
    """

    def __init__(self, modules: Mapping[str, nn.Module], dtype: torch.dtype, team: Team = ALONE):
        self.team = team
        self.live = {f"{part}.{name}": p for part, module in modules.items() for name, p in module.named_parameters()}
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
        """Hand the gradients to the masters: averaged over the team, their norm all together at most `clip`.

        The norm before; 0 does not clip.
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
        """Let the modules have what the masters are now."""
        if self._copied:
            torch._foreach_copy_(list(self._copied.values()), [self.masters[name] for name in self._copied])
        for master in self.masters.values():
            master.grad = None

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by name, like masters, put together from all processes; all must ask."""
        return {name: whole(tensor, self.live[name]) for name, tensor in tensors.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take whole weights out of a state that holds them."""
        self.fill(self.masters, state)
        self.publish()

    @torch.no_grad()
    def fill(self, tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Write whole tensors into this process's parts of them."""
        for name, tensor in tensors.items():
            tensor.copy_(cut(state[name], self.live[name]))

    @contextmanager
    def using(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """The modules compute with these, by name like masters, for as long as the context; none: as they are."""
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
