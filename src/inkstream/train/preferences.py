"""Reinforcement learning of flow models: pure functions of velocities, errors, log-probabilities and rewards.

Sources: DiffusionNFT (arXiv 2509.16117), Flow-GRPO (arXiv 2505.05470), Diffusion-DPO (arXiv 2311.12908).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from inkstream.flow import to_image


def advantages(rewards: Tensor, most: float = 5.0) -> Tensor:
    """Return how much better each picture is than its group, in the group's standard deviations, (P, K).

    rewards: (P, K) of K pictures of each of P prompts. A group with equal rewards teaches nothing: its advantages
    are 0. No advantage is beyond `most`.
    """
    spread = rewards.std(1, keepdim=True, correction=0)
    found = (rewards - rewards.mean(1, keepdim=True)) / spread.clamp(min=1e-6)
    return torch.where(spread > 1e-6, found, torch.zeros_like(found)).clamp(-most, most)


def nft_loss(v: Tensor, old: Tensor, points: Tensor, t: Tensor, image: Tensor, good: Tensor, beta: float) -> Tensor:
    """Return DiffusionNFT's loss of each picture, (B,).

    v: the velocity of the model that learns; old: of the model that drew `image`; both at points of times t, (B,).
    good: (B,) in [0, 1], the picture's share of a good one. The good part of the loss pulls v to the picture. The bad
    part pulls the mirror of v, seen from `old`, to it, so that v goes away from the picture.
    """
    ahead = beta * v + (1 - beta) * old
    mirrored = (1 + beta) * old - beta * v
    parts = []
    for velocity in (ahead, mirrored):
        error = to_image(points, velocity, _wide(t)) - image
        norm = error.detach().float().abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-5)
        parts.append((error.square() / norm).mean((1, 2, 3)))
    return good * parts[0] + (1 - good) * parts[1]


def sde_step(x: Tensor, v: Tensor, t: float, after: float, strength: float) -> tuple[Tensor, float]:
    """Return the mean and the standard deviation of Flow-GRPO's stochastic step from time t to `after`.

    The steps have the marginals of the deterministic ones. strength: how much noise a step adds; 0 is Euler's step.
    At t = 1 the noise of the formula is infinite: `after` stands for t in its level.
    """
    level = min(t, after) if t >= 1 else t
    s = strength * math.sqrt(level / (1 - level))
    dt = after - t
    mean = x * (1 + s * s / (2 * t) * dt) + v * (1 + s * s * (1 - t) / (2 * t)) * dt
    return mean, s * math.sqrt(-dt)


def log_probability(x: Tensor, mean: Tensor, std: float) -> Tensor:
    """Return the log-probability of a step's result, the mean over its numbers, in float32, (B,)."""
    apart = (x.float() - mean.float()) / std
    return -(0.5 * apart.square() + math.log(std) + 0.5 * math.log(2 * math.pi)).mean((1, 2, 3))


def grpo_loss(log_prob: Tensor, old: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """Return GRPO's clipped loss of each step, (B,). old: the log-probability when the picture was drawn."""
    ratio = (log_prob - old).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def dpo_loss(better: Tensor, worse: Tensor, better_before: Tensor, worse_before: Tensor, beta: float) -> Tensor:
    """Return Diffusion-DPO's loss of each pair, (B,), from the errors of the model and of the model at the start.

    Both pictures of a pair have the same time and noise.
    """
    return -F.logsigmoid(-beta * ((better - better_before) - (worse - worse_before)))


def _wide(t: Tensor) -> Tensor:
    return t.view(-1, 1, 1, 1)
