"""The contender's process. It reads one line of JSON for each order to draw and answers with one line of JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inkstream.bench.cases import CASES, Case, rehearsed
from inkstream.weights.files import write_state


@dataclass(frozen=True)
class Setup:
    """The model that a contender must open.

    how: an entry of `cases.CONTENDERS`. folder: the model's JSON files, and its weights if the case has them in a
    folder.
    """

    case: Case
    how: dict[str, str]
    folder: Path

    @property
    def device(self) -> torch.device:
        return torch.device(self.case.device)

    @property
    def dtype(self) -> torch.dtype:
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.case.dtype]


@dataclass(frozen=True)
class Order:
    """An order to draw the pictures of a case once.

    number: makes the prompt different from all earlier ones. `noise` gives the noise to start from.
    """

    case: Case
    number: int
    warm: bool = False  # a warm-up run: at most 2 steps
    save: str | None = None  # path of the file for the pixels

    @property
    def steps(self) -> int:
        return min(self.case.steps, 2) if self.warm else self.case.steps

    @property
    def prompt(self) -> str:
        """The prompt. It has the same length for all numbers up to 99999."""
        return f"a red fox by the river at dawn, mist over the reeds, take {self.number:05d}"

    @property
    def negative(self) -> str:
        return f"blurry, take {self.number:05d}"

    def noise(self, shape: tuple[int, ...]) -> Tensor:
        """Return the start noise, (count, C, h, w), with seed 0. shape: (C, h, w)."""
        return torch.randn(self.case.count, *shape, generator=torch.Generator().manual_seed(0))


Draw = Callable[[Order, "Stages"], Tensor]
"""Draws an order's pictures and calls `Stages.done` after each stage -> pixels (count, 3, H, W) uint8, on the CPU."""


class Stages:
    """Measures the seconds of each stage of an order. The device is synchronised before each reading of the clock."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self._last = self._now()

    def done(self, name: str) -> None:
        """Store the time of the stage that ends now under this name."""
        now = self._now()
        self.seconds[name], self._last = now - self._last, now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def attend(open_contender: Callable[[Setup], tuple[Draw, dict[str, str]]]) -> None:
    """Open the model that the command line names, print the versions, then answer orders until stdin ends.

    open_contender: returns the function that draws, and the versions of its packages.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # prints of libraries go to stderr, so that stdout has only answers
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    setup = Setup(case_of(given), given["how"], Path(given["folder"]))
    draw, versions = open_contender(setup)
    print(json.dumps({"versions": versions}), file=out, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        order = Order(case_of(asked), asked["number"], asked["warm"], asked["save"])
        print(json.dumps(answer(order, draw, setup.device)), file=out, flush=True)


def answer(order: Order, draw: Draw, device: torch.device) -> dict[str, Any]:
    """Draw and time one order. Returns the seconds of each stage and the peak memory in bytes."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        stages = Stages(device)
        pixels = draw(order, stages)
    if order.save:
        write_state(Path(order.save), {"pixels": pixels})
    return {"seconds": stages.seconds, "peak_bytes": peak_bytes(device)}


def case_of(given: dict[str, Any]) -> Case:
    case = CASES[given["case"]]
    return rehearsed(case) if given["rehearse"] else case


def peak_bytes(device: torch.device) -> int | None:
    """Return the peak memory in bytes: torch's reserved memory on a GPU, on the CPU the process's resident memory.

    Returns None on Windows without a GPU.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved()
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def to_bytes(pixels: Tensor) -> Tensor:
    """Convert pixels in [0, 1], of any dtype and device, to uint8 on the CPU."""
    return pixels.float().mul(255).round_().clamp_(0, 255).to(torch.uint8).cpu()
