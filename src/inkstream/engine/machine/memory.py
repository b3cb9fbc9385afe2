"""The memory that there is, and the placements that keep a model within it."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from inkstream.engine.drawing.adapters import bytes_foreseen
from inkstream.engine.drawing.complete import Complete, complete
from inkstream.engine.drawing.controls import control_bytes
from inkstream.engine.drawing.options import guided, options
from inkstream.engine.files.controls import control_folder, find_control, uses_of
from inkstream.engine.files.loras import lora_folder
from inkstream.engine.files.parts import Unset, locate_control
from inkstream.engine.files.upscalers import upscaler_folder
from inkstream.engine.machine.loader import Opened
from inkstream.engine.machine.placement import PLACEMENTS, Plan, plan_request
from inkstream.families import parts_of
from inkstream.types import InputError, Request, Spec

PLENTY = 32 * 1024
"""Bytes for each pixel of a picture: far more than any model here computes with."""
UPSCALING = 2**30
"""Bytes of a tile's work of an upscaling model, about: of ESRGAN at factor 4."""
SPARE = 0.9
"""The share of free memory to plan with. Drivers and libraries take the rest."""


class Placing:
    """The placements that keep an opened model within a memory budget, request by request.

    memory: the budget in bytes; on the CPU it includes all that the process already has. None: the memory that is free
    now. placement: the one to take, whatever it needs. least: the first placement to consider, by its place in
    `PLACEMENTS`.
    """

    def __init__(self, opened: Opened, memory: int | None = None, placement: str | None = None, least: int = 0):
        self.opened = opened
        self.names = list(PLACEMENTS)[least:]
        if placement is not None:
            self.names = [placement] if placement in self.names else self.names[:1]
        self.memory = memory
        self.taken = taken_by_process() if opened.device.type == "cpu" else 0
        free, _ = free_memory(opened.device)
        spare = None if free is None else int(free * SPARE)
        self.budget = spare if memory is None else memory - self.taken
        self.placement = self.names[0]
        self._known: dict[tuple[Any, ...], list[Plan]] = {}

    def choose(self, request: Request) -> str:
        """Return the fastest placement within the budget. Raises InputError if none is and `memory` was given."""
        request = complete(request, self.opened.source.spec)
        suiting = self.suiting(request)
        if not suiting and self.memory is not None:
            least = min(self.plans(request), key=lambda plan: plan.peak)
            needed = least.peak + self.adapters(request)
            raise InputError(
                f"{self.memory / 2**30:.2f} GiB of memory are not enough: {self.opened.source.spec.name} needs "
                f"{needed / 2**30:.2f} GiB at least (placement {least.placement})"
                + (f" beside {self.taken / 2**30:.2f} GiB of this process" if self.taken else "")
                + ": give it more, a smaller size or weights in fewer bits"
            )
        self.placement = suiting[0] if suiting else self.names[-1]  # an estimate of free memory may be too low
        return self.placement

    def suiting(self, request: Request, taken: int = 0) -> list[str]:
        """Return the placements that keep within the budget, the fastest first.

        taken: bytes of the adapters with which other requests are being drawn.
        """
        request = complete(request, self.opened.source.spec)
        if len(self.names) == 1 or self.budget is None:
            return self.names
        adapters = self.adapters(request) + taken
        if self._is_plenty(request, adapters):
            return self.names
        fitting = [plan.placement for plan in self.plans(request) if plan.peak + adapters <= self.budget]
        return [name for name in fitting if name in self.names]

    def adapters(self, request: Request) -> int:
        """Return the bytes of a request's adapters. They are on the device under every placement."""
        if not request.loras:
            return 0
        opened = self.opened
        return bytes_foreseen(
            request.loras, lora_folder(opened.machine), opened.dtypes["transformer"], opened.source.spec
        )

    def plans(self, request: Request) -> list[Plan]:
        """Return what each placement needs for the request, without its adapters."""
        spec = self.opened.source.spec
        request = complete(request, spec)
        asked = (request.width, request.height, guided(request, spec), len(request.reference), request.image is None)
        asked = (*asked, request.repaints, request.tile, request.control_nets, request.regions)
        asked = (*asked, request.final_size(spec.multiple), request.upscale_strength > 0, request.upscaler)
        texts = (len(request.prompt) // 64, len(request.negative_prompt) // 64)
        if (key := (*asked, *texts)) not in self._known:
            opened, without_loras = self.opened, request.model_copy(update={"loras": ()})
            paths = {find_control(use.path, control_folder(opened.machine)) for use in uses_of(request)}
            self._known[key] = plan_request(
                opened.source,
                opened.tokenizers,
                without_loras,
                opened.device,
                opened.dtypes,
                opened.crew,
                opened.merged,
                {path: locate_control(opened.source.family, spec.name, path) for path in paths},
                control_folder(opened.machine),
                upscaler_folder(opened.machine),
                opened.away,
            )
        return self._known[key]

    def _is_plenty(self, request: Complete, adapters: int) -> bool:
        """Whether the model is so small that it can be resident without a closer look. adapters: their bytes."""
        opened = self.opened
        weights = sum(
            count * opened.dtypes[part].itemsize for part, count in opened.numbers.items() if part not in opened.away
        )
        weights += control_bytes(request, control_folder(opened.machine), opened.dtypes["transformer"])
        weights += UPSCALING if request.upscaler else 0
        pixels = math.prod(request.final_size(opened.source.spec.multiple))
        return 2 * weights + PLENTY * pixels + adapters <= (self.budget or 0)


def typical(spec: Spec) -> Request:
    """Return a typical request at the model's own size."""
    needed = {name for name, option in options(spec).items() if option.needed}
    blank = Image.new("RGB", spec.size, "white")  # as a mask: all of it is repainted
    pictures: dict[str, Any] = {"image": blank, "mask": blank, "reference": (blank,)}
    return Request(prompt="a lighthouse in fog, " * 12, **{name: pictures[name] for name in needed & pictures.keys()})


def taken_by_process() -> int:
    """Return the bytes of memory that this process holds; 0 if the system does not say."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


def count_weights(spec: Spec) -> dict[str, int]:
    """Part -> its number of parameters. Nothing is allocated."""
    parts = parts_of(spec).items()
    return {name: _count(part.count, part.build, getattr(spec, name)) for name, part in parts}


@cache  # models share their parts
def _count(count: Callable[[Any], int] | None, build: Callable[[Any], nn.Module], config: Any) -> int:
    with torch.device("meta"), Unset():
        return count(config) if count else sum(weight.numel() for weight in build(config).parameters())


def free_memory(device: torch.device) -> tuple[int | None, int | None]:
    """Return the (free, total) bytes of a device; None if the system does not say."""
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
    """Return Linux's memory figures in bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}


def _within_the_container(free: int | None, total: int | None) -> tuple[int | None, int | None]:
    """Return free and total bytes, limited to what a container may use (cgroup v2)."""
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
