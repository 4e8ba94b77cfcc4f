"""Accuracy against cost over all shared thresholds, and accuracy at the budgets that papers report.

A shared threshold is one number for all exits before the last. Lowering it makes samples stop earlier, so the cost
never rises; accuracy may change in either direction.

Shape suffixes: K exits, N samples, P thresholds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from clframe.errors import ClframeError, ConfigError
from clframe.exits.clearance import clear_threshold
from clframe.exits.decisions import ALWAYS, NEVER, ExitEvaluation, evaluate_thresholds, mean_cost
from clframe.exits.policies import Fallback
from clframe.options import format_value

BUDGETS = (0.25, 0.5, 0.75, 1.0)
"""Shares of the bare backbone's cost at which early-exit papers report accuracy ("Zero Time Waste", 2021)."""

NO_VALIDATION = "no validation samples; thresholds are never chosen on test data"

BudgetRule = Literal["best", "one_standard_error"]
"""Choice among the thresholds within a budget.

``best``: highest validation accuracy, the cheapest of equals. ``one_standard_error``: the highest threshold whose
validation accuracy is at most one standard error, ``sqrt(a (1 - a) / N)``, below the best accuracy a. On a few hundred
validation samples the best of many thresholds is best by chance; this rule stops early only where that gains more than
the noise.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """Criterion for thresholds: the most accurate within a budget, or the cheapest that reach an accuracy.

    Of equally good thresholds a budget takes the cheapest, a target accuracy the most accurate. Raises
    :class:`ConfigError` unless exactly one of the two is given, or for an unknown rule.
    """

    budget: float | None = None
    """Largest mean cost of a sample, in the unit of ``cost_K``."""
    accuracy: float | None = None
    """Accuracy to reach, from 0 to 1."""
    rule: BudgetRule = "best"
    """Choice within a budget; see :data:`BudgetRule`."""

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.accuracy is None):
            raise ConfigError("budget, accuracy: found both or neither; give one of them")
        for name, given in (("budget", self.budget), ("accuracy", self.accuracy)):
            if given is not None and (isinstance(given, bool) or not isinstance(given, Real)):
                raise ConfigError(f"{name}: found {format_value(given)}; give a number")
        if math.isnan(self.budget if self.budget is not None else self.accuracy or 0.0):
            raise ConfigError("budget, accuracy: found NaN; give a number")
        if self.rule not in get_args(BudgetRule):
            raise ConfigError(f"rule: found {self.rule!r}; give 'best' or 'one_standard_error'")

    def best(self, cost_P: Tensor, accuracy_P: Tensor, *, samples: int = 0) -> int | None:
        """Index of the best choice, the first of equals; None where no choice satisfies the goal.

        ``samples`` is the number of validation samples behind ``accuracy_P``. Only ``one_standard_error`` uses it and
        needs choices in order of rising threshold.
        """
        if self.rule == "one_standard_error" and self.budget is not None:
            return self._within_one_error(cost_P, accuracy_P, samples)
        if self.accuracy is None:
            ranks, fit_P = (accuracy_P, -cost_P), cost_P <= (self.budget or 0.0)
        else:
            ranks, fit_P = (-cost_P, accuracy_P), accuracy_P >= self.accuracy
        for rank_P in ranks:
            if not fit_P.any():
                return None
            fit_P = fit_P & (rank_P == rank_P[fit_P].max())
        return int(fit_P.nonzero()[0])

    def _within_one_error(self, cost_P: Tensor, accuracy_P: Tensor, samples: int) -> int | None:
        fit_P = cost_P <= (self.budget or 0.0)
        if not fit_P.any():
            return None
        highest = float(accuracy_P[fit_P].max())
        error = math.sqrt(highest * (1 - highest) / samples)
        return int((fit_P & (accuracy_P >= highest - error)).nonzero()[-1])

    def check(self, evaluation: ExitEvaluation) -> None:
        """Raise :class:`ConfigError` for a budget below the first exit's cost."""
        if self.budget is not None and self.budget < evaluation.cost_K[0]:
            raise ConfigError(
                f"budget: found {self.budget:g}, less than the first exit costs; "
                f"give at least {evaluation.cost_K[0]:g}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyCostCurve:
    """Accuracy and cost at P thresholds, in rising order; costs are fractions of the bare backbone's cost."""

    thresholds: tuple[float, ...]
    costs: tuple[float, ...]
    accuracies: tuple[float, ...]
    exit_costs: tuple[float, ...]
    """Cost of each exit when it predicts every sample."""
    exit_accuracies: tuple[float, ...]

    @property
    def best(self) -> int:
        """Index of the most accurate threshold, the cheapest of equals."""
        return self.accuracies.index(max(self.accuracies))


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetPoint:
    """One threshold chosen on validation samples, with its cost and accuracy on test samples.

    Costs are fractions of the bare backbone's cost. Where no threshold keeps the budget, all numbers are NaN.
    """

    name: str
    """The budget, such as ``50%``, or ``max``: the most accurate at any cost."""
    budget_share: float
    """Budget as a fraction of the backbone's cost; NaN for ``max``."""
    threshold: float = math.nan
    validation_cost: float = math.nan
    validation_accuracy: float = math.nan
    cost: float = math.nan
    """On the test samples."""
    accuracy: float = math.nan
    """On the test samples."""
    accuracy_low: float = math.nan
    """Lower end of the 95 % interval of ``accuracy``; see :func:`wilson_interval`."""
    accuracy_high: float = math.nan
    """Upper end of that interval."""
    undefined: str = ""
    """Reason where there are no numbers."""

    @classmethod
    def upgrade(cls, content: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the content of an older file, where ``budget_share`` was ``asked_cost``, in today's shape."""
        return {"budget_share": content.get("asked_cost"), **content}


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetPoints:
    """Budget points of one evaluation, or None and the reason."""

    points: tuple[BudgetPoint, ...] | None
    undefined: str = ""
    validation_samples: int = 0
    """Number of samples on which thresholds were chosen; 0 in runs that did not record it."""
    rule: BudgetRule = "best"


def wilson_interval(correct: int, samples: int, *, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson, 1927), at 95 % by default; also sound near 0 and 1.

    >>> [round(end, 4) for end in wilson_interval(8, 10)]
    [0.4902, 0.9433]
    """
    share, spread = correct / samples, z * z / samples
    center, half = share + spread / 2, z * math.sqrt(share * (1 - share) / samples + spread / (4 * samples))
    return max(0.0, (center - half) / (1 + spread)), min(1.0, (center + half) / (1 + spread))


def shared(threshold: float, *, exits: int) -> tuple[float, ...]:
    """One threshold for each of ``exits`` exits but the last."""
    return (float(threshold),) * (exits - 1)


def candidate_thresholds_P(evaluation: ExitEvaluation) -> Tensor:
    """Every shared threshold that makes a difference on these samples, in rising order, and :data:`NEVER`.

    These are the distinct values of the highest confidence so far, since a sample has stopped by exit k when its
    highest confidence up to k reaches the threshold. The lowest is replaced by :data:`ALWAYS`: no sample indicates
    where below it a threshold should be.
    """
    distinct_P = _distinct_P(evaluation)
    return torch.cat((torch.tensor([ALWAYS])[: len(distinct_P)], distinct_P[1:], torch.tensor([NEVER]))).double()


def sweep(evaluation: ExitEvaluation, thresholds_P: Tensor, *, fallback: Fallback = "last") -> tuple[Tensor, Tensor]:
    """``(cost_P, accuracy_P)`` of all shared thresholds: mean MACs per sample, and accuracy.

    Numbers equal those of P calls of :func:`~clframe.exits.decisions.evaluate_thresholds`, in O((N + P) K log N)
    instead of O(P K N): counts are positions in sorted lists of the highest confidence so far.
    """
    samples, last = evaluation.samples, evaluation.exits - 1
    thresholds_P = thresholds_P.double()
    left_P = torch.zeros(len(thresholds_P), dtype=torch.int64)
    right_P = torch.zeros_like(left_P)
    stopped: list[Tensor] = []
    highest_KN = evaluation.confidence_KN.cummax(dim=0).values
    for k in range(last):
        by_now_P, right_by_now_P = _reached(highest_KN[k], evaluation.correct_KN[k], thresholds_P)
        stopped.append(by_now_P - left_P)
        right_P += right_by_now_P
        if k > 0:  # samples that stopped before this exit are not predicted by it
            right_P -= _reached(highest_KN[k - 1], evaluation.correct_KN[k], thresholds_P)[1]
        left_P = by_now_P
    final_N = evaluation.correct_KN[-1] if fallback == "last" else evaluation.correct_at(evaluation.most_confident_N())
    right_P += int(final_N.sum())
    if last > 0:
        right_P -= _reached(highest_KN[last - 1], final_N, thresholds_P)[1]
    stopped.append(samples - left_P)
    return mean_cost(torch.stack(stopped), evaluation.cost_K), right_P.double() / samples


def shared_threshold(validation: ExitEvaluation, goal: Goal, *, fallback: Fallback = "last") -> float | None:
    """The best shared threshold for ``goal`` on these samples; None where no threshold satisfies it.

    It is between two confidences, see :func:`~clframe.exits.clearance.clear_threshold`.

    Raises :class:`ConfigError` for a budget below the first exit's cost.
    """
    goal.check(validation)
    thresholds_P = candidate_thresholds_P(validation)
    index = goal.best(*sweep(validation, thresholds_P, fallback=fallback), samples=validation.samples)
    return None if index is None else clear_threshold(float(thresholds_P[index]), _distinct_P(validation))


def accuracy_cost_curve(
    evaluation: ExitEvaluation, *, backbone_cost: float, most: int | None = 101, fallback: Fallback = "last"
) -> AccuracyCostCurve:
    """The curve over all shared thresholds, or over ``most`` of them at evenly spaced ranks.

    ``backbone_cost`` is the cost of one sample in the bare backbone, in the unit of ``cost_K``. Every threshold is
    shown, so computing the curve on test samples selects nothing.
    """
    thresholds_P = candidate_thresholds_P(evaluation)
    if most is not None and most < len(thresholds_P):
        if most < 2:
            raise ConfigError(f"most: found {most} points; give at least 2, the ends of the curve")
        thresholds_P = thresholds_P[torch.linspace(0, len(thresholds_P) - 1, most).round().long()]
    cost_P, accuracy_P = sweep(evaluation, thresholds_P, fallback=fallback)
    accuracy_K = evaluation.correct_KN.double().mean(dim=1)
    return AccuracyCostCurve(
        thresholds=tuple(thresholds_P.tolist()),
        costs=tuple((cost_P / backbone_cost).tolist()),
        accuracies=tuple(accuracy_P.tolist()),
        exit_costs=tuple(cost / backbone_cost for cost in evaluation.cost_K),
        exit_accuracies=tuple(accuracy_K.tolist()),
    )


def budget_points(
    validation: ExitEvaluation | None,
    test: ExitEvaluation,
    *,
    backbone_cost: float,
    budgets: Sequence[float] = BUDGETS,
    fallback: Fallback = "last",
    rule: BudgetRule = "best",
) -> BudgetPoints:
    """Accuracy at fractions of the bare backbone's cost, and at the best threshold of all.

    Each threshold is chosen on ``validation`` by ``rule`` and evaluated on ``test``, where its cost may differ. Every
    head passed is counted, also where no sample can stop at it.
    """
    if validation is None:
        return BudgetPoints(points=None, undefined=NO_VALIDATION)
    if validation.cost_K != test.cost_K:
        raise ClframeError("budget points: found other exit costs in validation and test; evaluate one network")
    goals = [(f"{100 * share:g}%", share, share * backbone_cost) for share in budgets]
    goals.append(("max", math.nan, test.cost_K[-1]))
    thresholds_P = candidate_thresholds_P(validation)
    cost_P, accuracy_P = sweep(validation, thresholds_P, fallback=fallback)

    def point(name: str, share: float, index: int) -> BudgetPoint:
        threshold = clear_threshold(float(thresholds_P[index]), _distinct_P(validation))
        outcome = evaluate_thresholds(test, shared(threshold, exits=test.exits), fallback=fallback)
        low, high = wilson_interval(round(outcome.accuracy * test.samples), test.samples)
        return BudgetPoint(
            name=name, budget_share=share, threshold=threshold, validation_cost=float(cost_P[index]) / backbone_cost,
            validation_accuracy=float(accuracy_P[index]), cost=outcome.cost / backbone_cost,
            accuracy=outcome.accuracy, accuracy_low=low, accuracy_high=high,
        )  # fmt: skip

    points: list[BudgetPoint] = []
    for name, share, budget in goals:
        chosen = Goal(budget=budget, rule=rule).best(cost_P, accuracy_P, samples=validation.samples)
        if budget < validation.cost_K[0]:
            reason = f"the first exit costs {100 * validation.cost_K[0] / backbone_cost:.1f}% of the backbone"
            points.append(BudgetPoint(name=name, budget_share=share, undefined=reason))
        elif chosen is None:  # NaN logits have no confidence, and such samples never stop early
            reason = "no threshold keeps it: confidences are not finite"
            points.append(BudgetPoint(name=name, budget_share=share, undefined=reason))
        else:
            points.append(point(name, share, chosen))
    return BudgetPoints(points=tuple(points), validation_samples=validation.samples, rule=rule)


def _distinct_P(evaluation: ExitEvaluation) -> Tensor:
    """The distinct values of the highest confidence so far at the exits before the last, in rising order."""
    if evaluation.exits == 1:
        return torch.empty(0, dtype=torch.float64)
    distinct_P: Tensor = evaluation.confidence_KN[:-1].cummax(dim=0).values.unique()
    return distinct_P[distinct_P > ALWAYS]


def _reached(value_N: Tensor, flag_N: Tensor, thresholds_P: Tensor) -> tuple[Tensor, Tensor]:
    """Number of samples with a value at or above each threshold, and number of those with the flag."""
    ordered_N, order_N = value_N.sort()
    flags_up_to = torch.cat((torch.zeros(1, dtype=torch.int64), flag_N[order_N].long().cumsum(dim=0)))
    below_P = torch.searchsorted(ordered_N, thresholds_P).clamp(min=int((value_N == ALWAYS).sum()))
    return len(value_N) - below_P, flags_up_to[-1] - flags_up_to[below_P]
