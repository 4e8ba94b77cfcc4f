"""Thresholds for a budget of MACs or a target accuracy, chosen on validation data.

Shape suffixes: K exits, N samples, P points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clframe.errors import ConfigError
from clframe.exits.clearance import clear_thresholds
from clframe.exits.curves import BudgetRule, Goal, shared, shared_threshold
from clframe.exits.decisions import ALWAYS, NEVER, ExitEvaluation, Outcome, decide, evaluate_thresholds, mean_cost
from clframe.exits.policies import Fallback

ROUNDS = 20
"""Largest number of passes over all exits; the search usually needs a few."""


def coordinate_thresholds(
    evaluation: ExitEvaluation, goal: Goal, start: Sequence[float], *, fallback: Fallback = "last", rounds: int = ROUNDS
) -> tuple[float, ...]:
    """Coordinate search from ``start``: the best threshold of each exit with the others fixed, until nothing improves.

    Every value that makes a difference is tried at each exit and used only where it is strictly better for ``goal``,
    so the result is deterministic and never worse than ``start``, which must satisfy the goal. It is a local optimum:
    no single threshold can be improved.
    """
    thresholds = [float(threshold) for threshold in start]
    for _ in range(rounds):
        before = list(thresholds)
        for k in range(evaluation.exits - 1):
            thresholds[k] = _best_at(evaluation, goal, thresholds, k, fallback)
        if thresholds == before:
            break
    return tuple(thresholds)


def choices_at(
    evaluation: ExitEvaluation, thresholds: Sequence[float], exit: int, *, fallback: Fallback = "last"
) -> tuple[Tensor, Tensor, Tensor]:
    """``(thresholds_P, cost_P, accuracy_P)`` of every threshold of one exit, the others fixed.

    Thresholds fall from :data:`NEVER` to the lowest confidence, so that each stops a few more of the samples that
    reach the exit: their cost and correctness at later exits are replaced by those at this one.
    """
    closed = [NEVER if k == exit else threshold for k, threshold in enumerate(thresholds)]
    others = decide(evaluation, closed, fallback=fallback)
    stops_KN = others.stop_N == torch.arange(evaluation.exits)[:, None]
    right_N = evaluation.correct_at(others.exit_N).long()
    confidence_N = evaluation.confidence_KN[exit]
    arriving_M = ((others.stop_N > exit) & (confidence_N > ALWAYS)).nonzero()[:, 0]
    ordered_M, order_M = confidence_N[arriving_M].sort(descending=True, stable=True)
    arriving_M = arriving_M[order_M]

    last_of_equals_M = torch.ones(len(ordered_M), dtype=torch.bool)
    last_of_equals_M[:-1] = ordered_M[:-1] != ordered_M[1:]
    leaving_P = torch.cat((torch.zeros(1, dtype=torch.int64), last_of_equals_M.nonzero()[:, 0] + 1))
    thresholds_P = torch.cat((torch.tensor([NEVER], dtype=torch.float64), ordered_M[last_of_equals_M]))

    stopped_KP = stops_KN.sum(dim=1)[:, None] - _sums_up_to(stops_KN[:, arriving_M])[:, leaving_P]
    stopped_KP[exit] += leaving_P
    gain_M = evaluation.correct_KN[exit, arriving_M].long() - right_N[arriving_M]
    right_P = right_N.sum() + _sums_up_to(gain_M[None])[0, leaving_P]
    return thresholds_P, mean_cost(stopped_KP, evaluation.cost_K), right_P.double() / evaluation.samples


def _best_at(evaluation: ExitEvaluation, goal: Goal, thresholds: list[float], exit: int, fallback: Fallback) -> float:
    current = thresholds[exit]
    thresholds_P, cost_P, accuracy_P = choices_at(evaluation, thresholds, exit, fallback=fallback)
    best = goal.best(cost_P, accuracy_P)
    now = int((thresholds_P >= current).sum()) - 1  # stops the same samples as the current threshold
    if best is None or (accuracy_P[best], cost_P[best]) == (accuracy_P[now], cost_P[now]):
        return current
    # All samples that reach the exit stop: none indicates where below its confidence a threshold should be.
    return ALWAYS if best > 0 and best == len(thresholds_P) - 1 else float(thresholds_P[best])


def _sums_up_to(values_KM: Tensor) -> Tensor:
    """Sums of the first 0, 1, ..., M values of each row."""
    zero_K1 = torch.zeros(len(values_KM), 1, dtype=torch.int64)
    return torch.cat((zero_K1, values_KM.long().cumsum(dim=1)), dim=1)


Method = Literal["shared", "quantiles", "coordinate"]
Thresholds = tuple[float, ...]
"""One for each exit but the last."""

STEEPEST = 50.0
"""Largest ``|log q|``: the share of the first or last exit is then 1 in double precision."""

BISECTIONS = 30
"""Steps of the search for log q, to 1e-7: finer than the share of one sample in a million."""

ROUNDING = 1e-9
"""Tolerance in samples when a sum of shares is rounded up."""

TARGET_GRID = (*(step / 10 for step in range(-60, 61)),)
"""Values of log q tried for a target accuracy, -6 to 6; the sweep of MSDNet is from -3.0 to 0.67."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """Thresholds with the goal they were solved for and their outcome on the validation samples."""

    method: Method
    budget: float | None
    """Mean MACs per sample, or None for a target accuracy."""
    target_accuracy: float | None
    """Accuracy, or None for a budget."""
    thresholds: Thresholds
    """One for each exit but the last."""
    validation: Outcome


def solve(
    validation: ExitEvaluation,
    *,
    method: Method = "shared",
    budget: float | None = None,
    accuracy: float | None = None,
    fallback: Fallback = "last",
    rule: BudgetRule = "best",
) -> Solution:
    """Thresholds for a mean cost of at most ``budget`` MACs per sample, or an accuracy of at least ``accuracy``.

    Within a budget the method searches the most accurate thresholds (``quantiles`` spends the budget instead, as the
    MSDNet protocol does), for a target accuracy the cheapest. With an infinite budget no sample stops early. Every
    head passed is counted, also of an exit whose threshold is ``NEVER``. Thresholds are between the confidences of two
    samples, see :func:`~clframe.exits.clearance.clear_threshold`.

    Raises:
        ConfigError: A budget below the first exit's cost or that no thresholds keep, an accuracy that the method does
            not reach, both or neither given, an unknown method, or a ``rule`` that the method does not support.

    >>> validation = ExitEvaluation(confidence_KN=torch.tensor([[0.9, 0.4], [0.8, 0.7]]),
    ...                          correct_KN=torch.tensor([[True, False], [True, True]]), cost_K=(10, 40))
    >>> solution = solve(validation, budget=25)
    >>> round(solution.thresholds[0], 3), solution.validation.cost, solution.validation.accuracy
    (0.9, 25.0, 1.0)
    """
    goal = Goal(budget=budget, accuracy=accuracy, rule=rule)
    goal.check(validation)
    if method not in _METHODS:
        raise ConfigError(f"method: found '{method}'; give one of {', '.join(_METHODS)}")
    if rule != "best" and (method != "shared" or budget is None):
        raise ConfigError(f"rule: found '{rule}' with method '{method}'; use it with method 'shared' and a budget")
    if budget == math.inf or validation.exits == 1:
        thresholds: Thresholds | None = shared(NEVER, exits=validation.exits)
    else:
        thresholds = _METHODS[method](validation, goal, fallback)
        if thresholds is not None and method != "shared":  # a shared one remains one number
            thresholds = clear_thresholds(validation, thresholds)
    outcome = None if thresholds is None else evaluate_thresholds(validation, thresholds, fallback=fallback)
    if budget is not None and (outcome is None or outcome.cost > budget):
        raise ConfigError(
            f"budget: no thresholds keep {budget:g} on the validation samples, whose confidences are not all finite; "
            f"check that training has not diverged"
        )
    if outcome is None or (accuracy is not None and outcome.accuracy < accuracy):
        most_accurate = _most_accurate(method, validation, fallback)
        highest = evaluate_thresholds(validation, most_accurate, fallback=fallback).accuracy
        raise ConfigError(
            f"accuracy: method '{method}' does not reach {accuracy:g} on the validation samples; "
            f"use at most {highest:g}"
        )
    return Solution(method=method, budget=budget, target_accuracy=accuracy,
                    thresholds=outcome.thresholds, validation=outcome)  # fmt: skip


def shares_K(log_q: float, *, exits: int) -> tuple[float, ...]:
    """Share of the samples that each exit predicts: ``q^k / sum_j q^j``.

    Source: Huang et al., "Multi-Scale Dense Networks for Resource Efficient Image Classification" (2018).

    >>> shares_K(math.log(2), exits=3)
    (0.142..., 0.285..., 0.571...)
    """
    return tuple(torch.softmax(log_q * torch.arange(exits, dtype=torch.float64), dim=0).tolist())


def quantile_thresholds(validation: ExitEvaluation, log_q: float) -> Thresholds:
    """Thresholds under which exit k predicts at least its share of the validation samples, the most confident first.

    By exit k at least ``N (s_0 + ... + s_k)`` samples have stopped, rounded up, with s from :func:`shares_K`, so the
    cost is at most ``sum_k s_k cost_k``. Samples of equal confidence stop together. (The authors' code rounds the
    share of each exit down instead, which exceeds the budget.)
    """
    samples, stopped = validation.samples, 0.0
    remaining_N = torch.ones(samples, dtype=torch.bool)
    thresholds: list[float] = []
    for k, share in enumerate(shares_K(log_q, exits=validation.exits)[:-1]):
        stopped += share
        ordered = validation.confidence_KN[k][remaining_N].sort(descending=True).values
        needed = math.ceil(samples * stopped - ROUNDING) - (samples - len(ordered))
        if needed <= 0:
            thresholds.append(NEVER)
            continue
        thresholds.append(ALWAYS if needed >= len(ordered) else float(ordered[needed - 1]))
        remaining_N &= validation.confidence_KN[k] < thresholds[-1]
        if thresholds[-1] == ALWAYS:
            remaining_N &= validation.confidence_KN[k] == ALWAYS  # samples without a confidence never stop
    return tuple(thresholds)


def _solve_shared(validation: ExitEvaluation, goal: Goal, fallback: Fallback) -> Thresholds | None:
    threshold = shared_threshold(validation, goal, fallback=fallback)
    return None if threshold is None else shared(threshold, exits=validation.exits)


def _solve_quantiles(validation: ExitEvaluation, goal: Goal, fallback: Fallback) -> Thresholds | None:
    if goal.budget is not None:
        if goal.budget >= validation.cost_K[-1]:
            return shared(NEVER, exits=validation.exits)
        return _quantiles_within(validation, goal.budget)
    return _best(validation, goal, fallback, _quantile_choices(validation))


def _solve_coordinate(validation: ExitEvaluation, goal: Goal, fallback: Fallback) -> Thresholds | None:
    """The best result of coordinate searches from the other methods' solutions and from the full model."""
    starts = [_solve_shared(validation, goal, fallback), _solve_quantiles(validation, goal, fallback),
              _best(validation, goal, fallback, [shared(NEVER, exits=validation.exits)])]  # fmt: skip
    if starts == [None] * 3:  # a target that none of them reaches; the most accurate thresholds per exit may
        most_accurate = _most_accurate("coordinate", validation, fallback)
        starts = [_best(validation, goal, fallback, [most_accurate])]
    ends = [coordinate_thresholds(validation, goal, start, fallback=fallback) for start in starts if start is not None]
    return _best(validation, goal, fallback, ends)


def _best(
    validation: ExitEvaluation, goal: Goal, fallback: Fallback, choices: Sequence[Thresholds]
) -> Thresholds | None:
    """The choice that is best for the goal, the first of equals; None where none satisfies it."""
    outcomes = [evaluate_thresholds(validation, thresholds, fallback=fallback) for thresholds in choices]
    cost_P = torch.tensor([outcome.cost for outcome in outcomes], dtype=torch.float64)
    accuracy_P = torch.tensor([outcome.accuracy for outcome in outcomes], dtype=torch.float64)
    index = goal.best(cost_P, accuracy_P)
    return None if index is None else choices[index]


def _quantiles_within(validation: ExitEvaluation, budget: float) -> Thresholds:
    """Quantile thresholds of the largest q, found by bisection, that keep the budget on these samples."""
    low, high = -STEEPEST, STEEPEST
    within = shared(ALWAYS, exits=validation.exits)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        thresholds = quantile_thresholds(validation, middle)
        if evaluate_thresholds(validation, thresholds).cost <= budget:
            low, within = middle, thresholds
        else:
            high = middle
    return within


def _quantile_choices(validation: ExitEvaluation) -> list[Thresholds]:
    grid = [quantile_thresholds(validation, log_q) for log_q in TARGET_GRID]
    return [shared(ALWAYS, exits=validation.exits), *grid, shared(NEVER, exits=validation.exits)]


def _most_accurate(method: Method, validation: ExitEvaluation, fallback: Fallback) -> Thresholds:
    """The most accurate thresholds that a method finds at any cost."""
    if method == "quantiles":
        choices = _quantile_choices(validation)
        outcomes = [evaluate_thresholds(validation, choice, fallback=fallback) for choice in choices]
        return max(outcomes, key=lambda outcome: outcome.accuracy).thresholds
    found = _METHODS[method](validation, Goal(budget=validation.cost_K[-1]), fallback)
    assert found is not None  # the full model's cost admits every threshold
    return found


_METHODS: dict[Method, Callable[[ExitEvaluation, Goal, Fallback], Thresholds | None]] = {
    "shared": _solve_shared,
    "quantiles": _solve_quantiles,
    "coordinate": _solve_coordinate,
}
