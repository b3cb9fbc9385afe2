"""How much memory a model's weights take, and how much there is."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from inkstream.engine.loader import DTYPES, dtype_of
from inkstream.engine.sources import Unset
from inkstream.families import parts_of
from inkstream.types import Spec


def weigh(weights: Mapping[str, int], dtype: str, device: torch.device) -> int:
    """Bytes of weights counted by `count_weights`, loaded in a dtype on a device."""
    return sum(count * dtype_of(part, DTYPES[dtype], device).itemsize for part, count in weights.items())


def count_weights(spec: Spec) -> dict[str, int]:
    """Part -> how many numbers its weights are. Nothing is allocated."""
    parts = parts_of(spec).items()
    return {name: _count(part.count, part.build, getattr(spec, name)) for name, part in parts}


@cache  # models share their parts
def _count(count: Callable[[Any], int] | None, build: Callable[[Any], nn.Module], config: Any) -> int:
    with torch.device("meta"), Unset():
        return count(config) if count else sum(weight.numel() for weight in build(config).parameters())


def free_memory(device: torch.device) -> tuple[int | None, int | None]:
    """(free, total) bytes of a device; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return total - torch.mps.driver_allocated_memory(), total
    if sys.platform == "win32":
        return _windows_memory()
    facts = _meminfo()
    total = facts.get("MemTotal")
    if total is None and hasattr(os, "sysconf"):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return _within_the_container(facts.get("MemAvailable"), total)


def _meminfo() -> Mapping[str, int]:
    """Linux's own figures, in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}


def _within_the_container(free: int | None, total: int | None) -> tuple[int | None, int | None]:
    """The same, cut to what a container may use (cgroup v2)."""
    with suppress(OSError, ValueError):
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())  # ValueError: "max", no limit
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        free = limit - used if free is None else min(free, limit - used)
        total = limit if total is None else min(total, limit)
    return free, total


def _windows_memory() -> tuple[int | None, int | None]:
    import ctypes

    class Status(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ulong), ("load", ctypes.c_ulong)] + [
            (name, ctypes.c_ulonglong) for name in ("total", "free", "a", "b", "c", "d", "e")
        ]

    status = Status(length=ctypes.sizeof(Status))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):  # type: ignore[attr-defined]
        return None, None
    return status.free, status.total
