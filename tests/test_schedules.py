"""Schedules: known vectors, analytic distributions, and what must hold for every number of steps and every shift."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inkstream.sampling.schedules import (
    SCHEDULES,
    beta_cdf,
    dynamic_shift,
    empirical_mu,
    empirical_shift,
    shifted,
)
from inkstream.types import ScheduleName

DEDUPED = {"beta", "beta57"}


def test_the_table_holds_exactly_the_names_that_a_request_may_give():
    assert tuple(SCHEDULES) == get_args(ScheduleName)


def test_simple_is_the_published_grid_of_turbo_and_of_base():
    turbo = [1, 0.9545454545, 0.9, 0.8333333333, 0.75, 0.6428571429, 0.5, 0.3, 0]
    base = [1, 0.976744186, 0.9473684211, 0.9090909091, 0.8571428571, 0.7826086957, 0.6666666667, 0.4615384615, 0]
    assert SCHEDULES["simple"](8, 3.0) == pytest.approx(turbo, abs=1e-9)
    assert SCHEDULES["simple"](8, 6.0) == pytest.approx(base, abs=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 100])
def test_simple_agrees_with_the_table_of_a_thousand_where_steps_divide_it(steps):
    table = [shifted((k + 1) / 1000, 3.0) for k in range(1000)]
    read_off = [table[-(1 + int(i * 1000 / steps))] for i in range(steps)] + [0.0]
    assert SCHEDULES["simple"](steps, 3.0) == pytest.approx(read_off, abs=1e-12)


@pytest.mark.parametrize("table", [1000, 10_000])
@pytest.mark.parametrize("steps", [3, 7, 9, 30, 99])
def test_simple_is_at_most_a_table_entry_earlier_than_the_table_elsewhere(steps, table):
    ours = SCHEDULES["simple"](steps, 1.0, table)
    for i, t in enumerate(ours[:-1]):
        late = (table - int(i * table / steps)) / table
        assert 0 <= late - t < 1 / table or late - t == pytest.approx(0, abs=1e-12)


def comfyui(name, steps, shift, table):
    """The times of ComfyUI's comfy/samplers.py, by the formulas of its ModelSamplingFlux and ModelSamplingDiscreteFlow.

    Both map a time t to s / (s + 1 / t - 1), where s is e^mu for FLUX. Their `timestep` of a time is the time itself.
    """

    def moved(t):
        return shift / (shift + 1 / t - 1)

    entries = moved(np.arange(1, table + 1) / table)
    if name == "sgm_uniform":
        times = moved(np.linspace(entries[-1], entries[0], steps + 1)[:-1])
    elif name == "normal":
        times = moved(np.linspace(entries[-1], entries[0], steps))
    else:
        a, b = (0.6, 0.6) if name == "beta" else (0.5, 0.7)
        quantiles = 1 - np.linspace(0, 1, steps, endpoint=False)
        nearest = np.searchsorted(
            midpoints(a, b, table), quantiles + 1e-12, side="right"
        )  # 1e-12: a half is rounded up
        times = entries[list(dict.fromkeys(nearest.tolist()))]
    return [*times.tolist(), 0.0]


@cache
def midpoints(a, b, table):
    """The probabilities of Beta(a, b) half-way between the table's entries, by quadrature over u = x^a."""
    x = (np.arange(table - 1) + 0.5) / (table - 1)
    return np.where(x <= 0.5, quadrature(np.minimum(x, 0.5), a, b), 1 - quadrature(np.minimum(1 - x, 0.5), b, a))


def quadrature(x, a, b):
    nodes, weights = np.polynomial.legendre.leggauss(200)
    half = x[:, None] ** a / 2
    total = ((1 - (half * (nodes + 1)) ** (1 / a)) ** (b - 1) * weights * half).sum(1) / a
    return total * math.gamma(a + b) / (math.gamma(a) * math.gamma(b))


@pytest.mark.parametrize("name", ["sgm_uniform", "normal", "beta", "beta57"])
@pytest.mark.parametrize(
    ("shift", "table"),
    [
        (math.exp(0.5), 10_000),
        (math.exp(1.15), 10_000),
        (math.exp(2.02), 10_000),
        (1.0, 1000),
        (3.0, 1000),
        (6.0, 1000),
    ],
    ids=["flux-0.5", "flux-1.15", "flux-2.02", "flow-1", "flow-3", "flow-6"],
)
def test_schedules_are_those_of_comfyui_on_the_models_own_table(name, shift, table):
    for steps in range(1, 101):
        assert SCHEDULES[name](steps, shift, table) == pytest.approx(comfyui(name, steps, shift, table), abs=1e-9)


@pytest.mark.parametrize(("shift", "table"), [(0.05, 1000), (0.3, 10_000)])
def test_an_end_of_normal_that_is_almost_zero_counts_as_the_final_zero(shift, table):
    assert SCHEDULES["normal"](8, shift, table) == SCHEDULES["sgm_uniform"](8, shift, table)
    assert SCHEDULES["normal"](8, 0.4, table) != SCHEDULES["sgm_uniform"](8, 0.4, table)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sgm_uniform", [1, 0.954694, 0.900359, 0.833998, 0.751121, 0.644686, 0.502985, 0.305009, 0]),
        ("normal", [1, 0.947543, 0.882788, 0.800837, 0.693793, 0.548046, 0.337972, 0.008929, 0]),
        ("linear_quadratic", [1, 0.99375, 0.9875, 0.98125, 0.975, 0.909375, 0.725, 0.421875, 0]),
        ("bong_tangent", [1, 0.971344, 0.929423, 0.862888, 0.7443, 0.5, 0.213122, 0.069646, 0]),
    ],
)
def test_eight_steps_at_shift_three_are_the_known_ones(name, expected):
    assert SCHEDULES[name](8, 3.0) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "picks"),  # the quantiles times 999, from an arbitrary-precision library, rounded
    [
        ("beta", [999, 942, 823, 670, 500, 329, 176, 57]),
        ("beta57", [999, 889, 719, 535, 361, 211, 96, 24]),
        ("beta", [999, 986, 959, 922, 876, 823, 765, 703, 637, 569, 500, 430, 362, 296, 234, 176, 123, 77, 40, 13]),
        ("beta57", [999, 968, 918, 857, 790, 719, 645, 572, 499, 428, 361, 297, 238, 185, 137, 96, 62, 35, 16, 4]),
    ],
)
def test_beta_schedules_pick_the_table_entries_nearest_to_the_quantiles(name, picks):
    expected = [shifted((k + 1) / 1000, 3.0) for k in picks] + [0.0]
    assert SCHEDULES[name](len(picks), 3.0) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", sorted(DEDUPED))
def test_beta_schedules_drop_duplicates_when_there_are_more_steps_than_distinct_entries(name):
    times = SCHEDULES[name](400, 3.0)
    assert 300 < len(times) < 401
    assert len(set(times)) == len(times)


@given(x=st.floats(0, 1))
def test_the_beta_distribution_is_exact_where_it_has_a_closed_form(x):
    assert beta_cdf(x, 0.5, 0.5) == pytest.approx(2 / math.pi * math.atan2(math.sqrt(x), math.sqrt(1 - x)), abs=1e-14)
    assert beta_cdf(x, 0.7, 1) == pytest.approx(x**0.7, abs=1e-14)
    assert beta_cdf(x, 1, 0.6) == pytest.approx(1 - (1 - x) ** 0.6, abs=1e-14)


@pytest.mark.parametrize(
    ("a", "b", "x", "expected"),  # from an arbitrary-precision library
    [
        (0.6, 0.6, 0.1, 0.17604725434603782),
        (0.6, 0.6, 0.5, 0.5),
        (0.6, 0.6, 0.93, 0.8585487834385409),
        (0.5, 0.7, 0.001, 0.025242234771196123),
        (0.5, 0.7, 0.4, 0.5290745979529031),
        (0.5, 0.7, 0.999, 0.9954705468870129),
        (5, 0.5, 0.7, 0.06526224616890815),
    ],
)
def test_the_beta_distribution_has_its_known_values(a, b, x, expected):
    assert beta_cdf(x, a, b) == pytest.approx(expected, abs=1e-14)


@given(x=st.floats(0, 1), y=st.floats(0, 1), a=st.floats(0.3, 3), b=st.floats(0.3, 3))
def test_the_beta_distribution_never_falls(x, y, a, b):
    low, high = sorted((x, y))
    assert -1e-14 <= beta_cdf(low, a, b) <= beta_cdf(high, a, b) + 1e-13 <= 1 + 2e-13


@pytest.mark.parametrize("name", SCHEDULES)
@given(steps=st.integers(1, 100), shift=st.floats(0.5, 20))
def test_every_schedule_falls_strictly_from_one_to_zero(name, steps, shift):
    times = SCHEDULES[name](steps, shift)
    assert times[0] == 1.0
    assert times[-1] == 0.0
    assert all(t > s for t, s in pairwise(times))
    assert all(type(t) is float for t in times)
    assert len(times) == steps + 1 or (name in DEDUPED and len(times) < steps + 1)


def test_a_shift_of_one_changes_nothing_and_shifts_compose_by_multiplying():
    assert shifted(0.3, 1.0) == pytest.approx(0.3, abs=1e-15)
    assert shifted(shifted(0.3, 2.0), 3.0) == pytest.approx(shifted(0.3, 6.0), abs=1e-15)


def test_the_dynamic_shift_is_the_exponential_of_a_line_through_two_picture_sizes():
    assert dynamic_shift(256) == pytest.approx(math.exp(0.5))
    assert dynamic_shift(4096) == pytest.approx(math.exp(1.15))
    t, e_mu = 0.3, dynamic_shift(1024)
    assert shifted(t, e_mu) == pytest.approx(e_mu / (e_mu + (1 / t - 1)))


def test_the_dynamic_shift_goes_on_beyond_its_two_sizes():
    assert math.log(dynamic_shift(16_384)) == pytest.approx(3.23)
    assert SCHEDULES["simple"](4, dynamic_shift(4096)) == pytest.approx(
        [1, 0.9045308, 0.7595109, 0.5128441, 0], abs=1e-6
    )


@pytest.mark.parametrize(
    ("tokens", "steps", "mu"),
    [
        (4096, 4, 2.2912), (4096, 28, 2.1514), (4096, 50, 2.0234), (1024, 4, 2.0307), (1024, 50, 1.7020),
        (4301, 4, 1.1847), (8160, 50, 1.8379), (16_384, 28, 3.2300),
    ],
)  # fmt: skip
def test_flux_2_has_its_known_mu(tokens, steps, mu):
    assert empirical_mu(tokens, steps) == pytest.approx(mu, abs=1e-4)
    assert empirical_shift(tokens, steps) == pytest.approx(math.exp(empirical_mu(tokens, steps)))


@pytest.mark.parametrize(
    ("tokens", "expected"),  # diffusers' scheduler in float32, given its pipeline's mu
    [
        (4096, [1, 0.9673840, 0.9081439, 0.7671999, 0]),
        (1024, [1, 0.9580854, 0.8839819, 0.7174966, 0]),
        (8160, [1, 0.9496226, 0.8627013, 0.6768422, 0]),
    ],
)
def test_klein_visits_its_four_published_times(tokens, expected):
    assert SCHEDULES["simple"](4, empirical_shift(tokens, 4)) == pytest.approx(expected, abs=1e-6)


@given(tokens=st.integers(16, 20_000), steps=st.integers(1, 250))
def test_mu_is_linear_in_the_steps_up_to_4300_tokens_and_deaf_to_them_above(tokens, steps):
    here, more = empirical_mu(tokens, steps), empirical_mu(tokens, steps + 1)
    slope = (empirical_mu(tokens, 200) - empirical_mu(tokens, 10)) / 190
    assert more - here == pytest.approx(slope, abs=1e-12)
    assert (slope == 0) == (tokens > 4300)


def test_mu_falls_by_about_one_where_the_release_changes_its_line():
    assert empirical_mu(4300, 4) - empirical_mu(4301, 4) == pytest.approx(1.124, abs=1e-3)
