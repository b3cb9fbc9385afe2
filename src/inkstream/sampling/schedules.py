"""Noise schedules: the times from 1 (noise) to 0 (picture) at which a solver steps. Plain floats, without torch.

Each schedule is `(steps, shift, table) -> times`. The times decrease strictly and end at exactly 0.0. There are steps +
1 times, but `beta` and `beta57` drop duplicates and so may have fewer. ComfyUI defines most schedules on a table of
times `shifted(k / table, shift)`, k = 1 ... table. It has 1000 entries for Z-Image and FLUX.1 schnell
(ModelSamplingDiscreteFlow), and 10,000 for the other FLUX models (ModelSamplingFlux): see `Spec.table`.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from functools import lru_cache

from inkstream.types import ScheduleName

TABLE = 1000
"""Entries of the table, unless a model says otherwise."""
NEAR_ZERO = 1e-5


def shifted(t: float, shift: float) -> float:
    """Shift the time t towards the noise: s t / (1 + (s - 1) t), with s the shift.

    The times 0 and 1 do not change, and a shift of 1 changes nothing. Source: Esser et al. 2024 (arXiv 2403.03206),
    equation 23.
    """
    return shift * t / (shift * t + (1 - t))


def dynamic_shift(
    tokens: int, few: float = 256, many: float = 4096, few_mu: float = 0.5, many_mu: float = 1.15
) -> float:
    """Return FLUX.1's shift exp(mu) for a number of image tokens.

    mu is the line through (few, few_mu) and (many, many_mu). Source: FLUX.1's sampling, whose e^mu / (e^mu + 1/t - 1)
    equals `shifted(t, e^mu)`.
    """
    return math.exp(few_mu + (many_mu - few_mu) * (tokens - few) / (many - few))


def empirical_shift(tokens: int, steps: int) -> float:
    """Return FLUX.2's shift exp(`empirical_mu`). tokens: image tokens of the picture, without reference pictures."""
    return math.exp(empirical_mu(tokens, steps))


def empirical_mu(tokens: int, steps: int) -> float:
    """Return FLUX.2's mu. It is linear in the tokens for 10 and for 200 steps, and linear in the steps between them.

    Above 4300 tokens the value for 200 steps is used. So mu drops by about 1 there, as in the released code. Source:
    FLUX.2's sampling.
    """
    ten, two_hundred = 8.73809524e-05 * tokens + 1.89833333, 1.6927e-4 * tokens + 0.45666666
    if tokens > 4300:
        return two_hundred
    return two_hundred + (ten - two_hundred) * (200 - steps) / 190


def simple(steps: int, shift: float, table: int = TABLE) -> list[float]:
    """Space the times evenly, then shift them, as Z-Image's own code does.

    BFL's and diffusers' code do the same. ComfyUI takes the times from the table. They are the same if steps divides
    the table (such as 8). Otherwise ComfyUI's are later by up to 1/table before the shift.
    """
    return [shifted(1 - i / steps, shift) for i in range(steps)] + [0.0]


def sgm_uniform(steps: int, shift: float, table: int = TABLE) -> list[float]:
    """Space the times evenly from 1 to the table's last time, without that end, then shift them.

    The end is already a shifted time, so the shift is applied twice there. ComfyUI does the same, and the numbers
    agree with it.
    """
    end = shifted(1 / table, shift)
    return [shifted(1 + (end - 1) * i / steps, shift) for i in range(steps)] + [0.0]


def normal(steps: int, shift: float, table: int = TABLE) -> list[float]:
    """Like `sgm_uniform`, but with the end: the last step starts there.

    An end that the second shift brings within 1e-5 of 0, at a shift far below 1, counts as the final 0. ComfyUI does
    the same.
    """
    end = shifted(1 / table, shift)
    if shifted(end, shift) <= NEAR_ZERO:
        return sgm_uniform(steps, shift, table)
    return [shifted(1 + (end - 1) * i / max(steps - 1, 1), shift) for i in range(steps)] + [0.0]


def beta(steps: int, shift: float, table: int = TABLE) -> list[float]:
    """Take the table's times at quantiles of Beta(0.6, 0.6), which are dense at both ends.

    Duplicates are dropped, so there may be fewer steps. Source: Lee et al. 2024 (arXiv 2407.12173).
    """
    return _beta_quantiles(steps, shift, table, 0.6, 0.6)


def beta57(steps: int, shift: float, table: int = TABLE) -> list[float]:
    """Like `beta`, with Beta(0.5, 0.7), which is denser near the picture. Source: RES4LYF."""
    return _beta_quantiles(steps, shift, table, 0.5, 0.7)


def linear_quadratic(steps: int, shift: float, table: int = TABLE) -> list[float]:
    """Cover the first 1/40 of the way linearly with half of the steps, then the rest quadratically.

    `shift` and `table` are not used. Source: Mochi 1 (Genmo), threshold 0.025.
    """
    if steps == 1:
        return [1.0, 0.0]
    half = steps // 2
    slope = 0.025 / half
    curve = (1 - slope * steps) / (steps - half) ** 2
    return [1 - slope * i - curve * max(i - half, 0) ** 2 for i in range(steps)] + [0.0]


def bong_tangent(steps: int, shift: float, table: int = TABLE) -> list[float]:
    """Join two arctangent curves, from 1 to 1/2 and from 1/2 to 0, at 0.6 of the steps.

    `shift` and `table` are not used. Source: RES4LYF, slopes 0.2 and pivots 0.6. RES4LYF does not define one step;
    here it is [1, 0].
    """
    if steps == 1:
        return [1.0, 0.0]
    points = steps + 2  # both curves contain the joint
    joint = int(points * 0.6)
    slope = 0.2 * 40 / points
    falling = [math.atan(slope * (joint - i)) for i in range(joint)]
    ending = [math.atan(slope * -i) for i in range(points - joint)]
    first = [0.5 + 0.5 * (y - falling[-1]) / (falling[0] - falling[-1]) for y in falling[:-1]]
    second = [0.5 * (y - ending[-1]) / (ending[0] - ending[-1]) for y in ending]
    return first + second


SCHEDULES: dict[ScheduleName, Callable[[int, float, int], list[float]]] = {
    "simple": simple,
    "sgm_uniform": sgm_uniform,
    "normal": normal,
    "beta": beta,
    "beta57": beta57,
    "linear_quadratic": linear_quadratic,
    "bong_tangent": bong_tangent,
}


def _beta_quantiles(steps: int, shift: float, table: int, a: float, b: float) -> list[float]:
    """Return the table's times nearest to the quantiles 1, 1 - 1/n, ... 1/n of Beta(a, b), without duplicates, then 0.

    The index of the entry nearest to a quantile is the number of midpoints between neighbouring entries whose
    probability is at most the quantile's. Bisection finds it, so no inverse of the distribution is needed. Adding 1e-12
    rounds an exact half up, as rounding to even does in the middle of both tables, at 499.5 and 4999.5.
    """

    quantiles = (1 - i / steps + 1e-12 for i in range(steps))
    picks = dict.fromkeys(bisect_right(range(table - 1), q, key=lambda k: _midpoint(k, table, a, b)) for q in quantiles)
    return [shifted((k + 1) / table, shift) for k in picks] + [0.0]  # dict.fromkeys drops duplicates


@lru_cache(1 << 15)
def _midpoint(k: int, table: int, a: float, b: float) -> float:
    """Return the probability half-way between the table's entries k and k + 1."""
    return beta_cdf((k + 0.5) / (table - 1), a, b)


def beta_cdf(x: float, a: float, b: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b) for x in [0, 1], accurate to about 1e-14.

    The method is the binomial series of the integrand, integrated term by term. Symmetry reduces x to at most 1/2, so
    each term is less than half of the previous one.
    """
    if x > 0.5:
        return 1 - beta_cdf(1 - x, b, a)
    term, total = 1.0, 1 / a
    for k in range(1, 56):
        term *= x * (k - b) / k
        total += term / (a + k)
    return total * x**a * math.gamma(a + b) / (math.gamma(a) * math.gamma(b))
