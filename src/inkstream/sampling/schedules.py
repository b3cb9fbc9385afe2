"""Noise schedules: how many times from 1 (noise) to 0 (picture) a solver visits, and where. Plain floats, no torch.

Each schedule is `(steps, shift) -> times`, strictly decreasing, ending at exactly 0.0: steps + 1 numbers, save `beta`
and `beta57`, which drop duplicates and so may take fewer steps. "Table" below means the 1000 training times
`shifted(k / 1000, shift)`, k from 1, on which ComfyUI defines most of them.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache

from inkstream.types import ScheduleName

TABLE = 1000


def shifted(t: float, shift: float) -> float:
    """The time t moved towards the noise: s t / (1 + (s - 1) t). Keeps 0 and 1; a shift of 1 changes nothing.

    Source: Esser et al. 2024 (arXiv 2403.03206), equation 23.
    """
    return shift * t / (shift * t + (1 - t))


def dynamic_shift(tokens: int, few: int = 256, many: int = 4096, few_mu: float = 0.5, many_mu: float = 1.15) -> float:
    """The shift for a picture of that many image tokens: exp(mu), mu linear through (few, few_mu) and (many, many_mu).

    Source: FLUX.1's sampling. Its e^mu / (e^mu + 1/t - 1) is `shifted(t, e^mu)`.
    """
    return math.exp(few_mu + (many_mu - few_mu) * (tokens - few) / (many - few))


def empirical_shift(tokens: int, steps: int) -> float:
    """FLUX.2's shift for a picture of that many image tokens, references not counted: exp(`empirical_mu`)."""
    return math.exp(empirical_mu(tokens, steps))


def empirical_mu(tokens: int, steps: int) -> float:
    """Linear in the tokens for 10 steps and for 200, and on the line through both for others.

    Above 4300 tokens it is that for 200 steps: there it falls by about 1, as released. Source: FLUX.2's sampling.
    """
    ten, two_hundred = 8.73809524e-05 * tokens + 1.89833333, 1.6927e-4 * tokens + 0.45666666
    if tokens > 4300:
        return two_hundred
    return two_hundred + (ten - two_hundred) * (200 - steps) / 190


def simple(steps: int, shift: float) -> list[float]:
    """Evenly spaced, then shifted: the grid of Z-Image's own code.

    ComfyUI reads it off the table: the same where steps divides 1000 (such as 8), else up to 1/1000 later, unshifted.
    """
    return [shifted(1 - i / steps, shift) for i in range(steps)] + [0.0]


def sgm_uniform(steps: int, shift: float) -> list[float]:
    """Evenly spaced from 1 towards the table's last time, that end left out, then shifted.

    The end is itself a shifted time (ComfyUI applies the shift twice there); kept, so that numbers agree.
    """
    end = shifted(1 / TABLE, shift)
    return [shifted(1 + (end - 1) * i / steps, shift) for i in range(steps)] + [0.0]


def normal(steps: int, shift: float) -> list[float]:
    """As `sgm_uniform`, but the end is visited: the last step starts there."""
    end = shifted(1 / TABLE, shift)
    return [shifted(1 + (end - 1) * i / max(steps - 1, 1), shift) for i in range(steps)] + [0.0]


def beta(steps: int, shift: float) -> list[float]:
    """Table times at quantiles of Beta(0.6, 0.6): dense at both ends. Duplicates are dropped: then fewer steps.

    Source: Lee et al. 2024 (arXiv 2407.12173).
    """
    return _beta_quantiles(steps, shift, 0.6, 0.6)


def beta57(steps: int, shift: float) -> list[float]:
    """As `beta`, with Beta(0.5, 0.7): denser near the picture. Source: RES4LYF."""
    return _beta_quantiles(steps, shift, 0.5, 0.7)


def linear_quadratic(steps: int, shift: float) -> list[float]:
    """Half of the steps go linearly over the first 1/40 of the way, the rest quadratically. `shift` is not used.

    Source: Mochi 1 (Genmo), threshold 0.025.
    """
    if steps == 1:
        return [1.0, 0.0]
    half = steps // 2
    slope = 0.025 / half
    curve = (1 - slope * steps) / (steps - half) ** 2
    return [1 - slope * i - curve * max(i - half, 0) ** 2 for i in range(steps)] + [0.0]


def bong_tangent(steps: int, shift: float) -> list[float]:
    """Two arcs of an arctangent, 1 to 1/2 and 1/2 to 0, joined at 0.6 of the way. `shift` is not used.

    Source: RES4LYF, slopes 0.2 and pivots 0.6. One step, which it does not define, is [1, 0].
    """
    if steps == 1:
        return [1.0, 0.0]
    points = steps + 2  # the joint is counted twice
    joint = int(points * 0.6)
    slope = 0.2 * 40 / points
    falling = [math.atan(slope * (joint - i)) for i in range(joint)]
    ending = [math.atan(slope * -i) for i in range(points - joint)]
    first = [0.5 + 0.5 * (y - falling[-1]) / (falling[0] - falling[-1]) for y in falling[:-1]]
    second = [0.5 * (y - ending[-1]) / (ending[0] - ending[-1]) for y in ending]
    return first + second


SCHEDULES: dict[ScheduleName, Callable[[int, float], list[float]]] = {
    "simple": simple,
    "sgm_uniform": sgm_uniform,
    "normal": normal,
    "beta": beta,
    "beta57": beta57,
    "linear_quadratic": linear_quadratic,
    "bong_tangent": bong_tangent,
}


def _beta_quantiles(steps: int, shift: float, a: float, b: float) -> list[float]:
    """The table entries nearest to the quantiles 1, 1 - 1/n, ... 1/n of Beta(a, b), each once, then 0.

    The nearest entry is the number of half-way marks between entries whose probability is at most the quantile's: the
    distribution is evaluated, never inverted. The 1e-12 rounds an exact half up, as rounding to even does at 499.5.
    """
    marks = _marks(a, b)
    picks = dict.fromkeys(bisect_right(marks, 1 - i / steps + 1e-12) for i in range(steps))  # in order, each once
    return [shifted((k + 1) / TABLE, shift) for k in picks] + [0.0]


@lru_cache
def _marks(a: float, b: float) -> list[float]:
    return [beta_cdf((k + 0.5) / (TABLE - 1), a, b) for k in range(TABLE - 1)]


def beta_cdf(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), to about 1e-14, for x in [0, 1].

    Source: the integrand's binomial series, integrated term by term; by symmetry x is at most 1/2, so each term is
    less than half the one before.
    """
    if x > 0.5:
        return 1 - beta_cdf(1 - x, b, a)
    term, total = 1.0, 1 / a
    for k in range(1, 56):
        term *= x * (k - b) / k
        total += term / (a + k)
    return total * x**a * math.gamma(a + b) / (math.gamma(a) * math.gamma(b))
