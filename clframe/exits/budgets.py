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

from clframe.errors import ClframeError, ConfigError
from clframe.exits.curves import Goal, shared, shared_threshold
from clframe.exits.decisions import ALWAYS, NEVER, ExitAnswers, Fallback, Outcome, decide, mean_cost, who_answers

ROUNDS = 20
"""Bound on the passes over all exits; a few are usual."""


def coordinate_thresholds(
    answers: ExitAnswers, goal: Goal, start: Sequence[float], *, fallback: Fallback = "last", rounds: int = ROUNDS
) -> tuple[float, ...]:
    """From ``start``, exit by exit the best threshold with all others fixed, until a pass improves nothing.

    Every value that makes a difference is tried at each exit and taken only where it is strictly better for
    ``goal``, so the result is never worse than ``start``, which must satisfy the goal, and depends on nothing but
    the samples. It is a local optimum: no single threshold can be improved, several together perhaps.
    """
    thresholds = [float(threshold) for threshold in start]
    for _ in range(rounds):
        before = list(thresholds)
        for k in range(answers.exits - 1):
            thresholds[k] = _best_at(answers, goal, thresholds, k, fallback)
        if thresholds == before:
            break
    return tuple(thresholds)


def choices_at(
    answers: ExitAnswers, thresholds: Sequence[float], exit: int, *, fallback: Fallback = "last"
) -> tuple[Tensor, Tensor, Tensor]:
    """``(thresholds_P, cost_P, accuracy_P)`` of every threshold of one exit, the others fixed.

    In falling order from :data:`NEVER` to the lowest confidence, so that every choice lets a few more of the
    arriving samples leave: what they cost and got right behind this exit is replaced by what they do at it.
    """
    closed = [NEVER if k == exit else threshold for k, threshold in enumerate(thresholds)]
    behind = decide(answers, closed, fallback=fallback)
    stops_KN = behind.stop_N == torch.arange(answers.exits)[:, None]
    right_N = answers.right_N(behind.answer_N).long()
    confidence_N = answers.confidence_KN[exit]
    arriving_M = ((behind.stop_N > exit) & (confidence_N > ALWAYS)).nonzero()[:, 0]
    ordered_M, order_M = confidence_N[arriving_M].sort(descending=True, stable=True)
    arriving_M = arriving_M[order_M]

    last_of_equals_M = torch.ones(len(ordered_M), dtype=torch.bool)
    last_of_equals_M[:-1] = ordered_M[:-1] != ordered_M[1:]
    leaving_P = torch.cat((torch.zeros(1, dtype=torch.int64), last_of_equals_M.nonzero()[:, 0] + 1))
    thresholds_P = torch.cat((torch.tensor([NEVER], dtype=torch.float64), ordered_M[last_of_equals_M]))

    stopped_KP = stops_KN.sum(dim=1)[:, None] - _sums_up_to(stops_KN[:, arriving_M])[:, leaving_P]
    stopped_KP[exit] += leaving_P
    gain_M = answers.correct_KN[exit, arriving_M].long() - right_N[arriving_M]
    right_P = right_N.sum() + _sums_up_to(gain_M[None])[0, leaving_P]
    return thresholds_P, mean_cost(stopped_KP, answers.cost_K), right_P.double() / answers.samples


def _best_at(answers: ExitAnswers, goal: Goal, thresholds: list[float], exit: int, fallback: Fallback) -> float:
    current = thresholds[exit]
    thresholds_P, cost_P, accuracy_P = choices_at(answers, thresholds, exit, fallback=fallback)
    best = goal.best(cost_P, accuracy_P)
    now = int((thresholds_P >= current).sum()) - 1  # lets those leave who leave under the current threshold
    if best is None or (accuracy_P[best], cost_P[best]) == (accuracy_P[now], cost_P[now]):
        return current
    # all who arrive leave: nothing says below which confidence one should go on
    return ALWAYS if best > 0 and best == len(thresholds_P) - 1 else float(thresholds_P[best])


def _sums_up_to(values_KM: Tensor) -> Tensor:
    """Sums of the first 0, 1, ..., M values of each row."""
    zero_K1 = torch.zeros(len(values_KM), 1, dtype=torch.int64)
    return torch.cat((zero_K1, values_KM.long().cumsum(dim=1)), dim=1)


Method = Literal["shared", "quantiles", "coordinate"]
Thresholds = tuple[float, ...]
"""One for each exit but the last."""

STEEPEST = 50.0
"""Largest ``|log q|``: the first or the last exit's share is then 1 to double precision."""

BISECTIONS = 30
"""Steps of the search for log q, down to 1e-7: finer than the share of one sample in a million."""

ROUNDING = 1e-9
"""Samples by which a sum of shares may exceed a whole number and still be taken for it."""

TARGET_GRID = (*(step / 10 for step in range(-60, 61)),)
"""Values of log q tried for a target accuracy, -6 to 6; MSDNet's own sweep runs from -3.0 to 0.67."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """Thresholds, what was asked of them, and what they come to on the validation samples."""

    method: Method
    budget: float | None
    """Asked mean MACs a sample, or None where an accuracy was asked."""
    target_accuracy: float | None
    """Asked accuracy, or None where a budget was asked."""
    thresholds: Thresholds
    """One for each exit but the last."""
    validation: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Realized:
    """A solution beside what it comes to on test samples."""

    solution: Solution
    test: Outcome
    excess: float
    """Realized test cost over the asked budget, minus 1: 0.02 is 2 % too dear; NaN for an accuracy target."""


def solve(
    validation: ExitAnswers,
    *,
    method: Method = "shared",
    budget: float | None = None,
    accuracy: float | None = None,
    fallback: Fallback = "last",
) -> Solution:
    """Thresholds for a mean cost of at most ``budget`` MACs a sample, or an accuracy of at least ``accuracy``.

    Within a budget the method looks for the most accurate thresholds (``quantiles`` instead spends it, as
    MSDNet's protocol does), for a target accuracy for the cheapest. An infinite budget asks for the full model:
    nothing leaves early. Every head passed is counted, also of an exit whose threshold is ``NEVER``.

    Raises:
        ConfigError: A budget below the first exit's cost, an accuracy that the method does not reach, both or
            neither given, an unknown method.

    >>> validation = ExitAnswers(confidence_KN=torch.tensor([[0.9, 0.4], [0.8, 0.7]]),
    ...                          correct_KN=torch.tensor([[True, False], [True, True]]), cost_K=(10, 40))
    >>> solution = solve(validation, budget=25)
    >>> round(solution.thresholds[0], 3), solution.validation.cost, solution.validation.accuracy
    (0.9, 25.0, 1.0)
    """
    goal = Goal(budget=budget, accuracy=accuracy)
    goal.check(validation)
    if method not in _METHODS:
        raise ConfigError(f"method: unknown '{method}'; give one of {', '.join(_METHODS)}")
    if budget == math.inf or validation.exits == 1:
        thresholds: Thresholds | None = shared(NEVER, exits=validation.exits)
    else:
        thresholds = _METHODS[method](validation, goal, fallback)
    outcome = None if thresholds is None else who_answers(validation, thresholds, fallback=fallback)
    if outcome is None or (accuracy is not None and outcome.accuracy < accuracy):
        highest = who_answers(validation, _most_accurate(method, validation, fallback), fallback=fallback).accuracy
        raise ConfigError(
            f"accuracy: method '{method}' does not reach {accuracy:g} on the validation samples; "
            f"ask for at most {highest:g}"
        )
    return Solution(method=method, budget=budget, target_accuracy=accuracy,
                    thresholds=outcome.thresholds, validation=outcome)  # fmt: skip


def realize(solution: Solution, test: ExitAnswers) -> Realized:
    """What a solution comes to on test samples: the realized cost and accuracy beside the asked ones."""
    if test.exits != len(solution.thresholds) + 1:
        raise ClframeError(
            f"test: {test.exits} exits, the solution has thresholds for {len(solution.thresholds) + 1}; "
            f"evaluate the same network"
        )
    outcome = who_answers(test, solution.thresholds, fallback=solution.validation.fallback)
    excess = math.nan if solution.budget is None else outcome.cost / solution.budget - 1
    return Realized(solution=solution, test=outcome, excess=excess)


def shares_K(log_q: float, *, exits: int) -> tuple[float, ...]:
    """Share of the samples that each exit answers: ``q^k / sum_j q^j``.

    Source: Huang et al., "Multi-Scale Dense Networks for Resource Efficient Image Classification" (2018).

    >>> shares_K(math.log(2), exits=3)
    (0.142..., 0.285..., 0.571...)
    """
    return tuple(torch.softmax(log_q * torch.arange(exits, dtype=torch.float64), dim=0).tolist())


def quantile_thresholds(validation: ExitAnswers, log_q: float) -> Thresholds:
    """Thresholds under which exit k answers at least its share of the validation samples, the surest first.

    By exit k at least ``N (s_0 + ... + s_k)`` samples have left, rounded up, s being :func:`shares_K`, so the cost
    is at most ``sum_k s_k cost_k``; equal confidences leave together, and the exits behind count on fewer. (The
    authors' code rounds each exit's share down instead, which exceeds the budget.)
    """
    samples, answered = validation.samples, 0.0
    remaining_N = torch.ones(samples, dtype=torch.bool)
    thresholds: list[float] = []
    for k, share in enumerate(shares_K(log_q, exits=validation.exits)[:-1]):
        answered += share
        surest = validation.confidence_KN[k][remaining_N].sort(descending=True).values
        needed = math.ceil(samples * answered - ROUNDING) - (samples - len(surest))
        if needed <= 0:
            thresholds.append(NEVER)
            continue
        thresholds.append(ALWAYS if needed >= len(surest) else float(surest[needed - 1]))
        remaining_N &= validation.confidence_KN[k] < thresholds[-1]
        if thresholds[-1] == ALWAYS:
            remaining_N &= validation.confidence_KN[k] == ALWAYS  # without a confidence nothing leaves
    return tuple(thresholds)


def _solve_shared(validation: ExitAnswers, goal: Goal, fallback: Fallback) -> Thresholds | None:
    threshold = shared_threshold(validation, goal, fallback=fallback)
    return None if threshold is None else shared(threshold, exits=validation.exits)


def _solve_quantiles(validation: ExitAnswers, goal: Goal, fallback: Fallback) -> Thresholds | None:
    if goal.budget is not None:
        if goal.budget >= validation.cost_K[-1]:
            return shared(NEVER, exits=validation.exits)
        return _quantiles_within(validation, goal.budget)
    return _best(validation, goal, fallback, _quantile_choices(validation))


def _solve_coordinate(validation: ExitAnswers, goal: Goal, fallback: Fallback) -> Thresholds | None:
    """The best of what the search makes of the other methods' solutions and of the full model."""
    starts = [_solve_shared(validation, goal, fallback), _solve_quantiles(validation, goal, fallback),
              _best(validation, goal, fallback, [shared(NEVER, exits=validation.exits)])]  # fmt: skip
    if starts == [None] * 3:  # a target that none of them reaches; the most accurate thresholds per exit may
        most_accurate = _most_accurate("coordinate", validation, fallback)
        starts = [_best(validation, goal, fallback, [most_accurate])]
    ends = [coordinate_thresholds(validation, goal, start, fallback=fallback) for start in starts if start is not None]
    return _best(validation, goal, fallback, ends)


def _best(
    validation: ExitAnswers, goal: Goal, fallback: Fallback, choices: Sequence[Thresholds]
) -> Thresholds | None:
    """The choice that is best for the goal, the first of equals; None where none will do."""
    outcomes = [who_answers(validation, thresholds, fallback=fallback) for thresholds in choices]
    cost_P = torch.tensor([outcome.cost for outcome in outcomes], dtype=torch.float64)
    accuracy_P = torch.tensor([outcome.accuracy for outcome in outcomes], dtype=torch.float64)
    index = goal.best(cost_P, accuracy_P)
    return None if index is None else choices[index]


def _quantiles_within(validation: ExitAnswers, budget: float) -> Thresholds:
    """The quantile thresholds of the largest q, by bisection, that keep the budget on these samples."""
    low, high = -STEEPEST, STEEPEST
    kept = shared(ALWAYS, exits=validation.exits)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        thresholds = quantile_thresholds(validation, middle)
        if who_answers(validation, thresholds).cost <= budget:
            low, kept = middle, thresholds
        else:
            high = middle
    return kept


def _quantile_choices(validation: ExitAnswers) -> list[Thresholds]:
    spread = [quantile_thresholds(validation, log_q) for log_q in TARGET_GRID]
    return [shared(ALWAYS, exits=validation.exits), *spread, shared(NEVER, exits=validation.exits)]


def _most_accurate(method: Method, validation: ExitAnswers, fallback: Fallback) -> Thresholds:
    """The most accurate thresholds that a method knows, at whatever cost."""
    if method == "quantiles":
        choices = _quantile_choices(validation)
        return max(choices, key=lambda thresholds: who_answers(validation, thresholds, fallback=fallback).accuracy)
    found = _METHODS[method](validation, Goal(budget=validation.cost_K[-1]), fallback)
    assert found is not None  # the full model's cost admits every threshold
    return found


_METHODS: dict[Method, Callable[[ExitAnswers, Goal, Fallback], Thresholds | None]] = {
    "shared": _solve_shared,
    "quantiles": _solve_quantiles,
    "coordinate": _solve_coordinate,
}
