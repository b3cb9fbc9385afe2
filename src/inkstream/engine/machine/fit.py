"""Which model in which precision fits how much memory, and about how long it draws, from what was foreseen for all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from inkstream.engine.machine.loader import choose_device
from inkstream.engine.machine.memory import SPARE, free_memory
from inkstream.engine.machine.placement import PLACEMENTS
from inkstream.families import SPECS
from inkstream.quant.pack import pack
from inkstream.quant.packed import unpack
from inkstream.types import Spec

ORDER = {
    "cuda": ("bf16", "fp8", "q8_0", "q6_k", "q5_k", "q4_k", "nf4"),
    "cpu": ("w8a8", "q8_0", "q6_k", "q5_k", "q4_k", "nf4", "bf16"),
}
"""Precisions of files, the one to take first: on a GPU by quality, on a CPU by speed."""
BESIDES = 1.25
"""A picture takes so much more time than its products: norms, attention, activations. Measured on a CPU."""
FORMATS = {"fp8": "e4m3", "w8a8": "int8"}
"""What a precision's weights are packed as, where it is called otherwise."""


@dataclass(frozen=True)
class Fit:
    """A model in a precision under a plan: bytes at its peak, at its own size, and seconds a picture, if known."""

    precision: str
    plan: str
    peak: int
    seconds: float | None = None


@dataclass(frozen=True)
class Speed:
    """What a device does in a second, as measured by `measure_speed`."""

    products: float  # operations, in what the device computes in
    products_int8: float
    unpacked: Mapping[str, float]  # precision -> numbers that become what is computed in
    brought: float  # bytes of weights that come to the device


@cache
def foreseen() -> Mapping[str, Any]:
    """The table that scripts/foresee.py renders: model -> what it takes; see there."""
    return json.loads(Path(__file__).with_name("foreseen.json").read_text())


def fits(spec: Spec, kind: str, budget: int | None, speed: Speed | None = None) -> list[Fit]:
    """The fastest plan within so many bytes for every precision that has one, the precision to take first.

    kind: cpu, or anything else for a GPU. Precisions that need no layer streamed come before those that do.
    """
    kind = "cpu" if kind == "cpu" else "cuda"
    found = []
    for precision in ORDER[kind] if spec.folder is None else ("bf16",):  # what ships with us is there as it is
        peaks = {plan: max(foreseen()[spec.name][kind][precision][plan].values()) for plan in PLACEMENTS}
        plan = next((plan for plan, peak in peaks.items() if budget is None or peak <= budget), None)
        if plan is not None:
            seconds = None if speed is None else foretell(spec, kind, precision, plan, speed)
            found.append(Fit(precision, plan, peaks[plan], seconds))
    return sorted(found, key=lambda fit: fit.plan == "streamed")


def foretell(spec: Spec, kind: str, precision: str, plan: str, speed: Speed) -> float:
    """About how many seconds a picture takes."""
    facts = foreseen()[spec.name]
    flops, weights = facts["flops"], facts[kind][precision]["transformer"]
    products = speed.products_int8 if precision == "w8a8" else speed.products
    numbers = facts[kind]["bf16"]["transformer"] / 2
    evaluation = flops["steps"] / products * BESIDES
    if precision in speed.unpacked:
        evaluation += numbers / speed.unpacked[precision]
    if plan == "streamed":
        bringing = weights / speed.brought
        evaluation = evaluation + bringing if kind == "cpu" else max(evaluation, bringing)
    return (flops["prompt"] + flops["picture"]) / speed.products * BESIDES + spec.steps * evaluation


def here() -> tuple[str, int | None]:
    """Kind of this machine's best device, and how many bytes of it a model may take."""
    device = choose_device()
    free, _ = free_memory(device)
    return device.type, None if free is None else int(SPARE * free)


def measure_speed(device: torch.device, dtype: torch.dtype) -> Speed:
    """What the device does now, in well under a second."""
    side = 1024 if device.type == "cpu" else 8192
    a = torch.randn(side, side, device=device, dtype=dtype)
    rate = 2 * side**3 / _seconds(lambda: a @ a, device)
    rate_int8 = rate
    if device.type == "cpu":
        b = torch.ones(side, side, dtype=torch.int8)
        rate_int8 = 2 * side**3 / _seconds(lambda: torch._int_mm(b, b), device)  # pyright: ignore[reportPrivateImportUsage]
    weight = torch.randn(1024, 1024)
    unpacked = {}
    for precision in ORDER["cpu"]:
        if precision not in ("bf16", "w8a8"):
            packed = pack(FORMATS.get(precision, precision), weight).to(device)
            unpacked[precision] = weight.numel() / _seconds(lambda packed=packed: unpack(packed, dtype), device)
    home = torch.empty(1 << 25, dtype=torch.bfloat16, pin_memory=device.type == "cuda")
    there = torch.empty(1 << 25, dtype=dtype, device=device)
    return Speed(rate, rate_int8, unpacked, home.nbytes / _seconds(lambda: there.copy_(home), device))


def _seconds(compute: Callable[[], object], device: torch.device) -> float:
    """The shortest of three runs."""
    times = []
    for _ in range(3):
        began = perf_counter()
        compute()
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        times.append(perf_counter() - began)
    return min(times)


def known() -> list[Spec]:
    """The models that anyone can have."""
    return [spec for spec in SPECS.values() if spec.name in foreseen()]
