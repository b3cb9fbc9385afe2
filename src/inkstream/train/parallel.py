"""Several processes, one run: each computes a share of every batch. Started by torchrun; alone without it.

ddp: every process holds all weights and gradients are averaged. fsdp: the matrices inside blocks are shared out
(`fully_shard`) and gathered when a block runs; what is outside blocks, and norms, is small and stays whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

PATIENCE = timedelta(hours=12)
"""How long processes wait for one that draws or encodes what is learnt from."""
BUCKET = 1 << 24
"""Numbers that are averaged in one call."""


@dataclass(frozen=True)
class Team:
    """The processes of a run, and which of them this one is."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier()

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is up in any process: all must stop at the same step."""
        if self.count == 1:
            return flag
        seen = torch.tensor(float(flag), device=device)
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        return bool(seen.item())

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.count > 1:
            value = value.detach().clone()
            dist.all_reduce(value)
        return value

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Each becomes its mean over all processes, in place."""
        if self.count == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            dist.all_reduce(flat)
            flat /= self.count
            for tensor, mean in zip(bucket, flat.split([tensor.numel() for tensor in bucket])):
                tensor.copy_(mean.view_as(tensor))


ALONE = Team()


@contextmanager
def join_team(device: torch.device) -> Iterator[Team]:
    """The team that torchrun's environment names, for as long as the context; one process alone without it."""
    if "RANK" not in os.environ:
        yield ALONE
        return
    if dist.is_initialized():  # by a script that trains more than once
        yield Team(dist.get_rank(), dist.get_world_size())
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Team(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def own_device(name: str) -> str:
    """The device of this process: of several GPUs the one of its number."""
    number = os.environ.get("LOCAL_RANK")
    return f"cuda:{number}" if number and name in ("", "cuda") and torch.cuda.is_available() else name


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The blocks that a module is a stack of: the members of its own lists."""
    return [block for child in module.children() if isinstance(child, nn.ModuleList) for block in child]


def share_out(module: nn.Module, device: torch.device, team: Team, dtype: torch.dtype) -> None:
    """Leave each process a part of the matrices inside blocks; they are computed with in dtype, kept in float32.

    Norms stay whole: a block may read their weights when it is not being run.
    """
    mesh = init_device_mesh(device.type, (team.count,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in blocks_of(module):
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh, mp_policy=policy)


def own_part(weight: Tensor) -> Tensor:
    """What this process holds of a weight, sharing its memory."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def whole(part: Tensor, weight: Tensor) -> Tensor:
    """The whole of a tensor shared out as `weight` is, of which every process gives its part."""
    if not isinstance(weight, DTensor) or part.ndim == 0:
        return part
    shape, stride = weight.shape, weight.stride()
    return DTensor.from_local(
        part, weight.device_mesh, weight.placements, run_check=False, shape=shape, stride=stride
    ).full_tensor()


def cut(tensor: Tensor, weight: Tensor) -> Tensor:
    """This process's part of a whole tensor: the inverse of `whole`."""
    if not isinstance(weight, DTensor) or tensor.ndim == 0:
        return tensor
    mesh = weight.device_mesh
    parts = tensor.chunk(mesh.size(), dim=0)
    rank = mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else tensor[:0]


def checkpoint_blocks(module: nn.Module) -> None:
    """Compute each block again in the backward pass instead of keeping what it computed."""
    for block in blocks_of(module):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(module: nn.Module) -> None:
    """Compile each block: minutes for the first steps, less for a process that finds them in torch's cache."""
    for block in blocks_of(module):
        block.compile(dynamic=True)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one dtype of about BUCKET numbers."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (bucket[0].dtype != tensor.dtype or sum(t.numel() for t in bucket) > BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
