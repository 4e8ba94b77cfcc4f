"""One threshold at a time, against the plain rule for every choice and an exhaustive search on a small grid."""

from __future__ import annotations

import itertools

import pytest
import torch

from clframe.exits import ExitEvaluation
from clframe.exits.budgets import choices_at, coordinate_thresholds
from clframe.exits.curves import Goal
from clframe.exits.decisions import ALWAYS, NEVER, evaluate_thresholds


def random_evaluation(exits, samples, *, seed=0, levels=None):
    generator = torch.Generator().manual_seed(seed)
    confidence_KN = torch.rand(exits, samples, generator=generator)
    if levels:
        confidence_KN = (confidence_KN * levels).floor()
    right_KN = torch.rand(exits, samples, generator=generator) < 0.3 + 0.1 * torch.arange(exits)[:, None]
    return ExitEvaluation(confidence_KN=confidence_KN, correct_KN=right_KN, cost_K=[10 * k + 7 for k in range(exits)])


@pytest.mark.parametrize("fallback", ["last", "confident"])
@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize(("exits", "samples"), [(2, 1), (3, 17), (4, 40)])
def test_every_choice_is_the_plain_rule(exits, samples, levels, fallback):
    answers = random_evaluation(exits, samples, levels=levels)
    thresholds = [0.5] * (exits - 1)
    for k in range(exits - 1):
        choices = [found.tolist() for found in choices_at(answers, thresholds, k, fallback=fallback)]
        assert choices[0] == sorted(set(choices[0]), reverse=True)
        for threshold, cost, accuracy in zip(*choices, strict=True):
            plain = evaluate_thresholds(answers, [*thresholds[:k], threshold, *thresholds[k + 1 :]], fallback=fallback)
            assert (plain.cost, plain.accuracy) == (cost, accuracy)


@pytest.mark.parametrize("seed", range(5))
def test_no_single_threshold_can_be_improved(seed):
    answers = random_evaluation(4, 60, seed=seed)
    goal = Goal(budget=25)
    found = coordinate_thresholds(answers, goal, [ALWAYS] * 3)
    reached = evaluate_thresholds(answers, found)
    assert reached.cost <= 25
    for k in range(3):
        for value in [ALWAYS, NEVER, *answers.confidence_KN[k].tolist()]:
            other = evaluate_thresholds(answers, [*found[:k], value, *found[k + 1 :]])
            assert other.cost > 25 or (other.accuracy, -other.cost) <= (reached.accuracy, -reached.cost)


def test_never_better_than_an_exhaustive_search_and_mostly_as_good():
    gaps = []
    for seed in range(10):
        answers = random_evaluation(3, 12, seed=seed, levels=6)
        grid = [ALWAYS, *range(1, 6), NEVER]
        within = [evaluate_thresholds(answers, pair) for pair in itertools.product(grid, grid)]
        best = max(outcome.accuracy for outcome in within if outcome.cost <= 15)
        found = evaluate_thresholds(answers, coordinate_thresholds(answers, Goal(budget=15), [ALWAYS] * 2))
        gaps.append(best - found.accuracy)
    assert min(gaps) >= 0
    assert sum(gap == 0 for gap in gaps) >= 5


def test_it_is_bounded():
    answers = random_evaluation(4, 60)
    assert coordinate_thresholds(answers, Goal(budget=25), [ALWAYS] * 3, rounds=0) == (ALWAYS,) * 3


def test_samples_that_cannot_stop_reach_the_last_exit():
    answers = ExitEvaluation(confidence_KN=[[float("nan"), 0.5], [1.0, 1.0]], correct_KN=[[1, 1], [0, 0]], cost_K=(1, 5))
    thresholds_P, cost_P, accuracy_P = choices_at(answers, [NEVER], 0)
    assert (thresholds_P.tolist(), cost_P.tolist(), accuracy_P.tolist()) == ([NEVER, 0.5], [5, 3], [0, 0.5])
