"""Ranks models by votes on pairs of pictures: strengths, intervals, ranks, agreement. Pure functions on numpy.

The model is Davidson's (1970), which is Bradley-Terry with ties. With strengths b and a tie parameter e, the odds of
"a wins", "b wins" and "tie" are exp(b_a) : exp(b_b) : exp(e + (b_a + b_b) / 2). It is a multinomial logit, whose
likelihood is concave, so Newton's method finds its maximum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Verdict = Literal["left", "right", "tie", "bad"]
"""bad: both pictures are bad. In the ranking it counts as a tie."""

RIDGE = 1e-3
"""Weight of the squared strengths. It keeps those of models that always win, or were never compared, finite."""
RESAMPLES = 500
"""Resamples of a bootstrap."""
POINTS = 400 / np.log(10)
"""Points of one unit of strength on the scale of Elo: 400 points are odds of ten to one."""
CENTRE = 1000.0
"""Points of the mean model."""
SURE = 0.95


@dataclass(frozen=True)
class Vote:
    """A verdict on two pictures of a prompt. left, right: models by number; prompt: by number."""

    prompt: int
    left: int
    right: int
    verdict: Verdict
    voter: str = ""


@dataclass(frozen=True)
class Ranking:
    """The models' strengths in points, their 95% intervals, and their ranks. better: (N, N), P(row > column).

    A model's rank is one more than the number of models whose whole interval is above its own.
    """

    points: Floats
    low: Floats
    high: Floats
    ranks: tuple[int, ...]
    better: Floats
    votes: tuple[int, ...]  # votes on each model
    ties: float  # the share of ties between equal models


# Strengths ------------------------------------------------------------------------------------------------------------


def pairs_of(models: int) -> list[tuple[int, int]]:
    return list(combinations(range(models), 2))


def count_votes(votes: Sequence[Vote], models: int, prompts: int) -> Floats:
    """Count votes. Returns (prompts, pairs, 3): the first of the pair wins, the second wins, tie or both bad."""
    place = {pair: number for number, pair in enumerate(pairs_of(models))}
    counts = np.zeros((prompts, len(place), 3))
    for vote in votes:
        first, second = sorted((vote.left, vote.right))
        wins = {"left": vote.left, "right": vote.right}.get(vote.verdict)
        counts[vote.prompt, place[first, second], 2 if wins is None else int(wins == second)] += 1
    return counts


def fit(counts: Floats, models: int, ridge: float = RIDGE) -> Floats:
    """Fit strengths. counts: (..., pairs, 3). Returns (..., models + 1): strengths of mean 0, then the tie parameter.

    Many counts are fitted at once, as those of a bootstrap's resamples.
    """
    design = _design(models)
    theta = np.zeros((*counts.shape[:-2], models + 1))
    for _ in range(50):
        gradient, curvature = _derivatives(counts, theta, design, ridge)
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        theta = theta + np.clip(step, -2, 2)  # a full step from far away may overshoot
        if np.abs(step).max(initial=0) < 1e-8:
            break
    theta[..., :-1] -= theta[..., :-1].mean(-1, keepdims=True)
    return theta


def chances(theta: Floats, models: int) -> Floats:
    """The chances of each pair's outcomes. theta: as `fit` returns it. Returns (..., pairs, 3)."""
    design = _design(models)
    logits = (theta @ design.reshape(-1, models + 1).T).reshape(*theta.shape[:-1], -1, 3)
    odds = np.exp(logits - logits.max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)


def _design(models: int) -> Floats:
    """(pairs, 3, models + 1): the logit of each outcome as a linear function of strengths and tie parameter."""
    pairs = pairs_of(models)
    design = np.zeros((len(pairs), 3, models + 1))
    for number, (first, second) in enumerate(pairs):
        design[number, 0, first] = design[number, 1, second] = design[number, 2, -1] = 1
        design[number, 2, [first, second]] = 0.5
    return design


def _derivatives(counts: Floats, theta: Floats, design: Floats, ridge: float) -> tuple[Floats, Floats]:
    """The gradient of the penalised log-likelihood, and the negative of its second derivatives."""
    chance = chances(theta, theta.shape[-1] - 1)
    total = counts.sum(-1, keepdims=True)  # (..., pairs, 1)
    expected = total * chance
    size, flat = theta.shape[-1], (*theta.shape[:-1], -1)
    gradient = (counts - expected).reshape(flat) @ design.reshape(-1, size) - ridge * theta
    mean = np.einsum("...pk,pkd->...pd", chance, design)
    squares = (design[..., None] * design[..., None, :]).reshape(-1, size * size)
    spread = expected.reshape(flat) @ squares
    centre = (total * mean).swapaxes(-1, -2) @ mean
    return gradient, spread.reshape(*spread.shape[:-1], size, size) - centre + ridge * np.eye(size)


# Ranks ----------------------------------------------------------------------------------------------------------------


def rank(
    votes: Sequence[Vote], models: int, prompts: int, resamples: int = RESAMPLES, seed: int = 0, ridge: float = RIDGE
) -> Ranking:
    """Rank models. Whole prompts are resampled, because votes on pictures of one prompt depend on each other."""
    counts = count_votes(votes, models, prompts)
    theta = fit(counts.sum(0), models, ridge)
    samples = bootstrap(counts, models, resamples, seed, ridge)
    low, high = (CENTRE + POINTS * edge for edge in np.quantile(samples, [(1 - SURE) / 2, (1 + SURE) / 2], axis=0))
    voted = [sum(number in (vote.left, vote.right) for vote in votes) for number in range(models)]
    over = samples[:, :, None] - samples[:, None, :]
    better = np.where(over > 0, 1.0, np.where(over < 0, 0.0, 0.5)).mean(0)
    share = np.exp(theta[-1]) / (2 + np.exp(theta[-1]))
    return Ranking(CENTRE + POINTS * theta[:-1], low, high, ranks_of(low, high), better, tuple(voted), float(share))


def bootstrap(counts: Floats, models: int, resamples: int, seed: int, ridge: float = RIDGE) -> Floats:
    """Strengths of resampled prompts. counts: (prompts, pairs, 3). Returns (resamples, models).

    Prompts without votes are not drawn.
    """
    asked = counts[counts.sum((1, 2)) > 0]
    if not len(asked):
        return np.zeros((resamples, models))
    drawn = np.random.default_rng(seed).multinomial(len(asked), np.full(len(asked), 1 / len(asked)), size=resamples)
    return fit(np.einsum("rn,npk->rpk", drawn.astype(float), asked), models, ridge)[:, :-1]


def ranks_of(low: Floats, high: Floats) -> tuple[int, ...]:
    """One more than the number of models whose low end is above a model's high end."""
    return tuple(1 + int((low > top).sum()) for top in high)


def bootstrap_mean(
    values: Sequence[float], prompts: Sequence[int], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """The mean of values, and its 95% interval from resampled prompts. prompts: of each value."""
    numbers, place = np.unique(np.asarray(prompts), return_inverse=True)
    sums = np.bincount(place, np.asarray(values, float), len(numbers))
    sizes = np.bincount(place, minlength=len(numbers)).astype(float)
    if len(numbers) < 2:
        mean = float(sums.sum() / sizes.sum())
        return mean, mean, mean
    share = np.full(len(numbers), 1 / len(numbers))
    drawn = np.random.default_rng(seed).multinomial(len(numbers), share, size=resamples)
    means = (drawn @ sums) / (drawn @ sizes)
    low, high = np.quantile(means, [(1 - SURE) / 2, (1 + SURE) / 2])
    return float(sums.sum() / sizes.sum()), float(low), float(high)


# What to ask next -----------------------------------------------------------------------------------------------------


def information(counts: Floats, models: int, ridge: float = 1.0) -> Floats:
    """How much a further vote on each pair tells. counts: (pairs, 3). Returns (pairs,).

    It is the variance of the difference of the strengths, times the information of one vote about it: near models that
    were seldom compared come first. The ridge is strong, because a few votes must not decide what is asked.
    """
    theta = fit(counts, models, ridge)
    _, curvature = _derivatives(counts, theta, _design(models), ridge)
    spread = np.linalg.inv(curvature)
    first, second = np.array(pairs_of(models)).T
    variance = spread[first, first] + spread[second, second] - 2 * spread[first, second]
    chance = chances(theta, models)
    side = np.array([0.5, -0.5, 0.0])
    return variance * (chance @ side**2 - (chance @ side) ** 2)


# Voters ---------------------------------------------------------------------------------------------------------------


def left_wins(votes: Sequence[Vote]) -> tuple[int, int]:
    """How many votes with a winner the left picture won, and how many have a winner. Without a bias it is half."""
    decided = [vote.verdict for vote in votes if vote.verdict in ("left", "right")]
    return decided.count("left"), len(decided)


def agreement(answers: Sequence[Sequence[str]]) -> float | None:
    """Krippendorff's alpha of answers without an order. answers: for each question, those of its voters.

    1: voters always agree; 0: as often as by chance. None if no question has two answers, or all answers are equal.
    """
    asked = [list(given) for given in answers if len(given) > 1]
    kinds = sorted({answer for given in asked for answer in given})
    if len(kinds) < 2:
        return None
    together = np.zeros((len(kinds), len(kinds)))
    for given in asked:
        counted = np.array([given.count(kind) for kind in kinds], float)
        together += (np.outer(counted, counted) - np.diag(counted)) / (len(given) - 1)
    totals = together.sum(1)
    number = totals.sum()
    apart = number - np.trace(together)
    by_chance = (number**2 - (totals**2).sum()) / (number - 1)
    return float(1 - apart / by_chance)
