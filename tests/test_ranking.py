"""Ranking by votes: known strengths come back, intervals hold what they promise, biases and agreement are told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from inkstream.evaluate import ranking
from inkstream.evaluate.ranking import CENTRE, POINTS, Vote, agreement, fit, information, left_wins, pairs_of, rank

STRENGTHS = np.array([0.9, 0.3, -0.2, -1.0])
TIES = -0.5
MODELS = len(STRENGTHS)


def simulate(prompts: int, seed: int, votes: int = 6, wobble: float = 0.0, repeats: int = 1) -> np.ndarray:
    """Counts (repeats, prompts, pairs, 3) of votes on random pairs. wobble: how much strengths differ by prompt."""
    generator = np.random.default_rng(seed)
    theta = np.zeros((repeats, prompts, MODELS + 1))
    theta[..., :-1] = STRENGTHS + generator.normal(0, wobble, (repeats, prompts, MODELS))
    theta[..., -1] = TIES
    chance = ranking.chances(theta, MODELS)
    asked = generator.multinomial(votes, [1 / 6] * 6, size=(repeats, prompts))
    return generator.multinomial(asked, chance).astype(float)


def as_votes(counts: np.ndarray, seed: int = 0) -> list[Vote]:
    """The counts (prompts, pairs, 3) as votes, with sides by chance."""
    generator = np.random.default_rng(seed)
    votes = []
    for prompt, of_prompt in enumerate(counts):
        for (a, b), outcomes in zip(pairs_of(MODELS), of_prompt):
            for outcome, number in enumerate(outcomes):
                for _ in range(int(number)):
                    swapped = generator.random() < 0.5
                    left, right = (b, a) if swapped else (a, b)
                    won = "tie" if outcome == 2 else "left" if (outcome == 1) == swapped else "right"
                    votes.append(Vote(prompt, left, right, won))
    return votes


def test_known_strengths_are_recovered_from_many_votes():
    theta = fit(simulate(4000, seed=1)[0].sum(0), MODELS)
    assert theta[:-1] == pytest.approx(STRENGTHS - STRENGTHS.mean(), abs=0.04)
    assert theta[-1] == pytest.approx(TIES, abs=0.04)


def test_two_models_without_ties_have_the_odds_of_their_votes():
    theta = fit(np.array([[30.0, 10.0, 0.0]]), 2, ridge=1e-9)
    assert theta[0] - theta[1] == pytest.approx(np.log(3), abs=1e-3)


def test_ties_pull_models_together_and_are_a_share_of_their_own():
    few, many = (fit(np.array([[30.0, 10.0, ties]]), 2) for ties in (2.0, 40.0))
    assert few[0] - few[1] == pytest.approx(many[0] - many[1], abs=0.02)  # Davidson: ties do not move the odds
    assert ranking.chances(many, 2)[0] == pytest.approx([30 / 80, 10 / 80, 0.5], abs=0.01)


def test_a_model_that_always_wins_and_one_without_votes_stay_finite():
    votes = [Vote(0, 0, 1, "left")] * 40
    found = rank(votes, 3, 1)
    assert np.isfinite(found.points).all()
    assert found.points[0] > found.points[2] > found.points[1]
    assert found.votes == (40, 40, 0)


@pytest.mark.slow
def test_intervals_of_95_percent_hold_the_truth_95_percent_of_the_time_only_if_whole_prompts_are_resampled():
    """Strengths differ by prompt, so votes on one prompt depend on each other."""
    differing: dict[str, Any] = {"votes": 12, "wobble": 1.5}
    truth = fit(simulate(60_000, seed=2, **differing)[0].sum(0), MODELS)[:-1]
    generator, held = np.random.default_rng(4), {"prompts": [], "votes": []}
    for number, counts in enumerate(simulate(60, seed=3, repeats=120, **differing)):
        whole = counts.sum(0).reshape(-1)
        again = generator.multinomial(int(whole.sum()), whole / whole.sum(), size=200).reshape(200, 6, 3)
        samples = {
            "prompts": ranking.bootstrap(counts, MODELS, 200, seed=number),
            "votes": fit(again.astype(float), MODELS)[:, :-1],
        }
        for unit, found in samples.items():
            low, high = np.quantile(found, [0.025, 0.975], axis=0)
            held[unit].append((low <= truth) & (truth <= high))
    assert 0.92 <= np.mean(held["prompts"]) <= 0.98
    assert np.mean(held["votes"]) < 0.85


def test_ranks_count_the_models_that_are_surely_better():
    low, high = np.array([10.0, 8.0, 1.0, 2.0]), np.array([12.0, 11.0, 3.0, 9.0])
    assert ranking.ranks_of(low, high) == (1, 1, 3, 2)


def test_a_ranking_of_votes_orders_the_models_and_says_how_sure_it_is():
    found = rank(as_votes(simulate(150, seed=4)[0]), MODELS, 150)
    assert list(np.argsort(-found.points)) == [0, 1, 2, 3]
    assert found.points.mean() == pytest.approx(CENTRE)
    assert (found.low < found.points).all()
    assert (found.points < found.high).all()
    assert found.better[0, 3] == 1
    assert found.better + found.better.T == pytest.approx(1)
    assert found.ranks[0] == 1
    assert found.ranks[3] == 4
    assert found.ties == pytest.approx(np.exp(TIES) / (2 + np.exp(TIES)), abs=0.05)
    assert found.points[0] - found.points[3] == pytest.approx(POINTS * 1.9, abs=120)


def test_both_bad_counts_as_a_tie():
    counts = ranking.count_votes([Vote(0, 1, 0, "left"), Vote(0, 0, 1, "bad"), Vote(1, 0, 1, "tie")], 2, 2)
    assert counts.tolist() == [[[0, 1, 1]], [[0, 0, 1]]]


def test_near_models_that_were_seldom_compared_tell_most():
    even = np.zeros((6, 3))
    assert information(even, MODELS) == pytest.approx(information(even, MODELS)[0])
    often = even.copy()
    often[0] = 30
    assert information(often, MODELS)[0] == information(often, MODELS).min()
    clear = np.full((6, 3), 5.0)
    clear[pairs_of(MODELS).index((0, 3))] = [60, 0, 0]
    found = dict(zip(pairs_of(MODELS), information(clear, MODELS)))
    assert found[1, 2] > found[0, 3]


def test_choosing_by_information_finds_the_strengths_with_fewer_votes_than_chance():
    """Of models of which two are close and two are far off, the close pair is asked about more often."""
    generator = np.random.default_rng(5)
    theta = np.array([2.0, 1.8, -2.0, -1.8, TIES])
    counts = np.zeros((6, 3))
    for _ in range(150):
        pair = int(np.argmax(information(counts, MODELS)))
        counts[pair, generator.choice(3, p=ranking.chances(theta, MODELS)[pair])] += 1
    asked = dict(zip(pairs_of(MODELS), counts.sum(1)))
    assert min(asked[0, 1], asked[2, 3]) > 1.3 * max(asked[0, 2], asked[0, 3], asked[1, 2], asked[1, 3])


def test_the_side_that_wins_is_counted():
    votes = [Vote(0, 0, 1, "left"), Vote(0, 1, 0, "left"), Vote(0, 0, 1, "right"), Vote(0, 0, 1, "tie")]
    assert left_wins(votes) == (2, 3)


def test_agreement_is_krippendorffs_alpha():
    # Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability", example C: alpha of nominal data is 0.743
    rows = ["1 2 3 3 2 1 4 1 2 * * *", "1 2 3 3 2 2 4 1 2 5 * 3", "* 3 3 3 2 3 4 2 2 5 1 *", "1 2 3 3 2 4 4 1 2 5 1 *"]
    units = list(zip(*(row.split() for row in rows)))
    assert agreement([[a for a in unit if a != "*"] for unit in units]) == pytest.approx(0.743, abs=5e-4)
    assert agreement([["left", "left"], ["right", "right"]]) == 1
    assert agreement([["left"], ["right"]]) is None
    assert agreement([["left", "left"]]) is None


def test_a_mean_has_the_interval_of_resampled_prompts():
    values = [0.0] * 50 + [1.0] * 50
    mean, low, high = ranking.bootstrap_mean(values, list(range(100)))
    assert mean == 0.5
    assert (low, high) == (pytest.approx(0.4, abs=0.03), pytest.approx(0.6, abs=0.03))
    _, wide_low, wide_high = ranking.bootstrap_mean(values, [number // 10 for number in range(100)])
    assert wide_high - wide_low > 2 * (high - low)
    assert ranking.bootstrap_mean([2.0, 4.0], [0, 0]) == (3, 3, 3)
