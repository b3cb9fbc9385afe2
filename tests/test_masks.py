"""Repainting: what is kept is kept whatever the solver, and what is pasted leaves the rest as it was."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inkstream.flow import add_noise
from inkstream.sampling.masks import keep, latent_mask, paste, start_index
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
    result = drive(keep(solver, image, mask, noise), velocity)
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
    result = drive(keep(euler(x, ts), image, mask, noise, ts), velocity)
    torch.testing.assert_close(result, blended, rtol=0, atol=2e-6)


def test_an_all_white_mask_changes_nothing():
    image, noise, ts = gaussian(0, 4, 6, 6), gaussian(1, 4, 6, 6), SCHEDULES["simple"](8, 3.0)
    free = drive(SOLVERS["heun"](noise, ts), velocity)
    assert torch.equal(drive(keep(SOLVERS["heun"](noise, ts), image, torch.ones(1, 6, 6), noise), velocity), free)


def test_a_wrapped_solver_asks_where_the_solver_itself_would_and_with_no_steps_asks_nothing():
    image, noise, ts = gaussian(0, 4, 6, 6), gaussian(1, 4, 6, 6), SCHEDULES["simple"](4, 3.0)
    asked = []

    def remember(x, t):
        asked.append(t)
        return velocity(x, t)

    drive(keep(SOLVERS["heun"](noise, ts), image, window(), noise), remember)
    assert asked == [ts[0], ts[1], ts[1], ts[2], ts[2], ts[3], ts[3]]
    assert torch.equal(drive(keep(euler(image, [0.0]), image, window(), noise), velocity), image)


def test_closing_a_wrapped_solver_closes_the_one_inside():
    closed = []

    def endless():
        try:
            while True:
                yield Query(torch.zeros(1, 1, 1), 0.5)
        finally:
            closed.append(True)

    inside = endless()  # held here, so that it is not closed merely by being let go
    wrapped = keep(inside, torch.zeros(1, 1, 1), torch.ones(1, 1, 1), torch.zeros(1, 1, 1))
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


@given(seed=st.integers(0, 999), feather=st.integers(0, 9), share=st.floats(0, 1))
def test_every_pixel_outside_the_mask_is_the_originals_exactly(seed, feather, share):
    original, result = torch.rand(2, 3, 12, 17, generator=seeded(seed))
    mask = torch.rand(12, 17, generator=seeded(seed + 1)).pow(4 * share)
    pasted = paste(original, result, mask, feather)
    assert torch.equal(pasted[:, mask < 0.5], original[:, mask < 0.5])
    low, high = torch.minimum(original, result), torch.maximum(original, result)
    assert ((pasted >= low - 1e-6) & (pasted <= high + 1e-6)).all()


def test_the_seam_fades_in_linearly_inside_the_white_part():
    mask = torch.zeros(1, 20)
    mask[:, 5:] = 1
    pasted = paste(torch.zeros(3, 1, 20), torch.ones(3, 1, 20), mask, feather=4)
    expected = torch.cat([torch.zeros(5), torch.tensor([0.2, 0.4, 0.6, 0.8]), torch.ones(11)])
    torch.testing.assert_close(pasted, expected.expand(3, 1, 20))


def test_without_feather_the_result_begins_at_the_edge():
    original, result = torch.rand(2, 3, 8, 8, generator=seeded(0))
    mask = torch.zeros(8, 8)
    mask[2:6, 2:6] = 1
    assert torch.equal(paste(original, result, mask, 0), torch.where(mask >= 0.5, result, original))


def test_an_all_white_mask_gives_the_whole_result_and_an_all_black_one_the_original():
    original, result = torch.rand(2, 3, 8, 8, generator=seeded(0))
    assert torch.equal(paste(original, result, torch.ones(8, 8), 3), result)
    assert torch.equal(paste(original, result, torch.zeros(8, 8), 3), original)


def test_a_stroke_thinner_than_the_feather_still_shows_the_result():
    original, result = torch.zeros(3, 20, 20), torch.ones(3, 20, 20)
    mask = torch.zeros(20, 20)
    mask[8:11] = 1
    assert paste(original, result, mask, feather=8)[0, :, 0].tolist()[7:12] == [0.0, 0.5, 1.0, 0.5, 0.0]
