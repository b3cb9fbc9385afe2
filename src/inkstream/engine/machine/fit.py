"""Which models fit a machine, in which precision and placement, and about how long a picture takes."""

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
"""Device -> precisions of files in order of preference: by quality on a GPU, by speed on a CPU."""
BESIDES = 1.25
"""The time of a picture over that of its matrix products alone: norms, attention, activations. Measured on a CPU."""
FORMATS = {"fp8": "e4m3", "w8a8": "int8"}
"""Precision -> the format of its packed weights, if the names differ."""


@dataclass(frozen=True)
class Fit:
    """A precision and placement for a model: the peak in bytes, and the seconds for a picture of the model's size."""

    precision: str
    placement: str
    peak: int
    seconds: float | None = None


@dataclass(frozen=True)
class Speed:
    """A device's speed per second, as `measure_speed` measures it."""

    products: float  # operations of a matrix product in the compute dtype
    products_int8: float  # operations of an int8 matrix product
    unpacked: Mapping[str, float]  # precision -> weights unpacked to the compute dtype
    brought: float  # bytes of weights copied to the device


@cache
def foreseen() -> Mapping[str, Any]:
    """The table that scripts/foresee.py writes: model -> its memory and operations. Keys: see the script."""
    return json.loads(Path(__file__).with_name("foreseen.json").read_text())


def fits(spec: Spec, kind: str, budget: int | None, speed: Speed | None = None) -> list[Fit]:
    """For each precision the fastest placement within `budget` bytes, if there is one. The best choice comes first.

    kind: "cpu"; any other value means a GPU. budget: None is unlimited. Fits with streamed layers come last.
    """
    kind = "cpu" if kind == "cpu" else "cuda"
    found: list[Fit] = []
    for precision in ORDER[kind] if spec.folder is None else ("bf16",):  # the shipped model has one precision
        peaks = {placement: max(foreseen()[spec.name][kind][precision][placement].values()) for placement in PLACEMENTS}
        placement = next((placement for placement, peak in peaks.items() if budget is None or peak <= budget), None)
        if placement is not None:
            seconds = None if speed is None else foretell(spec, kind, precision, placement, speed)
            found.append(Fit(precision, placement, peaks[placement], seconds))
    return sorted(found, key=lambda fit: fit.placement == "streamed")


def foretell(spec: Spec, kind: str, precision: str, placement: str, speed: Speed) -> float:
    """An estimate of the seconds for one picture."""
    facts = foreseen()[spec.name]
    flops, weights = facts["flops"], facts[kind][precision]["transformer"]
    products = speed.products_int8 if precision == "w8a8" else speed.products
    numbers = facts[kind]["bf16"]["transformer"] / 2
    evaluation = flops["steps"] / products * BESIDES
    if precision in speed.unpacked:
        evaluation += numbers / speed.unpacked[precision]
    if placement == "streamed":
        bringing = weights / speed.brought
        evaluation = evaluation + bringing if kind == "cpu" else max(evaluation, bringing)
    return (flops["prompt"] + flops["picture"]) / speed.products * BESIDES + spec.steps * evaluation


def here() -> tuple[str, int | None]:
    """The type of this machine's best device, and the bytes that a model may take there; None if unknown."""
    device = choose_device()
    free, _ = free_memory(device)
    return device.type, None if free is None else int(SPARE * free)


def measure_speed(device: torch.device, dtype: torch.dtype) -> Speed:
    """Measures a device's speed. Takes well under a second."""
    side = 1024 if device.type == "cpu" else 8192
    a = torch.randn(side, side, device=device, dtype=dtype)
    rate = 2 * side**3 / _seconds(lambda: a @ a, device)
    rate_int8 = rate
    if device.type == "cpu":
        b = torch.ones(side, side, dtype=torch.int8)
        rate_int8 = 2 * side**3 / _seconds(lambda: torch._int_mm(b, b), device)  # pyright: ignore
    weight = torch.randn(1024, 1024)
    unpacked: dict[str, float] = {}
    for precision in ORDER["cpu"]:
        if precision not in ("bf16", "w8a8"):
            packed = pack(FORMATS.get(precision, precision), weight).to(device)
            unpacked[precision] = weight.numel() / _seconds(lambda packed=packed: unpack(packed, dtype), device)
    home = torch.empty(1 << 25, dtype=torch.bfloat16, pin_memory=device.type == "cuda")
    there = torch.empty(1 << 25, dtype=dtype, device=device)
    return Speed(rate, rate_int8, unpacked, home.nbytes / _seconds(lambda: there.copy_(home), device))


def _seconds(compute: Callable[[], object], device: torch.device) -> float:
    """The seconds of the fastest of three runs."""
    times: list[float] = []
    for _ in range(3):
        began = perf_counter()
        compute()
        if device.type != "cpu":
            getattr(torch, device.type).synchronize()
        times.append(perf_counter() - began)
    return min(times)


def known() -> list[Spec]:
    """The known models that `foreseen` lists: those whose weights are published."""
    return [spec for spec in SPECS.values() if spec.name in foreseen()]
