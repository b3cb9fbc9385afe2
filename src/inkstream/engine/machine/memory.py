"""How much memory there is, and which plan keeps a model within it."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from inkstream.engine.drawing.model import Complete, complete
from inkstream.engine.drawing.options import guided, options
from inkstream.engine.files.sources import Unset
from inkstream.engine.machine.loader import Opened
from inkstream.engine.machine.placement import PLANS, Plan, plan_request
from inkstream.families import parts_of
from inkstream.types import InputError, Request, Spec

PLENTY = 32 * 1024
"""Bytes for each pixel of a picture that no model here comes near."""
SPARE = 0.9
"""Of what is free, how much is planned with: drivers and libraries take some for themselves."""
UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


class Placing:
    """Which plans keep an opened model within a budget, request by request.

    memory: bytes to keep within, on the CPU with all that the process has already; None: what is free now. plan: the
    one to take whatever it needs. least: the first to think of, by its place in `PLANS`.
    """

    def __init__(self, opened: Opened, memory: int | None = None, plan: str | None = None, least: int = 0):
        self.opened = opened
        self.names = list(PLANS)[least:]
        if plan is not None:
            self.names = [plan] if plan in self.names else self.names[:1]
        self.memory = memory
        self.taken = taken_by_process() if opened.device.type == "cpu" else 0
        free, _ = free_memory(opened.device)
        spare = None if free is None else int(free * SPARE)
        self.budget = spare if memory is None else memory - self.taken
        self.plan = self.names[0]
        self._known: dict[tuple[Any, ...], list[Plan]] = {}

    def choose(self, request: Request) -> str:
        """The fastest plan that keeps within the budget. InputError where none does, if the budget was asked for."""
        request = complete(request, self.opened.source.spec)
        suiting = self.suiting(request)
        if not suiting and self.memory is not None:
            least = min(self.plans(request), key=lambda plan: plan.peak)
            raise InputError(
                f"{self.memory / 2**30:.2f} GiB of memory are not enough: {self.opened.source.spec.name} takes "
                f"{least.peak / 2**30:.2f} GiB at the least (plan {least.name})"
                + (f" beside {self.taken / 2**30:.2f} GiB of this process" if self.taken else "")
                + ": give it more, a smaller size or weights in fewer bits"
            )
        self.plan = suiting[0] if suiting else self.names[-1]  # what was only seen to be free may yet do
        return self.plan

    def suiting(self, request: Request) -> list[str]:
        """The plans that keep within the budget, from the fastest."""
        request = complete(request, self.opened.source.spec)
        if len(self.names) == 1 or self.budget is None or self._is_plenty(request):
            return self.names
        return [plan.name for plan in self.plans(request) if plan.name in self.names and plan.peak <= self.budget]

    def plans(self, request: Request) -> list[Plan]:
        """All plans, with what each needs for the request."""
        spec = self.opened.source.spec
        request = complete(request, spec)
        asked = (request.width, request.height, guided(request, spec), len(request.reference), request.image is None)
        texts = (len(request.prompt) // 64, len(request.negative_prompt) // 64)
        if (key := (*asked, *texts)) not in self._known:
            opened = self.opened
            self._known[key] = plan_request(
                opened.source, opened.tokenizers, request, opened.device, opened.dtypes, opened.crew
            )
        return self._known[key]

    def _is_plenty(self, request: Complete) -> bool:
        """Whether the model is so small that all of it may be resident, without looking closer."""
        opened = self.opened
        weights = sum(count * opened.dtypes[part].itemsize for part, count in opened.numbers.items())
        return 2 * weights + PLENTY * request.width * request.height <= (self.budget or 0)


def typical(spec: Spec) -> Request:
    """A request as many are, at the model's own size."""
    needed = {name for name, option in options(spec).items() if option.needed}
    blank = Image.new("RGB", spec.size, "white")  # as a mask: all of it is repainted
    pictures = {"image": blank, "mask": blank, "reference": (blank,)}
    return Request(prompt="a lighthouse in fog, " * 12, **{name: pictures[name] for name in needed & pictures.keys()})


def taken_by_process() -> int:
    """Bytes of this process in memory; 0 where the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def read_size(text: str) -> int:
    """Bytes of a size like 4GiB, 3.5 GB or 800MiB. InputError where it is none."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text.lower())
    if found is None or found[2] not in UNITS or float(found[1]) == 0:
        raise InputError(f"{text!r} is no size of memory: write it like 4GiB or 800MiB")
    return int(float(found[1]) * UNITS[found[2]])


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
