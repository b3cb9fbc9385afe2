"""Distribution matching: pure functions of images and velocities that pull a student's pictures towards a teacher's.

A direction is what is added to the student's image. `x` is that image, (B, C, h, w), and each velocity was answered at
`add_noise(x, noise, t)`, so that `-t * velocity` is the estimate of the image, up to a term that all models share.
Source: Decoupled-DMD (arXiv 2511.22677), whose two terms add up to the gradient of DMD2 (arXiv 2405.14867).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def matching_direction(teacher: Tensor, critic: Tensor, t: Tensor) -> Tensor:
    """Return distribution matching (DM): from the critic's estimate of the image to the teacher's.

    teacher, critic: velocities at the same point, without guidance; t: (B,). The critic knows the student's pictures,
    so the direction is 0 where the student's distribution is the teacher's.
    """
    return -_wide(t) * (teacher - critic)


def guidance_direction(gap: Tensor, guidance: float, t: Tensor) -> Tensor:
    """Return CFG augmentation (CA): what guidance changes in the teacher's estimate of the image.

    gap: the teacher's velocity with the prompt minus that without; t: (B,).
    """
    return -_wide(t) * (guidance - 1) * gap


def normalised(direction: Tensor, x: Tensor, estimate: Tensor, floor: float) -> Tensor:
    """Divide a direction by the mean distance of each image from the teacher's estimate of it, in float32.

    Without `floor`, the least divisor, directions are not finite where the estimate is exact.
    """
    distance = (x - estimate).float().abs().mean((1, 2, 3), keepdim=True)
    return direction / distance.clamp(min=floor)


def pull(x: Tensor, direction: Tensor) -> Tensor:
    """Return a loss, (B,), whose gradient moves x along the direction: half the squared distance to its end."""
    return 0.5 * (x - (x + direction).detach()).square().mean((1, 2, 3))


def moments_loss(x: Tensor, estimate: Tensor) -> Tensor:
    """Return KL(student || teacher) of the mean and variance of each image's channels, as normal distributions, (B,).

    It holds back images that get darker or more saturated, and costs no forward.
    """
    var, mean = torch.var_mean(x.float(), (2, 3))
    wanted_var, wanted_mean = torch.var_mean(estimate.detach().float(), (2, 3))
    var, wanted_var = var + 1e-6, wanted_var + 1e-6
    kl = 0.5 * (wanted_var.log() - var.log() + (var + (mean - wanted_mean).square()) / wanted_var - 1)
    return kl.mean(1)


def real_loss(logits: Tensor) -> Tensor:
    """Return the loss of logits that should say "real": softplus(-logits), the non-saturating GAN loss."""
    return F.softplus(-logits)


def fake_loss(logits: Tensor) -> Tensor:
    """Return the loss of logits that should say "drawn by the student"."""
    return F.softplus(logits)


def unshift_time(t: Tensor, shift: float) -> Tensor:
    """Return the time that `shift_time` maps to t."""
    return t / (shift - (shift - 1) * t)


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Return the mean cosine of the images of two batches."""
    return F.cosine_similarity(one.flatten(1).float(), other.flatten(1).float()).mean()


def rms(x: Tensor) -> Tensor:
    """Return the root mean square."""
    return x.float().square().mean().sqrt()


def _wide(t: Tensor) -> Tensor:
    return t.view(-1, 1, 1, 1)
