"""The rule that decides where a sample stops, against a loop over samples and exits."""

from __future__ import annotations

import math
import random

import pytest
import torch

from clframe.errors import ConfigError
from clframe.exits import ExitEvaluation
from clframe.exits.decisions import ALWAYS, NEVER, decide, evaluate_thresholds, mean_cost

NAN = math.nan


def random_evaluation(exits, samples, *, seed=0, levels=None):
    generator = torch.Generator().manual_seed(1000 * exits + samples + seed)
    confidence_KN = torch.rand(exits, samples, generator=generator)
    if levels:
        confidence_KN = (confidence_KN * levels).floor()
    return ExitEvaluation(
        confidence_KN=confidence_KN,
        correct_KN=torch.rand(exits, samples, generator=generator) < 0.5,
        cost_K=[7 * (k + 1) ** 2 for k in range(exits)],
    )


def by_loops(answers, thresholds, fallback):
    stops, givers = [], []
    for column in zip(*answers.confidence_KN.tolist(), strict=True):
        sure = [k for k, threshold in enumerate(thresholds) if column[k] >= threshold]
        stops.append(sure[0] if sure else len(column) - 1)
        givers.append(stops[-1] if sure or fallback == "last" else column.index(max(column)))
    return stops, givers


@pytest.mark.parametrize("fallback", ["last", "confident"])
@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize(("exits", "samples"), [(1, 1), (1, 5), (2, 1), (3, 33), (6, 101)])
def test_against_loops(exits, samples, levels, fallback):
    answers = random_evaluation(exits, samples, levels=levels)
    source = random.Random(samples)
    thresholds = [source.choice([source.random(), float(source.randrange(3))]) for _ in range(exits - 1)]
    stops, givers = by_loops(answers, thresholds, fallback)
    decision = decide(answers, thresholds, fallback=fallback)
    assert (decision.stop_N.tolist(), decision.exit_N.tolist()) == (stops, givers)

    outcome = evaluate_thresholds(answers, thresholds, fallback=fallback)
    right = [bool(answers.correct_KN[k, n]) for n, k in enumerate(givers)]
    assert outcome.accuracy == sum(right) / samples
    assert outcome.cost == sum(answers.cost_K[k] for k in stops) / samples
    for k in range(exits):
        mine = [right[n] for n in range(samples) if givers[n] == k]
        assert outcome.share_K[k] == len(mine) / samples
        assert outcome.accuracy_K[k] == sum(mine) / len(mine) if mine else math.isnan(outcome.accuracy_K[k])
        assert outcome.stop_share_K[k] == stops.count(k) / samples


def test_always_is_the_first_exit_and_never_the_last():
    answers = random_evaluation(4, 50)
    first, last = evaluate_thresholds(answers, [ALWAYS] * 3), evaluate_thresholds(answers, [NEVER] * 3)
    assert (first.share_K, first.cost) == ((1, 0, 0, 0), 7)
    assert (last.share_K, last.cost) == ((0, 0, 0, 1), 7 * 16)
    assert evaluate_thresholds(answers, [0.0] * 3).share_K == first.share_K  # as for any probability
    assert evaluate_thresholds(answers, [1.001] * 3).share_K == last.share_K


def test_the_fallback_confident_has_the_cost_of_the_last_exit():
    answers = ExitEvaluation(confidence_KN=[[0.5, 0.9], [0.2, 0.2], [0.4, 0.4]],
                          correct_KN=[[True, True], [False, False], [False, False]], cost_K=(1, 2, 4))  # fmt: skip
    last, confident = (evaluate_thresholds(answers, [0.8, 0.8], fallback=name) for name in ("last", "confident"))
    assert (last.accuracy, last.cost) == (0.5, 2.5)
    assert (confident.accuracy, confident.cost) == (1.0, 2.5)
    assert (confident.share_K, confident.stop_share_K) == ((1, 0, 0), (0.5, 0, 0.5))


def test_equal_to_the_threshold_is_enough_also_in_single_precision():
    single_KN = torch.tensor([[0.1, 0.3, 0.7]]).expand(2, 3)
    answers = ExitEvaluation(confidence_KN=single_KN, correct_KN=torch.ones(2, 3), cost_K=(1, 2))
    threshold = float(answers.confidence_KN[0, 1])
    assert decide(answers, [threshold]).stop_N.tolist() == [1, 0, 0]
    assert (single_KN[0] >= threshold).tolist() == [False, True, True]  # the network's own comparison


def test_samples_without_a_confidence_never_stop_early():
    answers = ExitEvaluation(confidence_KN=[[NAN, 0.0], [NAN, 0.5], [NAN, 0.1]],
                          correct_KN=torch.zeros(3, 2), cost_K=(1, 2, 3))  # fmt: skip
    assert decide(answers, [ALWAYS, ALWAYS]).stop_N.tolist() == [2, 0]


@pytest.mark.parametrize("thresholds", [[], [0.5], [0.5, NAN], [0.5] * 3])
def test_one_threshold_for_each_exit_but_the_last(thresholds):
    with pytest.raises(ConfigError, match="for 3 exits; give a number for each but the last"):
        decide(random_evaluation(3, 2), thresholds)


def test_a_mean_of_whole_costs_is_exact():
    stopped_KP = torch.tensor([[1, 0, 3], [2, 0, 0], [0, 3, 0]])
    assert mean_cost(stopped_KP, (10, 40, 69_900_000)).tolist() == [30.0, 69_900_000.0, 10.0]
    assert mean_cost(torch.tensor([[0, 3], [3, 0]]), (0.7, 0.7)).tolist() == [0.7, 0.7]  # 3 * 0.7 / 3 is below 0.7
