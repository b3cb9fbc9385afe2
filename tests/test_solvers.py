"""Solvers, measured on flows whose exact solution is known."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from inkstream.flow import add_noise
from inkstream.sampling.schedules import SCHEDULES
from inkstream.sampling.solvers import SOLVERS, drive, phi1, phi2, times_asked
from inkstream.types import SolverName

MEAN, STD = 3.0, 0.5
DETERMINISTIC = ["euler", "heun", "dpmpp_2m", "res_multistep", "res_2s", "ralston_2s"]
STOCHASTIC = ["euler_ancestral", "lcm"]


def spread(t):
    """The standard deviation of x_t = (1 - t) image + t noise for images from N(MEAN, STD^2)."""
    return math.sqrt(((1 - t) * STD) ** 2 + t**2)


def velocity(x, t):
    """E[noise - image | x_t = x], by the regression of one Gaussian on another."""
    slope = (t - (1 - t) * STD**2) / spread(t) ** 2
    return -MEAN + slope * (x - (1 - t) * MEAN)


def flow_map(noise, t):
    """Where the exact flow has carried `noise` by time t: it keeps each point's distance in standard deviations."""
    return (1 - t) * MEAN + spread(t) * noise


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def gaussian(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=seeded(0))


def error(name, ts):
    noise = gaussian(500)
    return (drive(SOLVERS[name](noise, ts), velocity) - flow_map(noise, ts[-1])).abs().max().item()


def evenly(steps, end):
    return [1 - (1 - end) * i / steps for i in range(steps)] + [end]


def test_the_table_holds_exactly_the_names_that_a_request_may_give():
    assert tuple(SOLVERS) == get_args(SolverName)


@pytest.mark.parametrize(
    ("name", "order"),
    [("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("res_multistep", 2), ("res_2s", 2), ("ralston_2s", 2)],
)
def test_the_error_falls_at_the_solvers_order(name, order):
    coarse, fine = (error(name, evenly(n, end=0.1)) for n in (128, 256))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize(
    ("name", "order"),
    [("euler", 1), ("heun", 2), ("ralston_2s", 2), ("dpmpp_2m", 1.85), ("res_multistep", 1.85), ("res_2s", 1.95)],
)
def test_down_to_zero_those_in_l_lose_a_logarithm_of_the_steps(name, order):
    """The last steps are long in l = -ln t, however many there are: the error is n^-2 log n there, not n^-2."""
    coarse, fine = (error(name, evenly(n, end=0.0)) for n in (256, 512))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.05)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_many_steps_of_any_schedule_land_where_the_exact_flow_does(name):
    for schedule in SCHEDULES.values():
        assert error(name, schedule(100, 3.0)) < (0.15 if name == "euler" else 0.03)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 8])
def test_a_flow_that_points_at_one_image_lands_on_it_whatever_the_steps(name, steps):
    image, noise = gaussian(2, 3, 4) + 5, gaussian(2, 3, 4)
    ts = SCHEDULES["simple"](steps, 3.0)
    result = drive(SOLVERS[name](noise, ts, seeded(1)), lambda x, t: (x - image) / t)
    torch.testing.assert_close(result, image, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_flow_that_points_at_one_image_is_followed_exactly_to_any_time(name):
    image, noise = gaussian(6) + 5, gaussian(6)
    result = drive(SOLVERS[name](noise, [1.0, 0.8, 0.35]), lambda x, t: (x - image) / t)
    torch.testing.assert_close(result, add_noise(image, noise, 0.35), rtol=0, atol=1e-12)


def test_res_multistep_is_exact_where_the_image_moves_linearly_in_l():
    """For D = l = -ln t, the flow dx/dl = D - x is solved by x = l - 1 + (x(1) + 1) t. After its first step, which is
    Euler's, nothing is added to the error; what is there shrinks as t."""
    ts, x = [1.0, 0.9, 0.5, 0.2, 0.1], torch.tensor(2.0, dtype=torch.float64)

    def error_over_t(ts):
        result = drive(SOLVERS["res_multistep"](x, ts), lambda x, t: (x + math.log(t)) / t)
        return (result.item() - (-math.log(ts[-1]) - 1 + 3 * ts[-1])) / ts[-1]

    first, *others = (error_over_t(ts[:n]) for n in (2, 3, 4, 5))
    assert abs(first) > 1e-3
    assert others == pytest.approx([first] * 3, abs=1e-12)


def test_euler_ancestral_lands_on_the_datas_mean_and_deviation():
    noise = gaussian(40_000, dtype=torch.float32)
    result = drive(SOLVERS["euler_ancestral"](noise, evenly(300, 0.0), seeded(1)), velocity)
    assert result.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert result.std().item() == pytest.approx(STD, abs=0.02)


def test_lcm_with_an_exact_consistency_function_lands_on_the_datas_mean_and_deviation():
    """As consistency models do, it points at the flow's end point, not at the mean of all images that are possible."""

    def consistent(x, t):
        end = MEAN + STD * (x - (1 - t) * MEAN) / spread(t)
        return (x - end) / t

    noise = gaussian(40_000, dtype=torch.float32)
    result = drive(SOLVERS["lcm"](noise, evenly(4, 0.0), seeded(1)), consistent)
    assert result.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert result.std().item() == pytest.approx(STD, abs=0.02)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_fresh_noise_keeps_the_level_that_each_time_asks_for(name):
    image = 5.0
    for end in (0.7, 0.3):
        noise = gaussian(40_000, dtype=torch.float32)
        result = drive(SOLVERS[name](noise, [1.0, 0.8, end], seeded(1)), lambda x, t: (x - image) / t)
        assert result.mean().item() == pytest.approx((1 - end) * image, abs=0.02)
        assert result.std().item() == pytest.approx(end, abs=0.01)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_seed_means_the_same_noise_and_another_seed_another(name):
    noise, ts = gaussian(8, dtype=torch.float32), evenly(4, 0.0)
    one, again, other = (drive(SOLVERS[name](noise, ts, seeded(s)), velocity) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_solvers_draw_nothing(name):
    generator = seeded(1)
    drive(SOLVERS[name](gaussian(8), evenly(4, 0.0), generator), velocity)
    assert torch.equal(generator.get_state(), seeded(1).get_state())


@pytest.mark.parametrize("name", SOLVERS)
def test_the_noise_that_was_given_is_not_written_to_and_float32_stays_float32(name):
    noise = gaussian(8, dtype=torch.float32)
    before = noise.clone()
    assert drive(SOLVERS[name](noise, evenly(4, 0.0), seeded(1)), velocity).dtype == torch.float32
    assert torch.equal(noise, before)


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("euler", 8),
        ("heun", 15),
        ("dpmpp_2m", 8),
        ("res_multistep", 8),
        ("res_2s", 15),
        ("ralston_2s", 15),
        ("euler_ancestral", 8),
        ("lcm", 8),
    ],
)
def test_the_times_asked_are_those_of_the_real_run_and_never_zero(name, calls):
    ts, asked = SCHEDULES["simple"](8, 3.0), []

    def remember(x, t):
        asked.append(t)
        return velocity(x, t)

    drive(SOLVERS[name](gaussian(3), ts, seeded(1)), remember)
    assert times_asked(name, ts) == asked
    assert len(asked) == calls
    assert min(asked) > 0


@pytest.mark.parametrize("name", SOLVERS)
def test_no_steps_left_gives_back_what_came_in(name):
    x = gaussian(3)
    assert times_asked(name, [0.0]) == []
    assert torch.equal(drive(SOLVERS[name](x, [0.0]), velocity), x)


def test_phi_functions_are_the_integrals_they_stand_for():
    for h in (1e-6, 9.9e-4, 1.01e-3, 0.3, 2.0, 7.0):
        u = torch.linspace(0, h, 20_001, dtype=torch.float64)
        assert phi1(h) == pytest.approx(torch.trapezoid((-u).exp(), u).item() / h, rel=1e-7)
        assert phi2(h) == pytest.approx(torch.trapezoid((h - u) * (-u).exp(), u).item() / h**2, rel=1e-7)
