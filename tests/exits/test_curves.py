"""The sweep over shared thresholds against the plain rule, and budget points whose thresholds come from validation."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from sampled import sampled
from scipy.stats import binomtest

from clframe.errors import ClframeError, ConfigError
from clframe.exits import ExitEvaluation
from clframe.exits.curves import (
    NO_VALIDATION,
    BudgetPoints,
    Goal,
    accuracy_cost_curve,
    budget_points,
    candidate_thresholds_P,
    shared,
    shared_threshold,
    sweep,
)
from clframe.exits.decisions import ALWAYS, NEVER, evaluate_thresholds
from clframe.records import read_record

COSTS = (20, 35, 60, 80, 102)


def random_evaluation(exits, samples, *, seed=0, levels=None):
    """Deeper exits are better, and confidence is the chance of being right."""
    generator = torch.Generator().manual_seed(seed)
    hardness_N = torch.rand(samples, generator=generator)
    skill_K1 = torch.linspace(0.4, 0.9, exits)[:, None]
    confidence_KN = torch.sigmoid(8 * (skill_K1 - hardness_N + 0.1 * torch.randn(exits, samples, generator=generator)))
    right_KN = torch.rand(exits, samples, generator=generator) < confidence_KN
    if levels:
        confidence_KN = (confidence_KN * levels).floor()
    return ExitEvaluation(confidence_KN=confidence_KN, correct_KN=right_KN, cost_K=COSTS[:exits])


@pytest.mark.parametrize(("fallback", "levels"), sampled(["last", "confident"], [None, 1, 4]))
@pytest.mark.parametrize(("exits", "samples"), [(1, 1), (1, 7), (2, 1), (2, 9), (3, 31), (5, 60)])
def test_the_sweep_is_the_plain_rule_at_every_threshold(exits, samples, levels, fallback):
    answers = random_evaluation(exits, samples, levels=levels)
    values = answers.confidence_KN.flatten()
    thresholds_P = torch.cat((torch.tensor([ALWAYS, NEVER, -1.0, 0.5]), values, values.nextafter(torch.tensor(9.0))))
    cost_P, accuracy_P = sweep(answers, thresholds_P, fallback=fallback)
    for threshold, cost, accuracy in zip(thresholds_P.tolist(), cost_P.tolist(), accuracy_P.tolist(), strict=True):
        plain = evaluate_thresholds(answers, shared(threshold, exits=exits), fallback=fallback)
        assert (plain.cost, plain.accuracy) == (cost, accuracy)


@pytest.mark.parametrize("fallback", ["last", "confident"])
def test_the_sweep_where_confidences_are_missing(fallback):
    answers = ExitEvaluation(confidence_KN=[[math.nan, 0.4, -math.inf, 0.2], [0.3, 0.1, math.nan, 0.3], [0.5] * 4],
                          correct_KN=[[1, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 0]], cost_K=(1, 2, 4))  # fmt: skip
    thresholds_P = torch.tensor([ALWAYS, 0.1, 0.2, 0.3, 0.4, 0.5, NEVER])
    cost_P, accuracy_P = sweep(answers, thresholds_P, fallback=fallback)
    for threshold, cost, accuracy in zip(thresholds_P.tolist(), cost_P.tolist(), accuracy_P.tolist(), strict=True):
        plain = evaluate_thresholds(answers, [threshold, threshold], fallback=fallback)
        assert (plain.cost, plain.accuracy) == (cost, accuracy)
    assert cost_P[0] == (2 + 1 + 4 + 1) / 4


def test_candidates_are_the_values_that_change_something():
    answers = ExitEvaluation(confidence_KN=[[0.5, 0.25, 0.5], [0.125, 0.75, 0.5], [1.0] * 3],
                          correct_KN=torch.ones(3, 3), cost_K=(1, 2, 3))  # fmt: skip
    assert candidate_thresholds_P(answers).tolist() == [ALWAYS, 0.5, 0.75, NEVER]  # 0.125 is below the earlier 0.5
    alike = ExitEvaluation(confidence_KN=torch.full((3, 4), 0.5), correct_KN=torch.ones(3, 4), cost_K=(1, 2, 3))
    assert candidate_thresholds_P(alike).tolist() == [ALWAYS, NEVER]
    single = ExitEvaluation(confidence_KN=[[0.5, 0.7]], correct_KN=torch.ones(1, 2), cost_K=(1,))
    assert candidate_thresholds_P(single).tolist() == [NEVER]


def test_cost_falls_with_the_threshold_and_informed_accuracy_rises_with_cost():
    curve = accuracy_cost_curve(random_evaluation(5, 4000), backbone_cost=100, most=None)
    assert list(curve.thresholds) == sorted(curve.thresholds)
    assert list(curve.costs) == sorted(curve.costs)
    assert (curve.costs[0], curve.costs[-1]) == (0.20, 1.02)
    assert (curve.accuracies[0], curve.accuracies[-1]) == (curve.exit_accuracies[0], curve.exit_accuracies[-1])
    # more cost, more accuracy, to sampling noise; the same samples with uninformed confidence lie below
    highest = 0.0
    for accuracy in curve.accuracies:
        assert accuracy > highest - 0.01
        highest = max(highest, accuracy)
    guessing = ExitEvaluation(confidence_KN=torch.rand(5, 4000, generator=torch.Generator().manual_seed(1)),
                           correct_KN=random_evaluation(5, 4000).correct_KN, cost_K=COSTS)  # fmt: skip
    guessed = accuracy_cost_curve(guessing, backbone_cost=100, most=None)
    for share in (0.5, 0.7, 0.8, 0.9):
        informed, uninformed = (max(a for a, c in zip(each.accuracies, each.costs, strict=True) if c <= share)
                                for each in (curve, guessed))  # fmt: skip
        assert informed > uninformed + 0.02
    assert curve.accuracies[curve.best] == max(curve.accuracies)
    assert max(curve.accuracies[: curve.best]) < curve.accuracies[curve.best]


def test_fewer_points_are_some_of_all():
    answers = random_evaluation(3, 200)
    whole = accuracy_cost_curve(answers, backbone_cost=100, most=None)
    some = accuracy_cost_curve(answers, backbone_cost=100, most=11)
    assert len(some.thresholds) == 11 < len(whole.thresholds)
    points = set(zip(whole.thresholds, whole.costs, whole.accuracies, strict=True))
    assert set(zip(some.thresholds, some.costs, some.accuracies, strict=True)) <= points
    assert (some.thresholds[0], some.thresholds[-1]) == (ALWAYS, NEVER)
    with pytest.raises(ConfigError, match="give at least 2"):
        accuracy_cost_curve(answers, backbone_cost=100, most=1)


def test_the_shared_threshold_is_the_best_of_all_tried():
    answers = random_evaluation(4, 80, seed=3)
    tried = [evaluate_thresholds(answers, shared(t, exits=4)) for t in candidate_thresholds_P(answers).tolist()]
    for budget in (20, 33.5, 50, 79.9, 80):
        threshold = shared_threshold(answers, Goal(budget=budget))
        found = evaluate_thresholds(answers, shared(threshold, exits=4))
        assert found.cost <= budget
        assert found.accuracy == max(outcome.accuracy for outcome in tried if outcome.cost <= budget)
    for accuracy in (0.3, 0.5, 0.6):
        threshold = shared_threshold(answers, Goal(accuracy=accuracy))
        found = evaluate_thresholds(answers, shared(threshold, exits=4))
        assert found.accuracy >= accuracy
        assert found.cost == min(outcome.cost for outcome in tried if outcome.accuracy >= accuracy)
    assert shared_threshold(answers, Goal(accuracy=0.999)) is None


def test_points_are_chosen_on_validation_and_evaluated_on_test():
    validation, test = random_evaluation(5, 300, seed=1), random_evaluation(5, 500, seed=2)
    found = budget_points(validation, test, backbone_cost=100, budgets=(0.10, 0.25, 0.5, 1.0))
    assert found.undefined == ""
    below, *others = found.points
    assert [point.name for point in found.points] == ["10%", "25%", "50%", "100%", "max"]
    assert below.undefined == "the first exit costs 20.0% of the backbone"
    assert math.isnan(below.accuracy)
    for point in others:
        chosen, realized = (evaluate_thresholds(data, shared(point.threshold, exits=5)) for data in (validation, test))
        assert (point.validation_cost, point.validation_accuracy) == (chosen.cost / 100, chosen.accuracy)
        assert (point.cost, point.accuracy) == (realized.cost / 100, realized.accuracy)
        assert point.undefined == ""
    for point in others[:-1]:
        assert point.validation_cost <= point.budget_share
        assert point.cost == pytest.approx(point.budget_share, rel=0.15)
        assert point.cost != point.validation_cost
    assert others[-1].validation_accuracy == max(accuracy_cost_curve(validation, backbone_cost=1, most=None).accuracies)
    # other test samples change what is realized, never what is chosen
    again = budget_points(validation, random_evaluation(5, 99, seed=7), backbone_cost=100, budgets=(0.25,)).points[0]
    assert (again.threshold, again.validation_cost) == (others[0].threshold, others[0].validation_cost)


def test_without_validation_there_are_no_points():
    found = budget_points(None, random_evaluation(2, 9), backbone_cost=30)
    assert (found.points, found.undefined) == (None, NO_VALIDATION)


def test_one_exit_has_one_point_at_its_own_cost():
    answers = ExitEvaluation(confidence_KN=[[0.5]], correct_KN=[[True]], cost_K=(30,))
    points = budget_points(answers, answers, backbone_cost=30).points
    assert [bool(point.undefined) for point in points] == [True, True, True, False, False]
    assert [(point.cost, point.accuracy) for point in points[3:]] == [(1.0, 1.0)] * 2
    curve = accuracy_cost_curve(answers, backbone_cost=30)
    assert (curve.costs, curve.accuracies, curve.thresholds) == ((1.0,), (1.0,), (NEVER,))


def test_points_have_intervals_and_the_number_of_validation_samples():
    validation, test = random_evaluation(4, 120, seed=4), random_evaluation(4, 500, seed=5)
    found = budget_points(validation, test, backbone_cost=100)
    assert (found.validation_samples, found.rule) == (120, "best")
    for point in found.points:
        assert 0 <= point.accuracy_low < point.accuracy < point.accuracy_high <= 1
        correct = round(500 * point.accuracy)
        longhand = binomtest(correct, 500).proportion_ci(0.95, method="wilson")
        assert (point.accuracy_low, point.accuracy_high) == pytest.approx((longhand.low, longhand.high), abs=1e-9)


def test_one_standard_error_stops_early_only_where_that_gains_more_than_noise():
    """Cheap thresholds win on 50 validation samples by one sample: the rule then keeps the whole network."""
    noise_NK = torch.zeros(2, 50, dtype=torch.bool)
    noise_NK[1, :46], noise_NK[0, :47] = True, True
    confidence_KN = torch.stack([torch.linspace(0.9, 0.5, 50), torch.full((50,), 0.9)])
    lucky = ExitEvaluation(confidence_KN=confidence_KN, correct_KN=noise_NK, cost_K=(20, 100))
    best, careful = (
        {point.name: point for point in budget_points(lucky, lucky, backbone_cost=100, rule=rule).points}
        for rule in ("best", "one_standard_error")
    )
    assert best["max"].threshold < NEVER and best["max"].validation_accuracy == 47 / 50
    assert careful["max"].threshold == careful["100%"].threshold == NEVER
    assert careful["50%"].validation_cost <= 0.5  # the budget itself is kept under both rules
    bad = ExitEvaluation(confidence_KN=confidence_KN, correct_KN=torch.stack([~noise_NK[0], noise_NK[0]]), cost_K=(20, 100))
    good = ExitEvaluation(confidence_KN=confidence_KN, correct_KN=torch.stack([noise_NK[0], ~noise_NK[0]]), cost_K=(20, 100))
    for data, stops in ((bad, False), (good, True)):
        point = budget_points(data, data, backbone_cost=100, rule="one_standard_error").points[-1]
        assert (point.threshold < NEVER) == stops


def test_confidences_that_are_not_finite_leave_budgets_undefined():
    lost = ExitEvaluation(confidence_KN=torch.full((2, 9), math.nan), correct_KN=torch.zeros(2, 9), cost_K=(20, 100))
    points = {point.name: point for point in budget_points(lost, lost, backbone_cost=100).points}
    assert points["50%"].undefined == "no threshold keeps it: confidences are not finite"
    assert points["100%"].cost == 1.0


def test_points_of_older_results_are_read():
    old = {"name": "50%", "asked_cost": 0.5, "threshold": 0.9, "validation_cost": 0.4, "validation_accuracy": 0.8,
           "cost": 0.45, "accuracy": 0.75, "undefined": ""}  # fmt: skip
    point = read_record(BudgetPoints, {"points": [old], "undefined": ""}).points[0]
    assert (point.budget_share, point.accuracy) == (0.5, 0.75) and math.isnan(point.accuracy_low)


def test_networks_of_different_costs_are_not_mixed():
    with pytest.raises(ClframeError, match="evaluate one network"):
        budget_points(random_evaluation(2, 9), random_evaluation(3, 9), backbone_cost=30)


def test_results_are_plain_numbers():
    answers = random_evaluation(3, 20)
    for result in (accuracy_cost_curve(answers, backbone_cost=60), budget_points(answers, answers, backbone_cost=60)):
        assert json.loads(json.dumps(dataclasses.asdict(result))).keys() == dataclasses.asdict(result).keys()


@pytest.mark.parametrize("asked", [{}, {"budget": 1.0, "accuracy": 0.5}, {"budget": math.nan}, {"accuracy": math.nan}])
def test_one_goal_at_a_time(asked):
    with pytest.raises(ConfigError, match="budget, accuracy"):
        Goal(**asked)
