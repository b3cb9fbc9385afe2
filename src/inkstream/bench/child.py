"""A contender's side: a process that reads a line of JSON for each picture it is to draw, and answers with one."""

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
    """What a contender is to open. how: as in `cases.CONTENDERS`; folder: the model's documents, and its weights if
    the case is of weights in a folder."""

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
    """Draw this. number: of the prompt, which no picture before it had; noise: of the picture's start."""

    case: Case
    number: int
    warm: bool = False  # a few steps will do
    save: str | None = None  # where to write the pixels

    @property
    def steps(self) -> int:
        return min(self.case.steps, 2) if self.warm else self.case.steps

    @property
    def prompt(self) -> str:
        """Always of the same length."""
        return f"a red fox by the river at dawn, mist over the reeds, take {self.number:05d}"

    @property
    def negative(self) -> str:
        return f"blurry, take {self.number:05d}"

    def noise(self, shape: tuple[int, ...]) -> Tensor:
        """(count, C, h, w)"""
        return torch.randn(self.case.count, *shape, generator=torch.Generator().manual_seed(0))


Draw = Callable[[Order, "Stages"], Tensor]
"""Draws an order's pictures, telling each stage that is done -> pixels (count, 3, H, W) in uint8, on the CPU."""


class Stages:
    """Seconds of the stages of one picture; the clock stands still until the device has done what it was told."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self._last = self._now()

    def done(self, name: str) -> None:
        """The stage of that name ends here."""
        now = self._now()
        self.seconds[name], self._last = now - self._last, now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def attend(open_contender: Callable[[Setup], tuple[Draw, dict[str, str]]]) -> None:
    """Open what the command line says, tell versions, and answer orders until there are no more.

    open_contender: returns what draws, and the versions of what it draws with.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand between the answers
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
    """One picture drawn and timed: seconds of each stage, and the most memory that there was."""
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
    """The most that torch reserved on a GPU; on the CPU the most that the process has held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved()
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def to_bytes(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1], of any type and device, as bytes on the CPU."""
    return pixels.float().mul(255).round_().clamp_(0, 255).to(torch.uint8).cpu()
