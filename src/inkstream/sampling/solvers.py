"""Solvers of the flow, as generators: a solver yields the points where it needs the velocity and is sent the velocity.

All solvers have the form `name(x, ts, generator=None)`. x: floating point, any shape. ts: strictly decreasing times,
from at most 1 down to any time >= 0. A step to 0 returns the image that the last velocity points to, so no solver needs
the velocity at 0. generator: a CPU generator for the noise of the stochastic solvers; the others ignore it.

In the formulas D is the image that the velocity points to, `flow.to_image(x, v, t)`, and l = -ln t. In l the flow is
dx/dl = D - x. For a constant D, its solution after a step of h is e^-h x + (1 - e^-h) D.
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
    """The signature of all solvers."""

    def __call__(self, x: Tensor, ts: Sequence[float], generator: torch.Generator | None = None) -> Solver: ...


def euler(x: Tensor, ts: Sequence[float], generator: torch.Generator | None = None) -> Solver:
    """First order, one model call per step. Exact for steps of any size if D is constant."""
    for t, s in pairwise(ts):
        v = yield Query(x, t, s)
        x = x + (s - t) * v
    return x


def heun(x: Tensor, ts: Sequence[float], generator: torch.Generator | None = None) -> Solver:
    """Second order, the trapezoidal rule, two model calls per step.

    The step to 0 is an Euler step. Source: Karras et al. 2022, algorithm 1.
    """
    for t, s in pairwise(ts):
        v = yield Query(x, t, s)
        if s > 0:
            v_end = yield Query(x + (s - t) * v, s, s)
            v = (v + v_end) / 2
        x = x + (s - t) * v
    return x


def ralston_2s(x: Tensor, ts: Sequence[float], generator: torch.Generator | None = None) -> Solver:
    """Second order with the smallest error bound, two model calls per step: at its start and at 2/3 of it.

    Their weights are 1/4 and 3/4. The step to 0 is an Euler step. Source: Ralston 1962.
    """
    for t, s in pairwise(ts):
        later = t + (s - t) * 2 / 3 if s > 0 else s
        v = yield Query(x, t, later)
        if s > 0:
            v_two_thirds = yield Query(x + (s - t) * 2 / 3 * v, later, s)
            v = (v + 3 * v_two_thirds) / 4
        x = x + (s - t) * v
    return x


def dpmpp_2m(x: Tensor, ts: Sequence[float], generator: torch.Generator | None = None) -> Solver:
    """Second-order multistep method with one model call per step: DPM-Solver++(2M).

    Source: Lu et al. 2022 (arXiv 2211.01095), algorithm 2. It is computed in l = -ln t, as in ComfyUI for flow models.
    The paper's half-logSNR ln((1 - t) / t) gives the two images slightly different weights. The first step and the step
    to 0 are Euler steps.
    """
    before = None  # t and D of the previous step
    for t, s in pairwise(ts):
        v = yield Query(x, t, s)
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
    """Second-order exponential multistep method with one model call per step. Exact if D is linear in l.

    The first step and the step to 0 are Euler steps. Source: Zhang et al. 2023, "Improved order analysis and design of
    exponential integrators for diffusion models sampling" (arXiv 2308.02157), the multistep form.
    """
    before = None  # t and D of the previous step
    for t, s in pairwise(ts):
        v = yield Query(x, t, s)
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
    """Second-order exponential Runge-Kutta method, c2 = 1/2, two model calls per step: the second at half of it in l.

    The step to 0 is an Euler step. Source: Zhang et al. 2023 (arXiv 2308.02157), RES single-step order 2.
    """
    for t, s in pairwise(ts):
        middle = math.sqrt(t * s)
        v = yield Query(x, t, middle)
        image = to_image(x, v, t)
        if s == 0:
            return image
        h = math.log(t / s)
        x_middle = torch.lerp(image, x, middle / t)
        v = yield Query(x_middle, middle, s)
        b2 = 2 * phi2(h)
        x = s / t * x + h * ((phi1(h) - b2) * image + b2 * to_image(x_middle, v, middle))
    return x


def euler_ancestral(x: Tensor, ts: Sequence[float], generator: torch.Generator | None = None) -> Solver:
    """Stochastic Euler method for straight paths, one model call per step.

    A step goes below its end s, down to d = s * s / t. Then it scales the image part from 1 - d to 1 - s and adds new
    noise to reach the noise level s. Source: k-diffusion's ancestral sampler with eta 1, in ComfyUI's rectified-flow
    form.
    """
    for t, s in pairwise(ts):
        down = s * s / t
        v = yield Query(x, t, down)
        x = x + (down - t) * v
        if s > 0:
            scale = (1 - s) / (1 - down)
            x = scale * x + math.sqrt(s**2 - (scale * down) ** 2) * _noise_like(x, generator)
    return x


def lcm(x: Tensor, ts: Sequence[float], generator: torch.Generator | None = None) -> Solver:
    """Stochastic sampler for consistency models, one model call per step.

    A step goes to the image, then adds new noise up to the next time. Source: Song et al. 2023 (arXiv 2303.01469),
    algorithm 1.
    """
    for t, s in pairwise(ts):
        v = yield Query(x, t, 0.0)
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
    """Run a solver with the velocity function v(x, t) and return its result."""
    try:
        query = next(solver)
        while True:
            query = solver.send(velocity(query.x, query.t))
    except StopIteration as end:
        return end.value


def times_asked(name: SolverName, ts: Sequence[float]) -> list[float]:
    """Return the times of all model evaluations that a solver makes over ts, in order."""
    asked: list[float] = []

    def velocity(x: Tensor, t: float) -> Tensor:
        asked.append(t)
        return x

    drive(SOLVERS[name](torch.zeros(()), ts, torch.Generator()), velocity)
    return asked


def phi1(h: float) -> float:
    """Return (1 - e^-h) / h for h > 0, the mean of e^-u for u from 0 to h."""
    return -math.expm1(-h) / h


def phi2(h: float) -> float:
    """Return (1 - phi1(h)) / h for h > 0. Below 1e-3 its series is used, because the difference would lose digits."""
    return (1 - phi1(h)) / h if h > 1e-3 else 1 / 2 - h / 6 + h * h / 24


def _noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw standard normal noise of x's shape on the CPU in float32, then move it to x's device and dtype.

    So the same seed gives the same noise on all devices.
    """
    noise = torch.randn(x.shape, generator=generator, pin_memory=x.is_cuda)  # pinned: the copy does not block
    return noise.to(x.device, x.dtype, non_blocking=x.is_cuda)
