"""Guidance: the standard scale, its cap, and when it is on."""

from __future__ import annotations

import pytest
import torch

from inkstream.sampling.guidance import guide, is_on


def pair(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator), torch.randn(*shape, generator=generator)


def norms(x):
    return torch.linalg.vector_norm(x, dim=(-3, -2, -1))


def test_scale_one_is_the_positive_and_scale_zero_the_negative_one():
    positive, negative = pair(4, 6, 6)
    assert torch.equal(guide(positive, negative, 1.0), positive)
    torch.testing.assert_close(guide(positive, negative, 0.0), negative)


def test_the_scale_counts_from_the_negative_prediction():
    positive, negative = pair(4, 6, 6)
    torch.testing.assert_close(guide(positive, negative, 5.0), negative + 5 * (positive - negative))


def test_no_difference_between_the_prompts_gives_no_guidance():
    positive, _ = pair(4, 6, 6)
    assert torch.equal(guide(positive, positive, 7.0), positive)


def test_the_cap_scales_a_long_prediction_down_to_the_multiple_and_keeps_its_direction():
    positive, negative = pair(4, 6, 6)
    free, capped = guide(positive, negative, 5.0), guide(positive, negative, 5.0, normalization=1.5)
    assert norms(free) > 1.5 * norms(positive)
    torch.testing.assert_close(norms(capped), 1.5 * norms(positive))
    torch.testing.assert_close(capped / norms(capped), free / norms(free))


def test_the_cap_leaves_a_short_prediction_alone():
    positive, negative = pair(4, 6, 6)
    assert torch.equal(guide(positive, negative, 1.1, normalization=3.0), guide(positive, negative, 1.1))


def test_the_cap_is_each_samples_own_in_a_batch():
    positive, negative = pair(3, 4, 6, 6)
    negative[0] = positive[0]  # this one needs no cap
    together = guide(positive, negative, 5.0, normalization=1.0)
    for i in range(3):
        torch.testing.assert_close(together[i], guide(positive[i], negative[i], 5.0, normalization=1.0))
    assert torch.equal(together[0], positive[0])


def test_predictions_of_nothing_stay_nothing_under_the_cap():
    nothing = torch.zeros(4, 6, 6)
    assert torch.equal(guide(nothing, nothing, 5.0, normalization=1.0), nothing)


@pytest.mark.parametrize(("scale", "on"), [(0.0, False), (0.5, False), (1.0, False), (1.1, True), (5.0, True)])
def test_guidance_is_on_only_above_one(scale, on):
    assert is_on(0.5, scale) is on


def test_guidance_stops_once_the_picture_is_further_than_the_truncation():
    assert [is_on(t, 5.0, truncation=0.25) for t in (1.0, 0.75, 0.7, 0.1)] == [True, True, False, False]
    assert is_on(1e-6, 5.0, truncation=1.0)


def test_guidance_is_on_inside_its_interval_ends_included():
    assert [is_on(t, 5.0, start=0.8, stop=0.3) for t in (1.0, 0.8, 0.5, 0.3, 0.2)] == [False, True, True, True, False]
