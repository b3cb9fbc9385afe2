"""What drawing a picture takes: peak memory, and energy where the hardware counts it. None: it is not told.

NVML counts the energy of a GPU, RAPL that of processors: of whole packages, whatever else runs on them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")
PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class Usage:
    """peak_bytes: of the GPU's memory, or of this process's. joules: gpu, cpu -> energy; empty if nothing counts it."""

    peak_bytes: int | None
    joules: dict[str, float]


@dataclass(frozen=True)
class Counter:
    """A counter of joules. It begins again at 0 where it wraps."""

    of: str
    read: Callable[[], float]
    wraps: float = float("inf")


class Meter:
    """Measures what this process uses on a device between `start` and `stop`.

    device: None if another machine draws, which does not tell. powercap, process: where Linux's counters are.
    """

    def __init__(self, device: str | None, powercap: Path = POWERCAP, process: Path = PROCESS):
        self.device = None if device is None else torch.device(device)
        self.process = process
        self.counters = [] if self.device is None else packages(powercap)
        if self.device is not None and self.device.type == "cuda":
            self.counters += gpus(f"GPU-{torch.cuda.get_device_properties(self.device).uuid}")
        self._begun: list[float] = []
        self._resets = False

    def start(self) -> None:
        self._resets = False
        if self.device is not None and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.device is not None:
            with suppress(OSError):
                (self.process / "clear_refs").write_text("5")  # the peak counts from now on
                self._resets = True
        self._begun = [counter.read() for counter in self.counters]

    def stop(self) -> Usage:
        joules: dict[str, float] = {}
        for counter, begun in zip(self.counters, self._begun):
            joules[counter.of] = joules.get(counter.of, 0) + (counter.read() - begun) % counter.wraps
        return Usage(self._peak(), {name: round(value, 3) for name, value in joules.items()})

    def _peak(self) -> int | None:
        if self.device is not None and self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device)
        if self._resets:
            with suppress(OSError, StopIteration, ValueError):
                lines = (self.process / "status").read_text().splitlines()
                return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
        return None


def packages(powercap: Path) -> list[Counter]:
    """The counters of the processors' packages that this process may read."""

    def microjoules(path: Path) -> float:
        return int(path.read_text()) / 1e6

    found: list[Counter] = []
    for folder in sorted(powercap.glob("intel-rapl:*")):
        with suppress(OSError, ValueError):
            if (folder / "name").read_text().startswith("package"):
                microjoules(folder / "energy_uj")
                wraps = microjoules(folder / "max_energy_range_uj")
                found.append(Counter("cpu", partial(microjoules, folder / "energy_uj"), wraps))
    return found


def gpus(uuid: str, nvml: Any | None = None) -> list[Counter]:
    """The counter of the GPU of that name; empty without NVML, or if the GPU, as those before Volta, has none."""
    with suppress(OSError, AttributeError):
        library: Any = nvml or ctypes.CDLL("libnvidia-ml.so.1")
        handle, counted = ctypes.c_void_p(), ctypes.c_ulonglong()

        def failed() -> int:
            return library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(counted))

        def joules() -> float:
            failed()
            return counted.value / 1000

        opened = library.nvmlInit_v2() == 0
        if opened and library.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)) == 0 and not failed():
            return [Counter("gpu", joules)]
    return []
