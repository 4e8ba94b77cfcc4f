"""Diagnostics of exits, and their record for results.json.

Shape suffixes: E experiences, K exits, N samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clframe.errors import ClframeError
from clframe.exits.curves import BudgetPoint, BudgetPoints, Curve, accuracy_cost_curve, budget_points, shared
from clframe.exits.decisions import ExitAnswers, counts, ratio, who_answers
from clframe.metrics.continual import Matrix, Score, forgetting


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitDiagnostics:
    """What the exits of one evaluation know, beside the last; fractions of samples unless said otherwise."""

    accuracy_K: tuple[float, ...]
    """Right answers of each exit, alone."""
    oracle_accuracy: float
    """Samples that at least one exit gets right: what a perfect choice among the exits would reach."""
    overthinking: float
    """``oracle_accuracy`` minus the last exit's accuracy. Source: Kaya et al., "Shallow-Deep Networks" (2019)."""
    overthinking_relative: float
    """``overthinking`` over the last exit's accuracy; NaN where that is 0."""
    unique_accuracy_K: tuple[float, ...]
    """Samples that this exit gets right and no other does (auxiliary classifiers in continual learning)."""
    fixed_final_errors_K: tuple[float, ...]
    """Of the last exit's errors, the share that this exit gets right; NaN where the last makes none."""
    hindsight_improvability_K: tuple[float, ...]
    """Of this exit's errors, the share that some EARLIER exit got right; NaN at the first exit, which has none
    before it, and where there are no errors. Source: Wolczyk et al., "Zero Time Waste" (2021)."""


def diagnose(answers: ExitAnswers) -> ExitDiagnostics:
    """Every diagnostic of :class:`ExitDiagnostics`.

    >>> diagnose(ExitAnswers(confidence_KN=torch.rand(2, 4), cost_K=(1, 2),
    ...     correct_KN=torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1]]))).overthinking
    0.25
    """
    correct_KN, samples = answers.correct_KN, answers.samples
    wrong_KN = ~correct_KN
    right_K = counts(correct_KN)
    oracle = int(correct_KN.any(dim=0).sum())
    alone_K = counts(correct_KN & (correct_KN.sum(dim=0) == 1))
    fixed_K = counts(correct_KN & wrong_KN[-1])
    known_KN = correct_KN.cumsum(dim=0) > 0  # by this exit or an earlier one; where this one is wrong, an earlier
    improvable_K = counts(known_KN & wrong_KN)
    improvability = [ratio(n, samples - right) for n, right in zip(improvable_K, right_K, strict=True)]
    return ExitDiagnostics(
        accuracy_K=tuple(right / samples for right in right_K),
        oracle_accuracy=oracle / samples,
        overthinking=(oracle - right_K[-1]) / samples,
        overthinking_relative=ratio(oracle - right_K[-1], right_K[-1]),
        unique_accuracy_K=tuple(alone / samples for alone in alone_K),
        fixed_final_errors_K=tuple(ratio(fixed, samples - right_K[-1]) for fixed in fixed_K),
        hindsight_improvability_K=(math.nan, *improvability[1:]),
    )


def static_accuracies(answers: ExitAnswers, *, correct: Mapping[str, Tensor] | None = None) -> dict[str, float]:
    """Accuracy of the decisions that look at every exit: ``last``, ``confident``, ``oracle`` and those given.

    ``correct`` says for each further decision, such as the mean of the exits' probabilities or their vote,
    which needs scores that are not kept here, whether it is right on each of the N samples.
    """
    right = {
        "last": answers.correct_KN[-1],
        "confident": answers.right_N(answers.most_confident_N()),
        "oracle": answers.correct_KN.any(dim=0),
    }
    for name, given_N in (correct or {}).items():
        if tuple(given_N.shape) != (answers.samples,):
            raise ClframeError(f"correct.{name}: shape {tuple(given_N.shape)}; give {answers.samples} answers")
        right[name] = given_N.bool()
    return {name: int(right_N.sum()) / answers.samples for name, right_N in right.items()}


def exit_accuracy_KE(answers: ExitAnswers, *, experiences: int) -> tuple[tuple[float, ...], ...]:
    """Accuracy of every exit on every test experience; NaN where an experience has no samples.

    Row k after each training experience makes the accuracy matrix of exit k, for :func:`forgetting_by_exit`.
    """
    if answers.experience_N is None:
        raise ClframeError("exit answers: experience_N was not given; give each sample's test experience")
    of_EN = answers.experience_N == torch.arange(experiences)[:, None]
    total_E = counts(of_EN)
    right_KE = [counts(of_EN & right_N) for right_N in answers.correct_KN]
    return tuple(tuple(ratio(n, total) for n, total in zip(right_E, total_E, strict=True)) for right_E in right_KE)


def forgetting_by_exit(accuracy_KTE: Sequence[Matrix]) -> tuple[Score, ...]:
    """:func:`clframe.metrics.forgetting` of each exit's own accuracy matrix.

    >>> [score.value for score in forgetting_by_exit([[[0.5, 0.0], [0.25, 0.5]], [[1.0, 0.0], [0.5, 1.0]]])]
    [0.25, 0.5]
    """
    return tuple(forgetting(accuracy_TE) for accuracy_TE in accuracy_KTE)


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
