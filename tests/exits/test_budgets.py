"""The budget solver's laws: what was asked is kept on the validation samples, and more freedom is never worse."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from sampled import sampled

from clframe.errors import ConfigError
from clframe.exits import ExitEvaluation
from clframe.exits.budgets import quantile_thresholds, shares_K, solve
from clframe.exits.clearance import CLEARANCE
from clframe.exits.decisions import ALWAYS, NEVER, evaluate_thresholds

METHODS = ("shared", "quantiles", "coordinate")
COSTS = (20, 35, 60, 80, 102)


def informed(exits, samples, *, seed=0, levels=None, costs=COSTS):
    """Deeper exits are better, and confidence is the chance of being right."""
    generator = torch.Generator().manual_seed(seed)
    hardness_N = torch.rand(samples, generator=generator)
    skill_K1 = torch.linspace(0.4, 0.9, exits)[:, None]
    confidence_KN = torch.sigmoid(8 * (skill_K1 - hardness_N + 0.1 * torch.randn(exits, samples, generator=generator)))
    right_KN = torch.rand(exits, samples, generator=generator) < confidence_KN
    if levels:
        confidence_KN = (confidence_KN * levels).floor()
    return ExitEvaluation(confidence_KN=confidence_KN, correct_KN=right_KN, cost_K=costs[:exits])


def budgets_of(answers, count=4):
    low, high = answers.cost_K[0], answers.cost_K[-1]
    return [low + (high - low) * n / (count - 1) for n in range(count)]


@pytest.mark.parametrize(("method", "fallback"), sampled(METHODS, ["last", "confident"]))
@pytest.mark.parametrize("levels", [None, 1, 3], ids=["distinct", "equal", "ties"])
@pytest.mark.parametrize(("exits", "samples"), [(1, 1), (2, 1), (4, 1), (3, 7), (5, 64)])
def test_a_budget_is_never_exceeded_on_the_validation_samples(exits, samples, levels, fallback, method):
    answers = informed(exits, samples, levels=levels, seed=samples)
    for budget in budgets_of(answers):
        solution = solve(answers, method=method, budget=budget, fallback=fallback)
        assert solution.validation.cost <= budget
        assert solution.validation == evaluate_thresholds(answers, solution.thresholds, fallback=fallback)
        assert (solution.method, solution.budget, solution.target_accuracy) == (method, budget, None)


@pytest.mark.parametrize("method", METHODS)
def test_a_budget_in_fractions_is_kept_as_well(method):
    answers = informed(5, 33, costs=(0.1, 0.3, 0.7, 0.9, 1.1))
    for budget in (0.1, 0.30000000000000004, 1 / 3, 0.7, 1.1):
        assert solve(answers, method=method, budget=budget).validation.cost <= budget


@pytest.mark.parametrize("method", METHODS)
def test_the_first_exits_own_cost_is_budget_enough(method):
    answers = informed(4, 50)
    solution = solve(answers, method=method, budget=20)
    assert solution.thresholds[0] == ALWAYS
    assert solution.validation.share_K == (1, 0, 0, 0)
    assert evaluate_thresholds(informed(4, 500, seed=9), solution.thresholds).cost == 20  # also where confidence is lower


@pytest.mark.parametrize("method", METHODS)
def test_less_than_the_first_exit_costs_is_refused_with_the_cheapest(method):
    with pytest.raises(ConfigError, match=r"^budget: found 19\.5, less than the first exit costs; give at least 20$"):
        solve(informed(4, 50), method=method, budget=19.5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("exits", [1, 2, 5])
def test_an_infinite_budget_is_the_full_model(exits, method):
    answers = informed(exits, 30)
    solution = solve(answers, method=method, budget=math.inf)
    assert solution.thresholds == (NEVER,) * (exits - 1)
    assert all(threshold > 1 for threshold in solution.thresholds)
    assert solution.validation.cost == answers.cost_K[-1]
    assert solution.validation.accuracy == float(answers.correct_KN[-1].double().mean())


@pytest.mark.parametrize("method", METHODS)
def test_more_budget_is_more_accuracy_where_confidence_informs(method):
    answers = informed(5, 2000)
    found = [solve(answers, method=method, budget=budget).validation for budget in budgets_of(answers)]
    accuracies = [outcome.accuracy for outcome in found]
    if method == "quantiles":  # spends what it is given, whether it helps or not
        assert all(b > a - 0.01 for a, b in itertools.pairwise(accuracies))
        assert [outcome.cost for outcome in found] == pytest.approx(budgets_of(answers), rel=0.01)
    elif method == "shared":
        assert accuracies == sorted(accuracies)
    assert accuracies[-1] > accuracies[0] + 0.2


@pytest.mark.parametrize("method", METHODS)
def test_a_target_is_reached_and_dearer_targets_cost_more(method):
    answers = informed(5, 400)
    targets = (0.4, 0.6, 0.65)
    found = [solve(answers, method=method, accuracy=target) for target in targets]
    assert all(s.validation.accuracy >= target for s, target in zip(found, targets, strict=True))
    costs = [solution.validation.cost for solution in found]
    assert costs == sorted(costs) or method == "coordinate"
    assert costs[0] < costs[-1] <= 102
    assert found[0].target_accuracy == 0.4


@pytest.mark.parametrize("method", METHODS)
def test_a_target_out_of_reach_is_refused_with_the_highest(method):
    answers = informed(4, 200)
    with pytest.raises(ConfigError, match=rf"accuracy: method '{method}' does not reach 0.999.*use at most") as e:
        solve(answers, method=method, accuracy=0.999)
    highest = float(str(e.value).split()[-1])
    assert solve(answers, method=method, accuracy=highest - 1e-6).validation.accuracy >= highest - 1e-6


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("fallback", "levels"), sampled(["last", "confident"], [None, 4]))
def test_one_threshold_per_exit_is_at_least_as_good_as_one_for_all(fallback, levels, seed):
    answers = informed(5, 83, seed=seed, levels=levels)
    for budget in budgets_of(answers):
        shared, free = (solve(answers, method=m, budget=budget, fallback=fallback).validation
                        for m in ("shared", "coordinate"))  # fmt: skip
        assert (free.accuracy, -free.cost) >= (shared.accuracy, -shared.cost)
    for accuracy in (0.3, 0.5):
        shared, free = (solve(answers, method=m, accuracy=accuracy, fallback=fallback).validation
                        for m in ("shared", "coordinate"))  # fmt: skip
        assert (-free.cost, free.accuracy) >= (-shared.cost, shared.accuracy)


def test_thresholds_per_exit_reach_a_target_that_no_shared_one_does():
    # sample 0 is right only at the first exit, with 0.2; sample 1 only at the last, though the second is sure at 0.3
    answers = ExitEvaluation(confidence_KN=[[0.2, 0.1], [0.1, 0.3], [1.0, 1.0]],
                          correct_KN=[[1, 0], [0, 0], [0, 1]], cost_K=(1, 2, 3))  # fmt: skip
    with pytest.raises(ConfigError, match="use at most 0.5"):
        solve(answers, accuracy=1.0)
    solution = solve(answers, method="coordinate", accuracy=1.0)
    assert (solution.validation.accuracy, solution.validation.cost) == (1.0, 2.0)
    assert solution.thresholds == (pytest.approx(0.2 - CLEARANCE, abs=1e-8), NEVER)


def test_shares_are_geometric():
    assert shares_K(0.0, exits=4) == (0.25,) * 4
    shares = shares_K(math.log(3), exits=3)
    assert shares == pytest.approx([1 / 13, 3 / 13, 9 / 13], abs=1e-15)
    assert shares_K(50.0, exits=3)[-1] == shares_K(-50.0, exits=3)[0] == 1.0
    assert shares_K(2.0, exits=1) == (1.0,)


def test_quantiles_by_hand():
    confidence_KN = [[0.9, 0.1, 0.5, 0.8, 0.2, 0.3], [0.1, 0.2, 0.9, 0.8, 0.7, 0.3], [1.0] * 6]
    answers = ExitEvaluation(confidence_KN=confidence_KN, correct_KN=torch.ones(3, 6), cost_K=(1, 2, 3))
    assert quantile_thresholds(answers, 0.0) == (0.8, 0.7)  # a third each: 0.9 and 0.8, then of the rest 0.9 and 0.7
    assert evaluate_thresholds(answers, (0.8, 0.7)).share_K == (1 / 3, 1 / 3, 1 / 3)
    # shares 1/7, 2/7, 4/7 of six: rounded up to one, and three by the second exit
    assert quantile_thresholds(answers, math.log(2)) == (0.9, 0.8)


@pytest.mark.parametrize("log_q", [-50.0, -1.3, -0.2, 0.0, 0.4, 2.0, 50.0])
@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize("samples", [1, 10, 997])
def test_quantiles_keep_the_shares_and_their_cost(samples, levels, log_q):
    answers = informed(5, samples, levels=levels)
    outcome = evaluate_thresholds(answers, quantile_thresholds(answers, log_q))
    shares = shares_K(log_q, exits=5)
    assert outcome.cost <= math.fsum(s * c for s, c in zip(shares, COSTS, strict=True)) + 1e-6
    if levels is None:
        assert outcome.share_K == pytest.approx(shares, abs=1 / samples)


def test_the_quantiles_of_a_budget_have_the_q_of_the_equation():
    answers = informed(4, 5000)
    solution = solve(answers, method="quantiles", budget=45)
    ratios = [b / a for a, b in itertools.pairwise(solution.validation.share_K)]
    assert ratios == pytest.approx([ratios[0]] * 3, rel=0.01)  # shares are geometric
    assert solution.validation.cost == pytest.approx(45, abs=0.05)


def test_the_same_samples_give_the_same_solution():
    for method in METHODS:
        assert solve(informed(5, 99), method=method, budget=50) == solve(informed(5, 99), method=method, budget=50)


def test_confidences_that_are_not_finite_keep_no_budget_and_say_so():
    """A diverged network has NaN logits: its samples never stop early, so they cost the whole network."""
    lost = ExitEvaluation(confidence_KN=torch.full((3, 8), math.nan), correct_KN=torch.zeros(3, 8), cost_K=(1, 2, 4))
    for method in METHODS:
        with pytest.raises(ConfigError, match=r"^budget: no thresholds keep 2 on the validation samples, whose confid"):
            solve(lost, method=method, budget=2)


def test_one_standard_error_is_for_a_shared_threshold_within_a_budget():
    answers = informed(3, 400)
    careful, best = (solve(answers, budget=50, rule=rule) for rule in ("one_standard_error", "best"))
    assert careful.validation.cost <= 50
    error = math.sqrt(best.validation.accuracy * (1 - best.validation.accuracy) / 400)
    assert best.validation.accuracy - error <= careful.validation.accuracy <= best.validation.accuracy
    assert careful.thresholds[0] >= best.thresholds[0]
    for wrong in ({"method": "coordinate", "budget": 50}, {"accuracy": 0.3}):
        with pytest.raises(ConfigError, match=r"^rule: found 'one_standard_error' with method"):
            solve(answers, rule="one_standard_error", **wrong)
    with pytest.raises(ConfigError, match=r"^rule: found 'two'; give 'best' or 'one_standard_error'"):
        solve(answers, rule="two", budget=50)


@pytest.mark.parametrize("asked", [{}, {"budget": 50, "accuracy": 0.5}, {"budget": math.nan}])
def test_one_of_budget_and_accuracy(asked):
    with pytest.raises(ConfigError, match="budget, accuracy"):
        solve(informed(2, 5), **asked)


def test_an_unknown_method():
    with pytest.raises(ConfigError, match="method: found 'best'; give one of shared, quantiles, coordinate"):
        solve(informed(2, 5), method="best", budget=30)
