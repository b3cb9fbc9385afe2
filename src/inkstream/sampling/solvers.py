"""Solvers of the flow, as generators: each yields the points where it needs the velocity and is sent the answer.

All have the form `name(x, ts, generator=None)`. x: any shape, floating; ts: times from at most 1, strictly decreasing,
down to any time >= 0; a step down to 0 lands on the image that the last velocity points at, so the velocity is never
asked for at 0. `generator`, on the CPU, gives the stochastic ones their noise; the others ignore it.

In the formulas D is the image the velocity points at, `flow.to_image(x, v, t)`, and l = -ln t: there the flow is
dx/dl = D - x, whose solution over a step of h, while D stays the same, is e^-h x + (1 - e^-h) D.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from inkstream.flow import add_noise, to_image
from inkstream.types import Query, Solver, SolverName


class MakeSolver(Protocol):
    """What every solver is called like."""

    def __call__(self, x: Tensor, ts: Sequence[float], generator: torch.Generator | None = None) -> Solver: ...


def euler(x: Tensor, ts: Sequence[float], generator: torch.Generator | None = None) -> Solver:
    """First order: one model call a step. Exact wherever D is constant, whatever the step."""
    for t, s in pairwise(ts):
        v = yield Query(x, t)
        x = x + (s - t) * v
    return x


def heun(x: Tensor, ts: Sequence[float], generator: torch.Generator | None = None) -> Solver:
    """Second order, the trapezoidal rule: two model calls a step, the last one Euler's. Karras et al. 2022, alg. 1."""
    for t, s in pairwise(ts):
        v = yield Query(x, t)
        if s > 0:
            v_end = yield Query(x + (s - t) * v, s)
            v = (v + v_end) / 2
        x = x + (s - t) * v
    return x


def ralston_2s(x: Tensor, ts: Sequence[float], generator: torch.Generator | None = None) -> Solver:
    """Second order with the least error bound: two calls a step, the second at 2/3 of it, weights 1/4 and 3/4.

    The last step, to 0, is Euler's. Source: Ralston 1962.
    """
    for t, s in pairwise(ts):
        v = yield Query(x, t)
        if s > 0:
            v_two_thirds = yield Query(x + (s - t) * 2 / 3 * v, t + (s - t) * 2 / 3)
            v = (v + 3 * v_two_thirds) / 4
        x = x + (s - t) * v
    return x


def dpmpp_2m(x: Tensor, ts: Sequence[float], generator: torch.Generator | None = None) -> Solver:
    """Second order from the step before: one call a step. DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095), alg. 2.

    Written in l = -ln t, as ComfyUI does for flow models; the half-logSNR ln((1 - t) / t) of the paper weighs the two
    images a little differently. The first step and the one to 0 are Euler's.
    """
    before = None  # t and D of the step before
    for t, s in pairwise(ts):
        v = yield Query(x, t)
        image = to_image(x, v, t)
        target = image
        if before is not None and s > 0:
            t_before, image_before = before
            r = math.log(t_before / t) / math.log(t / s)
            target = image + (image - image_before) / (2 * r)
        x = torch.lerp(target, x, s / t)
        before = t, image
    return x


def res_multistep(x: Tensor, ts: Sequence[float], generator: torch.Generator | None = None) -> Solver:
    """Second order from the step before: one call a step. Exponential multistep, exact where D is linear in l.

    The first step and the one to 0 are Euler's. Source: Zhang et al. 2023, "Improved order analysis and design of
    exponential integrators for diffusion models sampling" (arXiv 2308.02157), the multistep form.
    """
    before = None  # t and D of the step before
    for t, s in pairwise(ts):
        v = yield Query(x, t)
        image = to_image(x, v, t)
        if before is None or s == 0:
            x = torch.lerp(image, x, s / t)
        else:
            t_before, image_before = before
            h = math.log(t / s)
            b2 = phi2(h) * h / math.log(t / t_before)
            x = s / t * x + h * ((phi1(h) - b2) * image + b2 * image_before)
        before = t, image
    return x


def res_2s(x: Tensor, ts: Sequence[float], generator: torch.Generator | None = None) -> Solver:
    """Second order: two calls a step, the second half-way in l. Exponential Runge-Kutta with c2 = 1/2.

    The step to 0 is Euler's. Source: Zhang et al. 2023 (arXiv 2308.02157), RES single-step order 2.
    """
    for t, s in pairwise(ts):
        v = yield Query(x, t)
        image = to_image(x, v, t)
        if s == 0:
            return image
        h = math.log(t / s)
        middle = math.sqrt(t * s)
        x_middle = torch.lerp(image, x, middle / t)
        v = yield Query(x_middle, middle)
        b2 = 2 * phi2(h)
        x = s / t * x + h * ((phi1(h) - b2) * image + b2 * to_image(x_middle, v, middle))
    return x


def euler_ancestral(x: Tensor, ts: Sequence[float], generator: torch.Generator | None = None) -> Solver:
    """Euler to below the step's end, then fresh noise up to it: one call a step, stochastic, for straight paths.

    It goes down to d = s * s / t, then scales the image part from 1 - d to 1 - s and adds the noise that is missing.
    Source: k-diffusion's ancestral sampler with eta 1, in ComfyUI's rectified-flow form.
    """
    for t, s in pairwise(ts):
        v = yield Query(x, t)
        down = s * s / t
        x = x + (down - t) * v
        if s > 0:
            scale = (1 - s) / (1 - down)
            x = scale * x + math.sqrt(s**2 - (scale * down) ** 2) * _noise_like(x, generator)
    return x


def lcm(x: Tensor, ts: Sequence[float], generator: torch.Generator | None = None) -> Solver:
    """To the image and back to the next time with fresh noise: one call a step, stochastic; for consistency models.

    Source: Song et al. 2023 (arXiv 2303.01469), algorithm 1.
    """
    for t, s in pairwise(ts):
        v = yield Query(x, t)
        x = to_image(x, v, t)
        if s > 0:
            x = add_noise(x, _noise_like(x, generator), s)
    return x


SOLVERS: dict[SolverName, MakeSolver] = {
    "euler": euler,
    "heun": heun,
    "dpmpp_2m": dpmpp_2m,
    "res_multistep": res_multistep,
    "res_2s": res_2s,
    "ralston_2s": ralston_2s,
    "euler_ancestral": euler_ancestral,
    "lcm": lcm,
}


def drive(solver: Solver, velocity: Callable[[Tensor, float], Tensor]) -> Tensor:
    """Run one solver against a velocity v(x, t) and return its result."""
    try:
        query = next(solver)
        while True:
            query = solver.send(velocity(query.x, query.t))
    except StopIteration as end:
        return end.value


def times_asked(name: SolverName, ts: Sequence[float]) -> list[float]:
    """The time of each model evaluation that the solver makes over ts, in order. Its length is their number."""
    asked: list[float] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        return x

    drive(SOLVERS[name](torch.zeros(()), ts, torch.Generator()), velocity)
    return asked


def phi1(h: float) -> float:
    """(1 - e^-h) / h: the mean of e^-u over u from 0 to h. h > 0."""
    return -math.expm1(-h) / h


def phi2(h: float) -> float:
    """(1 - phi1(h)) / h; below 1e-3 by its series, where the difference would lose digits. h > 0."""
    return (1 - phi1(h)) / h if h > 1e-3 else 1 / 2 - h / 6 + h * h / 24


def _noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard noise drawn on the CPU in float32, so that a seed means the same on every device, then moved to x's."""
    noise = torch.randn(x.shape, generator=generator, pin_memory=x.is_cuda)  # so that nobody waits for the copy
    return noise.to(x.device, x.dtype, non_blocking=x.is_cuda)
