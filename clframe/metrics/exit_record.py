"""What an evaluation of every exit comes to, kept for each training experience and written to results.json.

Shape suffixes: E test experiences, K exits in order of depth.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clframe.functional.early_exit.answers import ExitAnswers
from clframe.functional.early_exit.curves import (
    BudgetPoint,
    BudgetPoints,
    Curve,
    accuracy_cost_curve,
    budget_points,
    shared,
)
from clframe.functional.early_exit.decisions import who_answers
from clframe.metrics.exits import ExitDiagnostics, diagnose, static_accuracies


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitRecord:
    """Every exit after one training experience, on the test samples of all experiences so far.

    Costs are shares of the bare backbone's MACs with its own classifier.
    """

    backbone_macs: int
    """MACs of one sample through the bare backbone and its own classifier, with the classes met so far."""
    macs_K: tuple[int, ...]
    """MACs of one sample up to each exit, the heads passed on the way included."""
    accuracy_KE: tuple[tuple[float, ...], ...]
    """Accuracy of each exit, alone, on every test experience, those ahead included."""
    diagnostics: ExitDiagnostics
    static: Mapping[str, float]
    """Accuracy of decisions that look at every exit: ``last``, ``confident``, ``mean``, ``vote``, ``oracle``."""
    curve: Curve
    """Accuracy against cost as one threshold of the largest probability, shared by all exits, goes down."""
    points: BudgetPoints
    """Accuracy at shares of the cost, thresholds chosen on validation samples."""
    share_PK: tuple[tuple[float, ...], ...]
    """Share of samples that each exit answers, at each of ``points``."""
    accuracy_PK: tuple[tuple[float, ...], ...]
    """Accuracy of each exit on the samples that it answers there; NaN where it answers none."""
    similarity_K: tuple[float, ...]
    """Linear CKA of each exit's tap with itself after the first experience, on samples of the first."""

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> ExitRecord:
        """The record that ``dataclasses.asdict`` took apart."""
        found = dict(content)
        points = found["points"]["points"]
        found["diagnostics"] = ExitDiagnostics(**found["diagnostics"])
        found["curve"] = Curve(**found["curve"])
        found["points"] = BudgetPoints(
            points=None if points is None else tuple(BudgetPoint(**point) for point in points),
            undefined=found["points"]["undefined"],
        )
        return cls(**found)


def exit_record(
    test: ExitAnswers,
    validation: ExitAnswers | None,
    *,
    backbone_macs: int,
    accuracy_KE: tuple[tuple[float, ...], ...],
    correct: Mapping[str, Any],
    similarity_K: tuple[float, ...],
    most: int = 41,
) -> ExitRecord:
    """The record of one evaluation.

    Args:
        test: Answers on the test samples of the experiences so far.
        validation: Answers on their validation samples, None where none are held out.
        backbone_macs: What one sample costs the bare backbone.
        accuracy_KE: Accuracy of each exit on every test experience.
        correct: For each further static decision, whether it is right on each test sample.
        similarity_K: See :class:`ExitRecord`.
        most: Points of the curve that are kept.
    """
    points = budget_points(validation, test, backbone_cost=backbone_macs)
    outcomes = [
        None if point.undefined else who_answers(test, shared(point.threshold, exits=test.exits))
        for point in points.points or ()
    ]
    nothing = (float("nan"),) * test.exits
    return ExitRecord(
        backbone_macs=backbone_macs,
        macs_K=tuple(int(cost) for cost in test.cost_K),
        accuracy_KE=accuracy_KE,
        diagnostics=diagnose(test),
        static=static_accuracies(test, correct=correct),
        curve=accuracy_cost_curve(test, backbone_cost=backbone_macs, most=most),
        points=points,
        share_PK=tuple(nothing if outcome is None else outcome.share_K for outcome in outcomes),
        accuracy_PK=tuple(nothing if outcome is None else outcome.accuracy_K for outcome in outcomes),
        similarity_K=similarity_K,
    )
