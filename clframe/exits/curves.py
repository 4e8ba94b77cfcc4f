"""Accuracy against cost: every shared threshold at once, and the points that papers report.

A shared threshold is one number for all exits before the last. Lowering it only ever makes samples stop earlier, so
cost falls with it; accuracy need not.

Shape suffixes: K exits, N samples, P thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clframe.errors import ClframeError, ConfigError
from clframe.exits.decisions import ALWAYS, NEVER, ExitAnswers, Fallback, mean_cost, who_answers

BUDGETS = (0.25, 0.5, 0.75, 1.0)
"""Shares of the bare backbone's cost at which early-exit papers report accuracy ("Zero Time Waste", 2021)."""

NO_VALIDATION = "no validation samples; thresholds are never chosen on test data"


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What thresholds are chosen for: the most accurate within a budget, or the cheapest accurate enough.

    Of equals the budget takes the cheapest, the target the most accurate. Raises :class:`ConfigError` unless
    exactly one of the two is given.
    """

    budget: float | None = None
    """Mean cost of a sample that must not be exceeded, in the unit of ``cost_K``."""
    accuracy: float | None = None
    """Accuracy to reach, from 0 to 1."""

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.accuracy is None):
            raise ConfigError("budget, accuracy: both or neither given; give one of them")
        if math.isnan(self.budget if self.budget is not None else self.accuracy or 0.0):
            raise ConfigError("budget, accuracy: found NaN; give a number")

    def best(self, cost_P: Tensor, accuracy_P: Tensor) -> int | None:
        """Index of the best choice, the first of equals; None where no choice will do."""
        if self.accuracy is None:
            ranks, fit_P = (accuracy_P, -cost_P), cost_P <= (self.budget or 0.0)
        else:
            ranks, fit_P = (-cost_P, accuracy_P), accuracy_P >= self.accuracy
        for rank_P in ranks:
            if not fit_P.any():
                return None
            fit_P = fit_P & (rank_P == rank_P[fit_P].max())
        return int(fit_P.nonzero()[0])

    def check(self, answers: ExitAnswers) -> None:
        """Raise :class:`ConfigError` for a budget below the first exit's cost."""
        if self.budget is not None and self.budget < answers.cost_K[0]:
            raise ConfigError(
                f"budget: {self.budget:g} is less than the first exit costs; give at least {answers.cost_K[0]:g}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Accuracy and cost at P thresholds, in rising order; costs are shares of the bare backbone's."""

    thresholds: tuple[float, ...]
    costs: tuple[float, ...]
    accuracies: tuple[float, ...]
    exit_costs: tuple[float, ...]
    """Of each exit when it answers everything."""
    exit_accuracies: tuple[float, ...]

    @property
    def best(self) -> int:
        """The most accurate point, the cheapest of equals."""
        return self.accuracies.index(max(self.accuracies))


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetPoint:
    """One threshold chosen on validation samples and what it comes to on test samples.

    Costs are shares of the bare backbone's. Where no threshold keeps the budget, all numbers are NaN.
    """

    name: str
    """The budget in percent, as ``50%``, or ``max``: the most accurate whatever it costs."""
    asked_cost: float
    """NaN for ``max``."""
    threshold: float = math.nan
    validation_cost: float = math.nan
    validation_accuracy: float = math.nan
    cost: float = math.nan
    """Realized on the test samples."""
    accuracy: float = math.nan
    """Realized on the test samples."""
    undefined: str = ""
    """Why there are no numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetPoints:
    """The points of a curve, or None and the reason."""

    points: tuple[BudgetPoint, ...] | None
    undefined: str = ""


def shared(threshold: float, *, exits: int) -> tuple[float, ...]:
    """One threshold for each of ``exits`` exits but the last."""
    return (float(threshold),) * (exits - 1)


def candidate_thresholds_P(answers: ExitAnswers) -> Tensor:
    """Every shared threshold that makes a difference on these samples, in rising order, and :data:`NEVER`.

    They are the distinct values of the highest confidence so far: a confidence below an earlier one of its
    sample never decides. The lowest is :data:`ALWAYS`: nothing says where below it a sample should go on.
    """
    distinct_P = answers.confidence_KN[:-1].cummax(dim=0).values.unique() if answers.exits > 1 else torch.empty(0)
    distinct_P = distinct_P[distinct_P > ALWAYS].double()
    return torch.cat((torch.tensor([ALWAYS])[: len(distinct_P)], distinct_P[1:], torch.tensor([NEVER]))).double()


def sweep(answers: ExitAnswers, thresholds_P: Tensor, *, fallback: Fallback = "last") -> tuple[Tensor, Tensor]:
    """``(cost_P, accuracy_P)`` of every shared threshold at once: mean MACs a sample, and accuracy.

    A sample has stopped by exit k when its highest confidence up to k reaches the threshold, so counts are
    places in sorted lists: K N log N + P K log N steps instead of the P K N of calling
    :func:`~clframe.exits.decisions.who_answers` P times, with the same numbers.
    """
    samples, last = answers.samples, answers.exits - 1
    thresholds_P = thresholds_P.double()
    left_P = torch.zeros(len(thresholds_P), dtype=torch.int64)
    right_P = torch.zeros_like(left_P)
    stopped: list[Tensor] = []
    highest_KN = answers.confidence_KN.cummax(dim=0).values
    for k in range(last):
        by_now_P, right_by_now_P = _reached(highest_KN[k], answers.correct_KN[k], thresholds_P)
        stopped.append(by_now_P - left_P)
        right_P += right_by_now_P
        if k > 0:  # minus what this exit would have got right of those who had left before it
            right_P -= _reached(highest_KN[k - 1], answers.correct_KN[k], thresholds_P)[1]
        left_P = by_now_P
    final_N = answers.correct_KN[-1] if fallback == "last" else answers.right_N(answers.most_confident_N())
    right_P += int(final_N.sum())
    if last > 0:
        right_P -= _reached(highest_KN[last - 1], final_N, thresholds_P)[1]
    stopped.append(samples - left_P)
    return mean_cost(torch.stack(stopped), answers.cost_K), right_P.double() / samples


def shared_threshold(validation: ExitAnswers, goal: Goal, *, fallback: Fallback = "last") -> float | None:
    """The best shared threshold for ``goal`` on these samples, of all that make a difference.

    None where no threshold reaches the accuracy asked; raises :class:`ConfigError` for a budget below the first
    exit's cost.
    """
    goal.check(validation)
    thresholds_P = candidate_thresholds_P(validation)
    index = goal.best(*sweep(validation, thresholds_P, fallback=fallback))
    return None if index is None else float(thresholds_P[index])


def accuracy_cost_curve(
    answers: ExitAnswers, *, backbone_cost: float, most: int | None = 101, fallback: Fallback = "last"
) -> Curve:
    """The curve over all shared thresholds, or over ``most`` of them at evenly spaced ranks.

    ``backbone_cost`` is what one sample costs the bare backbone, in the unit of ``cost_K``. Every point is a fixed
    threshold, so drawing the curve on test samples chooses nothing.
    """
    thresholds_P = candidate_thresholds_P(answers)
    if most is not None and most < len(thresholds_P):
        if most < 2:
            raise ConfigError(f"most: {most} points; give at least 2, the ends of the curve")
        thresholds_P = thresholds_P[torch.linspace(0, len(thresholds_P) - 1, most).round().long()]
    cost_P, accuracy_P = sweep(answers, thresholds_P, fallback=fallback)
    accuracy_K = answers.correct_KN.double().mean(dim=1)
    return Curve(
        thresholds=tuple(thresholds_P.tolist()),
        costs=tuple((cost_P / backbone_cost).tolist()),
        accuracies=tuple(accuracy_P.tolist()),
        exit_costs=tuple(cost / backbone_cost for cost in answers.cost_K),
        exit_accuracies=tuple(accuracy_K.tolist()),
    )


def budget_points(
    validation: ExitAnswers | None,
    test: ExitAnswers,
    *,
    backbone_cost: float,
    budgets: Sequence[float] = BUDGETS,
    fallback: Fallback = "last",
) -> BudgetPoints:
    """Accuracy at shares of the bare backbone's cost, and the maximum.

    Each threshold is chosen on ``validation`` (the most accurate within the budget) and realized on ``test``,
    whose cost may turn out to be another. Every head passed is counted, also where no sample can leave at it.
    """
    if validation is None:
        return BudgetPoints(points=None, undefined=NO_VALIDATION)
    if validation.cost_K != test.cost_K:
        raise ClframeError("budget points: validation and test differ in their exits' costs; evaluate one network")
    goals = [(f"{100 * share:g}%", share, share * backbone_cost) for share in budgets]
    goals.append(("max", math.nan, test.cost_K[-1]))
    thresholds_P = candidate_thresholds_P(validation)
    cost_P, accuracy_P = sweep(validation, thresholds_P, fallback=fallback)
    points: list[BudgetPoint] = []
    for name, share, budget in goals:
        if budget < validation.cost_K[0]:
            reason = f"the first exit costs {100 * validation.cost_K[0] / backbone_cost:.1f}% of the backbone"
            points.append(BudgetPoint(name=name, asked_cost=share, undefined=reason))
            continue
        chosen = Goal(budget=budget).best(cost_P, accuracy_P)
        assert chosen is not None  # the first exit alone keeps the budget
        threshold = float(thresholds_P[chosen])
        found = who_answers(test, shared(threshold, exits=test.exits), fallback=fallback)
        points.append(BudgetPoint(
            name=name, asked_cost=share, threshold=threshold, validation_cost=float(cost_P[chosen]) / backbone_cost,
            validation_accuracy=float(accuracy_P[chosen]), cost=found.cost / backbone_cost, accuracy=found.accuracy,
        ))  # fmt: skip
    return BudgetPoints(points=tuple(points))


def _reached(value_N: Tensor, flag_N: Tensor, thresholds_P: Tensor) -> tuple[Tensor, Tensor]:
    """How many samples have a value at or above each threshold, and how many of them carry the flag."""
    ordered_N, order_N = value_N.sort()
    flags_up_to = torch.cat((torch.zeros(1, dtype=torch.int64), flag_N[order_N].long().cumsum(dim=0)))
    below_P = torch.searchsorted(ordered_N, thresholds_P).clamp(min=int((value_N == ALWAYS).sum()))
    return len(value_N) - below_P, flags_up_to[-1] - flags_up_to[below_P]
