"""The optimum of each term of distribution matching is its fixed point, shown on normal distributions."""

from __future__ import annotations

import math

import pytest
import torch

from inkstream.flow import add_noise, to_image
from inkstream.train.matching import (
    fake_loss,
    guidance_direction,
    matching_direction,
    moments_loss,
    normalised,
    pull,
    real_loss,
    unshift_time,
)
from inkstream.train.objectives import shift_time

SAMPLES = 4096


def velocity(x, t, mean, std):
    """The exact velocity of data N(mean, std^2) at points x of times t, (B,)."""
    t = t.view(-1, 1, 1, 1)
    gain = std**2 * (1 - t) / ((1 - t) ** 2 * std**2 + t**2)
    image = mean + gain * (x - (1 - t) * mean)
    return (x - image) / t


class Student:
    """Draws N(mean, std^2), one value a picture."""

    def __init__(self, mean, std):
        self.mean = torch.tensor(float(mean), requires_grad=True)
        self.log_std = torch.tensor(math.log(std), requires_grad=True)
        self.generator = torch.Generator().manual_seed(0)

    def draw(self):
        noise = torch.randn(SAMPLES, 1, 1, 1, generator=self.generator)
        return self.mean + self.log_std.exp() * noise

    def points(self, x, low=0.02, high=0.98):
        t = low + (high - low) * torch.rand(SAMPLES, generator=self.generator)
        noise = torch.randn(SAMPLES, 1, 1, 1, generator=self.generator)
        return add_noise(x.detach(), noise, t.view(-1, 1, 1, 1)), t

    def state(self):
        return self.mean.item(), self.log_std.exp().item()


def matching_loss(student, teacher, floor=0.1):
    x = student.draw()
    points, t = student.points(x)
    ours = velocity(points, t, *student.state())  # of a perfect critic
    theirs = velocity(points, t, *teacher)
    direction = matching_direction(theirs, ours, t)
    estimate = to_image(points, theirs, t.view(-1, 1, 1, 1))
    return pull(x, normalised(direction, x.detach(), estimate, floor)).mean()


def learn(student, loss, steps=300, rate=0.05):
    optimiser = torch.optim.Adam([student.mean, student.log_std], lr=rate)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    return student.state()


@pytest.mark.parametrize("start", [(-2.0, 0.4), (3.0, 2.0)])
def test_distribution_matching_ends_at_the_teacher_from_both_sides(start):
    mean, std = learn(student := Student(*start), lambda: matching_loss(student, (0.5, 1.0)))
    assert mean == pytest.approx(0.5, abs=0.05)
    assert std == pytest.approx(1.0, abs=0.05)


def test_distribution_matching_asks_for_nothing_where_the_student_is_the_teacher():
    student = Student(0.5, 1.0)
    matching_loss(student, (0.5, 1.0)).backward()
    assert abs(student.mean.grad.item()) < 1e-6
    assert abs(student.log_std.grad.item()) < 1e-6


@pytest.mark.parametrize(("start", "signs"), [((0.0, 0.5), (-1, -1)), ((1.0, 2.0), (1, 1))])
def test_distribution_matching_points_to_the_teacher_in_mean_and_spread(start, signs):
    student = Student(*start)
    matching_loss(student, (0.5, 1.0)).backward()
    assert math.copysign(1, student.mean.grad.item()) == signs[0]  # a descent goes against the gradient
    assert math.copysign(1, student.log_std.grad.item()) == signs[1]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("start", [-2.0, 4.0])
def test_both_terms_end_at_the_guided_distribution(start, guidance):
    """With equal spreads, p(x | prompt) (p(x | prompt) / p(x)) ^ (guidance - 1) has a shifted mean."""
    prompt, empty = (0.5, 1.0), (0.0, 1.0)
    student = Student(start, 1.0)

    def loss():
        x = student.draw()
        points, t = student.points(x)
        theirs = velocity(points, t, *prompt)
        direction = matching_direction(theirs, velocity(points, t, student.mean.item(), 1.0), t)
        gap = theirs - velocity(points, t, *empty)
        return pull(x, direction + guidance_direction(gap, guidance, t)).mean()

    mean, _ = learn(student, loss)
    assert mean == pytest.approx(0.5 + (guidance - 1) * 0.5, abs=0.06)


def test_guidance_alone_has_no_fixed_point_and_goes_on_and_on():
    student = Student(0.0, 1.0)

    def loss():
        x = student.draw()
        points, t = student.points(x)
        gap = velocity(points, t, 0.5, 1.0) - velocity(points, t, 0.0, 1.0)
        return pull(x, guidance_direction(gap, 3.0, t)).mean()

    first, _ = learn(student, loss, steps=100)
    further, _ = learn(student, loss, steps=100)
    assert 0.5 < first < further - 0.5


@pytest.mark.parametrize("start", [(-1.0, 0.5), (2.0, 1.5)])
def test_the_loss_of_moments_ends_at_the_estimates_moments(start):
    generator = torch.Generator().manual_seed(0)
    estimate = 0.5 + torch.randn(8, 4, 16, 16, generator=generator)
    shape = torch.randn(8, 4, 16, 16, generator=generator)
    shape = (shape - shape.mean((2, 3), keepdim=True)) / shape.std((2, 3), keepdim=True)
    mean = torch.full((8, 4, 1, 1), start[0], requires_grad=True)
    std = torch.full((8, 4, 1, 1), start[1], requires_grad=True)
    optimiser = torch.optim.Adam([mean, std], lr=0.05)
    for _ in range(300):
        optimiser.zero_grad()
        moments_loss(mean + std * shape, estimate).sum().backward()
        optimiser.step()
    assert torch.allclose(mean, estimate.mean((2, 3), keepdim=True), atol=0.02)
    assert torch.allclose(std, estimate.std((2, 3), keepdim=True), atol=0.02)
    assert moments_loss(estimate, estimate).abs().max() < 1e-6


def test_the_discriminators_losses_point_apart_and_the_students_to_the_real_ones():
    logits = torch.tensor([0.3, -0.2], requires_grad=True)
    (real,) = torch.autograd.grad(real_loss(logits).sum(), logits)
    (fake,) = torch.autograd.grad(fake_loss(logits).sum(), logits)
    assert (real < 0).all()  # a descent raises the logits of real pictures, and of the student's in its own turn
    assert (fake > 0).all()
    assert torch.allclose(real_loss(torch.zeros(1)), fake_loss(torch.zeros(1)))


def test_an_exact_estimate_gives_a_finite_direction():
    x = torch.ones(2, 3, 4, 4)
    found = normalised(torch.ones_like(x), x, x, 0.1)
    assert torch.equal(found, torch.full_like(x, 10.0))


def test_each_picture_has_a_norm_of_its_own():
    x = torch.zeros(2, 1, 2, 2)
    estimate = torch.stack([torch.full((1, 2, 2), 1.0), torch.full((1, 2, 2), 4.0)])
    found = normalised(torch.ones_like(x), x, estimate, 0.1)
    assert found[:, 0, 0, 0].tolist() == [1.0, 0.25]


def test_unshifting_undoes_the_shift():
    t = torch.linspace(0, 1, 11)
    assert torch.allclose(unshift_time(shift_time(t, 4.0), 4.0), t, atol=1e-6)
