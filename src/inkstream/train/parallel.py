"""Data parallel training: each process computes a piece of every batch. torchrun starts the processes.

ddp: each process holds all weights, and gradients are averaged. fsdp: the matrices inside blocks are sharded
(`fully_shard`) and gathered when a block runs; norms and weights outside blocks are small and are not sharded.
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
"""How long processes wait for the one that draws or encodes the training data."""
BUCKET = 1 << 24
"""Gradient values that are averaged in one call."""


@dataclass(frozen=True)
class Team:
    """The processes of a run, and the rank of this one."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and yields messages (rank 0)."""
        return self.rank == 0

    def wait(self) -> None:
        """Wait until all processes get here (barrier)."""
        if self.count > 1:
            dist.barrier()

    def any(self, flag: bool, device: torch.device) -> bool:
        """Return whether the flag is true in any process: all processes must stop at the same step."""
        if self.count == 1:
            return flag
        seen = torch.tensor(float(flag), device=device)
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        return bool(seen.item())

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over all processes."""
        if self.count > 1:
            value = value.detach().clone()
            dist.all_reduce(value)
        return value

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its mean over all processes, in place."""
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
    """Context manager: the team of torchrun's environment variables, or a single process without them."""
    if "RANK" not in os.environ:
        yield ALONE
        return
    if dist.is_initialized():  # a script trains more than once
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
    """Return this process's device: with several GPUs, the one of its local rank."""
    number = os.environ.get("LOCAL_RANK")
    return f"cuda:{number}" if number and name in ("", "cuda") and torch.cuda.is_available() else name


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Return a module's blocks: the members of its direct ModuleLists."""
    return [block for child in module.children() if isinstance(child, nn.ModuleList) for block in child]


def share_out(module: nn.Module, device: torch.device, team: Team, dtype: torch.dtype) -> None:
    """Shard the matrices inside blocks over the processes (FSDP). dtype: of the computation; weights stay float32.

    Norms are not sharded: a block may read their weights when it is not running.
    """
    mesh = init_device_mesh(device.type, (team.count,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in blocks_of(module):
        for layer in block.modules():
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh, mp_policy=policy)


def own_part(weight: Tensor) -> Tensor:
    """Return this process's shard of a weight, as a view of its memory."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def whole(part: Tensor, weight: Tensor) -> Tensor:
    """Gather a tensor that is sharded like `weight`. part: this process's shard. All processes must call it."""
    if not isinstance(weight, DTensor) or part.ndim == 0:
        return part
    shape, stride = weight.shape, weight.stride()
    return DTensor.from_local(
        part, weight.device_mesh, weight.placements, run_check=False, shape=shape, stride=stride
    ).full_tensor()


def cut(tensor: Tensor, weight: Tensor) -> Tensor:
    """Return this process's shard of a full tensor: the inverse of `whole`."""
    if not isinstance(weight, DTensor) or tensor.ndim == 0:
        return tensor
    mesh = weight.device_mesh
    parts = tensor.chunk(mesh.size(), dim=0)
    rank = mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else tensor[:0]


def checkpoint_blocks(module: nn.Module) -> None:
    """Turn on gradient checkpointing: the backward pass computes each block again, and activations are not stored."""
    for block in blocks_of(module):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_blocks(module: nn.Module) -> None:
    """Compile each block with torch.compile. The first steps take minutes, or less with a filled torch cache."""
    for block in blocks_of(module):
        block.compile(dynamic=True)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield consecutive tensors of one dtype in buckets of about BUCKET values."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (bucket[0].dtype != tensor.dtype or sum(t.numel() for t in bucket) > BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
