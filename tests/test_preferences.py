"""Reinforcement learning's formulas do what they say, on normal distributions and by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from inkstream.flow import add_noise
from inkstream.train.preferences import advantages, dpo_loss, grpo_loss, log_probability, nft_loss, sde_step


def velocity(x, t, mean, std):
    gain = std**2 * (1 - t) / ((1 - t) ** 2 * std**2 + t**2)
    return (x - mean - gain * (x - (1 - t) * mean)) / t


def test_advantages_compare_with_the_group_and_a_group_of_equals_teaches_nothing():
    found = advantages(torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.7, 0.7, 0.7, 0.7]]))
    assert found.tolist() == [[1, -1, 1, -1], [0, 0, 0, 0]]
    assert advantages(torch.tensor([[1.0] + [0.0] * 99])).max() == 5


@pytest.mark.parametrize("good", [1.0, 0.0])
def test_nft_goes_to_good_pictures_and_away_from_bad_ones(good):
    generator = torch.Generator().manual_seed(0)
    image, noise = (torch.randn(4, 1, 2, 2, generator=generator) for _ in range(2))
    t = torch.full((4,), 0.6)
    points = add_noise(image, noise, 0.6)
    old = (noise - image) + 0.1 * torch.randn(image.shape, generator=generator)
    v = old.clone().requires_grad_(True)
    nft_loss(v, old, points, t, image, torch.full((4,), good), beta=1.0).sum().backward()
    towards = (noise - image) - old  # what brings the velocity to the picture
    assert ((-v.grad * towards).sum() > 0) == (good == 1.0)


def test_nft_is_still_where_good_and_bad_are_in_balance():
    generator = torch.Generator().manual_seed(0)
    image, noise = (torch.randn(4, 1, 2, 2, generator=generator) for _ in range(2))
    t = torch.full((4,), 0.6)
    old = torch.randn(image.shape, generator=generator)
    v = old.clone().requires_grad_(True)
    nft_loss(v, old, add_noise(image, noise, 0.6), t, image, torch.full((4,), 0.5), beta=1.0).sum().backward()
    assert v.grad.abs().max() < 1e-6


def test_stochastic_steps_end_at_the_distribution_of_deterministic_ones():
    for strength in (0.0, 0.7):
        x = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
        fresh = torch.Generator().manual_seed(1)
        times = torch.linspace(1, 0, 101).tolist()
        for t, after in pairwise(times):
            mean, std = sde_step(x, velocity(x, t, 0.5, 0.8), t, after, strength)
            x = mean + std * torch.randn(x.shape, generator=fresh)
        assert x.mean().item() == pytest.approx(0.5, abs=0.02), strength
        assert x.std().item() == pytest.approx(0.8, abs=0.03), strength


def test_without_strength_a_step_is_eulers():
    x, v = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 2.0)
    mean, std = sde_step(x, v, 0.8, 0.5, 0.0)
    assert mean.item() == pytest.approx(1 - 0.3 * 2)
    assert std == 0


def test_the_ratio_is_one_at_the_first_update_and_the_gradient_follows_the_advantage():
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    mean = torch.zeros_like(x).requires_grad_(True)
    old = log_probability(x, mean.detach(), 0.5)
    now = log_probability(x, mean, 0.5)
    assert torch.equal(now.detach(), old)
    advantage = torch.tensor([1.0, -1.0, 0.0])
    grpo_loss(now, old, advantage, 1e-4).sum().backward()
    moved = (-mean.grad * x).sum((1, 2, 3))
    assert moved[0] > 0
    assert moved[1] < 0
    assert moved[2] == 0


def test_a_ratio_beyond_the_clip_teaches_nothing_more():
    old = torch.zeros(2)
    now = torch.tensor([0.1, -0.1], requires_grad=True)
    grpo_loss(now, old, torch.tensor([1.0, -1.0]), clip=0.05).sum().backward()
    assert now.grad.tolist() == [0, 0]


def test_log_probabilities_are_those_of_torch():
    generator = torch.Generator().manual_seed(0)
    x, mean = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(2))
    wanted = torch.distributions.Normal(mean, 0.3).log_prob(x).mean((1, 2, 3))
    assert torch.allclose(log_probability(x, mean, 0.3), wanted, atol=1e-5)


def test_dpo_lowers_the_error_of_the_better_picture_against_the_worse():
    before = torch.tensor([1.0])
    better, worse = (torch.tensor([1.0], requires_grad=True) for _ in range(2))
    loss = dpo_loss(better, worse, before, before, beta=10.0)
    assert loss.item() == pytest.approx(0.6931, abs=1e-3)
    loss.backward()
    assert better.grad > 0
    assert worse.grad < 0
