"""Repainting in latents: what is kept is kept whatever the solver, and a soft mask frees points one after another."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from inkstream.flow import add_noise
from inkstream.sampling.masks import keep, latent_mask, latent_strengths, left_at, start_index
from inkstream.sampling.schedules import SCHEDULES
from inkstream.sampling.solvers import SOLVERS, drive, euler
from inkstream.types import Query


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def gaussian(seed, *shape):
    return torch.randn(*shape, generator=seeded(seed))


def velocity(x, t):
    """Something bent, that no solver follows exactly and that mixes neighbours."""
    return torch.sin(3 * x) + x.roll(1, -1) * t


def window():
    mask = torch.zeros(1, 6, 6)
    mask[:, 1:4, 2:5] = 1
    return mask


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("start", [0, 3])
def test_every_solver_lands_on_the_image_outside_the_mask(name, start):
    image, noise, mask = gaussian(0, 4, 6, 6), gaussian(1, 4, 6, 6), window()
    ts = SCHEDULES["simple"](8, 3.0)[start:]
    solver = SOLVERS[name](add_noise(image, noise, ts[0]), ts, seeded(2))
    result = drive(keep(solver, image, mask, noise, ts), velocity)
    kept = (mask == 0).expand_as(image)
    torch.testing.assert_close(result[kept], image[kept], rtol=0, atol=1e-5)
    assert (result - image)[~kept].abs().min() > 1e-4


@pytest.mark.parametrize("grey", [1.0, 0.5], ids=["hard", "soft"])
@pytest.mark.parametrize("start", [0, 3])
def test_with_euler_it_is_the_blend_after_every_step_of_inpainting_pipelines(start, grey):
    image, noise, mask = gaussian(0, 4, 6, 6), gaussian(1, 4, 6, 6), window()
    mask[:, 1] *= grey
    ts = SCHEDULES["simple"](8, 3.0)[start:]
    blended = x = add_noise(image, noise, ts[0])
    for t, s in pairwise(ts):
        blended = blended + (s - t) * velocity(blended, t)
        blended = (1 - mask) * add_noise(image, noise, s) + mask * blended
    result = drive(keep(euler(x, ts), image, mask, noise, ts, mixes=True), velocity)
    torch.testing.assert_close(result, blended, rtol=0, atol=2e-6)


def test_an_all_white_mask_changes_nothing():
    image, noise, ts = gaussian(0, 4, 6, 6), gaussian(1, 4, 6, 6), SCHEDULES["simple"](8, 3.0)
    free = drive(SOLVERS["heun"](noise, ts), velocity)
    assert torch.equal(drive(keep(SOLVERS["heun"](noise, ts), image, torch.ones(1, 6, 6), noise, ts), velocity), free)


def test_a_wrapped_solver_asks_where_the_solver_itself_would_and_with_no_steps_asks_nothing():
    image, noise, ts = gaussian(0, 4, 6, 6), gaussian(1, 4, 6, 6), SCHEDULES["simple"](4, 3.0)
    asked = []

    def remember(x, t):
        asked.append(t)
        return velocity(x, t)

    drive(keep(SOLVERS["heun"](noise, ts), image, window(), noise, ts), remember)
    assert asked == [ts[0], ts[1], ts[1], ts[2], ts[2], ts[3], ts[3]]
    assert torch.equal(drive(keep(euler(image, [0.0]), image, window(), noise, [0.0]), velocity), image)


def test_closing_a_wrapped_solver_closes_the_one_inside():
    closed = []

    def endless():
        try:
            while True:
                yield Query(torch.zeros(1, 1, 1), 0.5)
        finally:
            closed.append(True)

    inside = endless()  # held here, so that it is not closed merely by being let go
    wrapped = keep(inside, torch.zeros(1, 1, 1), torch.ones(1, 1, 1), torch.zeros(1, 1, 1), [1.0, 0.0])
    next(wrapped)
    assert not closed
    wrapped.close()
    assert closed


@pytest.mark.parametrize(
    ("steps", "strength", "start"), [(8, 1.0, 0), (8, 0.6, 3), (8, 0.5, 4), (8, 0.1, 7), (8, 0.0, 8), (50, 0.75, 12)]
)
def test_strength_leaves_that_share_of_the_steps(steps, strength, start):
    assert start_index(steps, strength) == start


def test_the_latent_mask_is_black_and_white_from_one_half_on_and_takes_the_nearest_pixel():
    mask = torch.tensor([[0.0, 0.2, 0.49, 0.5], [0.9, 0.9, 0.9, 0.9], [0.51, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert latent_mask(mask, 2, 2).tolist() == [[[0.0, 0.0], [1.0, 1.0]]]
    assert latent_mask(mask, 4, 4).tolist() == [(mask >= 0.5).float().tolist()]


def test_a_smooth_latent_mask_is_the_mean_of_the_four_pixels_in_a_cells_middle():
    mask = torch.zeros(16, 32)
    mask[:, 16:24] = mask[8, 7] = 1
    mask[0, 0] = mask[15, 31] = 0.9  # a corner does not count
    assert latent_mask(mask, 1, 2, smooth=True).tolist() == [[[0.25, 0.5]]]


def test_the_share_of_the_steps_that_are_left_falls_from_1_to_one_step():
    ts = SCHEDULES["simple"](4, 3.0)
    assert [left_at(t, ts) for t in ts] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert left_at((ts[1] + ts[2]) / 2, ts) == 0.75  # a query inside the second step


@pytest.mark.parametrize("name", SOLVERS)
def test_a_soft_masks_values_say_in_which_part_of_the_steps_a_point_is_free(name):
    image, noise = torch.zeros(1, 1, 5), gaussian(1, 1, 1, 5)
    strengths, ts = torch.tensor([[[0.0, 0.2, 0.5, 0.8, 1.0]]]), SCHEDULES["simple"](4, 3.0)
    free: list[tuple[float, list[bool]]] = []

    def watch(x, t):
        free.append((t, (x - add_noise(image, noise, t)).abs().gt(1e-5).flatten().tolist()))
        return torch.full_like(x, 5.0)

    solver = SOLVERS[name](noise, ts, seeded(2))
    result = drive(keep(solver, image, strengths, noise, ts, soft=True), watch).flatten()
    assert result[:2].tolist() == pytest.approx([0, 0], abs=1e-5)  # 0.2 is less than the last of four steps
    assert result[2:].abs().min() > 0.1
    at_half = next(moved for t, moved in free if t == ts[2])  # before the third step only 0.8 and 1 were free
    if name in ("euler", "heun", "dpmpp_2m"):
        assert at_half == [False, False, False, True, True]


def test_a_latent_strength_is_the_mean_of_its_cell():
    mask = torch.zeros(16, 16)
    mask[:8, :4], mask[8:, 8:] = 1, 0.5
    assert latent_strengths(mask, 2, 2).tolist() == [[[0.5, 0.0], [0.0, 0.5]]]
