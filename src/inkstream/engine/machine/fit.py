"""Which models fit a machine, in which precision and placement, and about how long a picture takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from inkstream.engine.drawing.complete import Complete, complete
from inkstream.engine.drawing.controls import control_work
from inkstream.engine.drawing.larger import second_pass, times_of
from inkstream.engine.drawing.model import Model
from inkstream.engine.drawing.options import guided
from inkstream.engine.machine.loader import choose_device
from inkstream.engine.machine.memory import SPARE, free_memory, typical
from inkstream.engine.machine.placement import PLACEMENTS
from inkstream.families import SPECS
from inkstream.nn.quant import has_fp8, has_int8, multiply_fp8, multiply_int8
from inkstream.quant.pack import pack
from inkstream.quant.packed import Packed, Weight, unpack
from inkstream.sampling.solvers import times_asked
from inkstream.sampling.windows import Windows
from inkstream.types import Spec

ORDER = {
    "cuda": ("bf16", "fp8", "q8_0", "q6_k", "q5_k", "q4_k", "nf4"),
    "cpu": ("bf16", "q8_0", "w8a8", "q6_k", "q5_k", "q4_k", "nf4"),
}
"""Device -> precisions of files, the best pictures first."""
NEAR = 1.1
"""The times of two fits are near each other up to this factor. Estimates are not closer to the truth."""
LITTLE = 2e12
"""Operations that every machine does within a minute: these are not worth a measurement."""
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
    """A device's speed per second, as `measure_speed` measures it or as `cards` lists it."""

    products: float  # operations of a matrix product in the compute dtype
    packed: Mapping[str, float]  # precision -> operations of a product with packed weights, if the device has such
    unpacked: Mapping[str, float]  # precision -> weights unpacked to the compute dtype
    brought: float  # bytes of weights copied to the device


@cache
def foreseen() -> Mapping[str, Any]:
    """The table that scripts/foresee.py writes: model -> its memory and operations. Keys: see the script."""
    return json.loads(Path(__file__).with_name("foreseen.json").read_text())


def fits(spec: Spec, kind: str, budget: int | None, speed: Speed | None = None) -> list[Fit]:
    """For each precision the fastest placement within `budget` bytes, if there is one. The best choice comes first.

    kind: "cpu"; any other value means a GPU. budget: None is unlimited. With a speed, the fits are in order of time.
    The best choice is then among those that take at most `NEAR` times the shortest: the one with the best quality, and
    one with streamed layers only if there is no other. Without a speed, streamed layers come last.
    """
    kind = "cpu" if kind == "cpu" else "cuda"
    found: list[Fit] = []
    for precision in ORDER[kind] if spec.folder is None else ("bf16",):  # the shipped model has one precision
        if kind == "cpu" and precision == "w8a8" and "w8a8" not in multiplied(torch.device("cpu")):
            continue
        peaks = {placement: max(foreseen()[spec.name][kind][precision][placement].values()) for placement in PLACEMENTS}
        placement = next((placement for placement, peak in peaks.items() if budget is None or peak <= budget), None)
        if placement is not None:
            seconds = None if speed is None else foretell(spec, kind, precision, placement, speed)
            found.append(Fit(precision, placement, peaks[placement], seconds))
    if speed is None or not found:
        return sorted(found, key=lambda fit: fit.placement == "streamed")
    shortest = min(_time(fit) for fit in found)
    near = [fit for fit in found if _time(fit) <= NEAR * shortest]  # in the order of `ORDER`
    best = min(near, key=lambda fit: fit.placement == "streamed")  # which needs memory beside the device
    return [best, *sorted((fit for fit in found if fit is not best), key=_time)]


def _time(fit: Fit) -> float:
    return fit.seconds or 0.0


def foretell(spec: Spec, kind: str, precision: str, placement: str, speed: Speed) -> float:
    """An estimate of the seconds for one picture of the model's own size."""
    facts = foreseen()[spec.name]
    flops, weights = operations(spec, *spec.size), facts[kind][precision]["transformer"]
    evaluation = flops["steps"] / speed.packed.get(precision, speed.products) * BESIDES
    if precision in speed.unpacked and precision not in speed.packed:
        evaluation += facts[kind]["bf16"]["transformer"] / 2 / speed.unpacked[precision]
    if placement == "streamed":
        bringing = weights / speed.brought
        evaluation = evaluation + bringing if kind == "cpu" else max(evaluation, bringing)
    return (flops["prompt"] + flops["picture"]) / speed.products * BESIDES + spec.steps * evaluation


def operations(spec: Spec, width: int, height: int) -> Mapping[str, float]:
    """Phase -> the floating-point operations for a picture of this size: one evaluation of `steps`.

    The table has them for the model's own size and for half of its sides. Products with weights are linear in the
    tokens of picture and text, attention is quadratic: two sizes give the share of each.
    """
    facts, (own_width, own_height) = foreseen()[spec.name], spec.size
    pixels = width * height / (own_width * own_height)
    text = facts["text_tokens"] * spec.multiple**2 / (own_width * own_height)

    def scale(phase: str, text: float) -> float:
        own, half = facts["flops"][phase] / (1 + text), facts["flops_half"][phase] / (0.25 + text)
        quadratic = max(0.0, (own - half) / 0.75)
        return (pixels + text) * (own + quadratic * (pixels - 1))

    return {"prompt": facts["flops"]["prompt"], "steps": scale("steps", text), "picture": scale("picture", 0.0)}


def seconds_of(request: Complete, model: Model, weights: Collection[Weight]) -> float | None:
    """An estimate of the seconds for one picture of a request with a loaded model.

    None: its architecture is not known, or the picture is small work for any machine. weights: the transformer's. Only
    the products of the model and of control nets are counted, in all windows and in the second pass of an enlarged
    picture. References, step caches, unpacking, streaming and upscalers are left out.
    """
    spec = model.spec
    like = next((one for one in known() if one.transformer == spec.transformer), None)
    if like is None:
        return None
    second = second_pass(request, spec)
    passes = [_work(one, spec, like) for one in (request, second) if one is not None]
    evaluating = sum(steps for steps, _ in passes)
    if request.control_nets and model.controls is not None:
        evaluating *= 1 + control_work(request, model.controls.folder, weights)
    once = operations(like, *spec.size)["prompt"] + sum(picture for _, picture in passes)
    if evaluating + once < LITTLE:
        return None
    packed = {weight.format for weight in weights if isinstance(weight, Packed) and weight.dynamic}
    precision = next((name for name in multiplied(model.device) if FORMATS[name] in packed), None)
    products = measure_products(model.device, model.dtype)
    fast = products if precision is None else measure_products(model.device, model.dtype, precision)
    return (evaluating / fast + once / products) * BESIDES


def _work(request: Complete, spec: Spec, like: Spec) -> tuple[float, float]:
    """The operations of a pass: of all evaluations of the model, and of decoding the picture. like: a known model."""
    prompts = (1 + guided(request, spec)) / (1 + guided(complete(typical(like), like), like))
    steps = len(times_asked(request.solver, times_of(request, spec, from_picture=False)[0]))
    windows = None if request.tile is None else Windows.over(request.height, request.width, request.tile)
    count, (height, width) = (1, (request.height, request.width)) if windows is None else (len(windows), windows.side)
    evaluation = count * operations(like, width, height)["steps"] * prompts
    return evaluation * max(1.0, steps * request.strength), operations(like, request.width, request.height)["picture"]


def here() -> tuple[str, int | None]:
    """The type of this machine's best device, and the bytes that a model may take there; None if unknown."""
    device = choose_device()
    free, _ = free_memory(device)
    return device.type, None if free is None else int(SPARE * free)


def measure_speed(device: torch.device, dtype: torch.dtype) -> Speed:
    """Measures a device's speed. Takes well under a second."""
    packed = {precision: measure_products(device, dtype, precision) for precision in multiplied(device)}
    numbers = torch.randn(1024, 1024)
    unpacked: dict[str, float] = {}
    for precision in {*ORDER["cpu"], *ORDER["cuda"]} - {"bf16"}:
        weight = pack(FORMATS.get(precision, precision), numbers).to(device)
        unpacked[precision] = numbers.numel() / _seconds(partial(unpack, weight, dtype), device)
    home = torch.empty(1 << 25, dtype=torch.bfloat16, pin_memory=device.type == "cuda")
    there = torch.empty(1 << 25, dtype=dtype, device=device)
    brought = home.nbytes / _seconds(lambda: there.copy_(home), device)
    return Speed(measure_products(device, dtype), packed, unpacked, brought)


def multiplied(device: torch.device) -> list[str]:
    """The precisions whose weights a device multiplies in 8 bits, faster than in its compute dtype."""
    able = {"w8a8": device.type == "cpu" and has_int8(device), "fp8": has_fp8(device)}
    return [precision for precision, is_able in able.items() if is_able]


@cache
def measure_products(device: torch.device, dtype: torch.dtype, precision: str | None = None) -> float:
    """Measures the operations per second of products. Takes a tenth of a second.

    precision: one of `multiplied`, of the weights; None: they have the compute dtype.
    """
    side = _side(device)
    a = torch.randn(side, side, device=device, dtype=dtype)
    work: Callable[[], object] = partial(torch.matmul, a, a)
    if precision is not None:
        weight = pack(FORMATS[precision], torch.ones(side, side)).to(device)
        work = partial(multiply_int8 if precision == "w8a8" else multiply_fp8, a, weight, None)
    return 2 * side**3 / _seconds(work, device)


def _side(device: torch.device) -> int:
    """The side of the matrices to measure with."""
    return 1024 if device.type == "cpu" else 8192


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
