"""Diagnostics of exits, and their record for results.json.

Shape suffixes: E experiences, K exits, N samples.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from typing import Any, Final, Literal

from torch import Tensor

from clframe.errors import ClframeError
from clframe.exits.curves import (
    BUDGETS,
    AccuracyCostCurve,
    BudgetPoints,
    BudgetRule,
    accuracy_cost_curve,
    budget_points,
    shared,
)
from clframe.exits.decisions import ExitEvaluation, counts, evaluate_thresholds, ratio
from clframe.exits.failure import LABELS, LOWER_IS_BETTER, RANKING_METRICS, eefp_K
from clframe.exits.policies import Fallback
from clframe.exits.ranking import Ranking, rank
from clframe.metrics.continual import Matrix, Score, forgetting
from clframe.metrics.registry import Kind
from clframe.records import read_record
from clframe.registry import Registry

_log = logging.getLogger(__name__)
MOST_TOKENS: Final = 4096
"""Tokens of each test experience of text, the first ones, on which exits are compared: that costs more than computing
them. Accuracies and likelihoods by experience are those of all tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitMetric:
    """Definition and label of a metric with one value per exit."""

    label: str
    """Name in tables and figures, without a unit."""
    values: Callable[[ExitEvaluation], Sequence[float]]
    """One value per exit of one evaluation, in order of depth; NaN where undefined."""
    kind: Kind = "percent"
    better: Literal["higher", "lower", ""] = "higher"


def _load_exit_metric(point: EntryPoint) -> Iterator[tuple[str, ExitMetric]]:
    entry = point.load()
    if not isinstance(entry, ExitMetric):
        raise TypeError(f"{entry!r} is not an ExitMetric")
    yield point.name, entry


EXIT_METRICS: Registry[ExitMetric] = Registry("exit metric", group="clframe.exit_metrics", load=_load_exit_metric)
"""Every metric per exit by name: an entry is computed after each experience and reaches results, tables, TensorBoard
and reports."""


def accuracy_K(evaluation: ExitEvaluation) -> tuple[float, ...]:
    """Compute the accuracy of each exit when it classifies every sample."""
    return tuple(right / evaluation.samples for right in counts(evaluation.correct_KN))


def unique_accuracy_K(evaluation: ExitEvaluation) -> tuple[float, ...]:
    """Compute the share of samples that only this exit classifies correctly."""
    correct_KN = evaluation.correct_KN
    unique_K = counts(correct_KN & (correct_KN.sum(dim=0) == 1))
    return tuple(unique / evaluation.samples for unique in unique_K)


def fixed_final_errors_K(evaluation: ExitEvaluation) -> tuple[float, ...]:
    """Compute the share of the last exit's errors that each exit classifies correctly; NaN without such errors."""
    correct_KN = evaluation.correct_KN
    fixed_K = counts(correct_KN & ~correct_KN[-1])
    errors = evaluation.samples - counts(correct_KN)[-1]
    return tuple(ratio(fixed, errors) for fixed in fixed_K)


def hindsight_improvability_K(evaluation: ExitEvaluation) -> tuple[float, ...]:
    """Compute the share of each exit's errors that an earlier exit had classified correctly.

    NaN at the first exit, which has no earlier one, and without errors. Source: Wolczyk et al., "Zero Time Waste"
    (2021).
    """
    correct_KN = evaluation.correct_KN
    known_KN = correct_KN.cumsum(dim=0) > 0  # this exit or an earlier one is right; masked below to this one's errors
    improvable_K = counts(known_KN & ~correct_KN)
    errors_K = [evaluation.samples - right for right in counts(correct_KN)]
    return (math.nan, *(ratio(n, errors) for n, errors in zip(improvable_K[1:], errors_K[1:], strict=True)))


_OWN: Final[Mapping[str, ExitMetric]] = {
    "accuracy": ExitMetric(label="accuracy", values=accuracy_K),
    "unique_accuracy": ExitMetric(label="only this exit correct", values=unique_accuracy_K),
    "fixed_final_errors": ExitMetric(label="errors of the last exit corrected", values=fixed_final_errors_K),
    "hindsight_improvability": ExitMetric(
        label="hindsight improvability", values=hindsight_improvability_K, better="lower"
    ),
}


def _at_every_exit(metric: Callable[[Ranking], Any]) -> Callable[[ExitEvaluation], tuple[float, ...]]:
    """A ranking metric of confidence and correctness at every exit; NaN where a confidence is not finite."""

    def values(evaluation: ExitEvaluation) -> tuple[float, ...]:
        pairs = zip(evaluation.confidence_KN, evaluation.correct_KN, strict=True)
        return tuple(
            float(metric(rank(confidence_N.numpy(), right_N.numpy()))[0]) if confidence_N.isfinite().all() else math.nan
            for confidence_N, right_N in pairs
        )

    return values


def _mean_at_every_exit(value_KN: Tensor | None, exits: int) -> tuple[float, ...]:
    return (math.nan,) * exits if value_KN is None else tuple(value_KN.double().mean(dim=1).tolist())


def _eefp(evaluation: ExitEvaluation) -> tuple[float, ...]:
    return eefp_K(evaluation.confidence_KN.numpy(), evaluation.correct_KN.numpy())


_FAILURE: Final[Mapping[str, ExitMetric]] = {
    **{
        name: ExitMetric(
            label=LABELS[name], values=_at_every_exit(metric), better="lower" if name in LOWER_IS_BETTER else "higher"
        )
        for name, metric in RANKING_METRICS.items()
    },
    "brier": ExitMetric(
        label=LABELS["brier"], values=lambda found: _mean_at_every_exit(found.brier_KN, found.exits), kind="fine",
        better="lower",
    ),
    "nll": ExitMetric(
        label=LABELS["nll"], values=lambda found: _mean_at_every_exit(found.nll_KN, found.exits), kind="fine",
        better="lower",
    ),
    "eefp": ExitMetric(label=LABELS["eefp"], values=_eefp),
}  # fmt: skip

for _name, _metric in {**_OWN, **_FAILURE}.items():
    EXIT_METRICS.add(_name, _metric)


def all_exit_metrics() -> dict[str, ExitMetric]:
    """Return every metric per exit by name: clframe's in the order of this file, then others in alphabetical order."""
    found = dict(EXIT_METRICS.items())
    return {**{name: found[name] for name in (*_OWN, *_FAILURE)}, **found}


def compute_exit_metrics(evaluation: ExitEvaluation) -> dict[str, tuple[float, ...]]:
    """Compute every metric of :data:`EXIT_METRICS`, one value per exit.

    >>> import torch
    >>> found = compute_exit_metrics(ExitEvaluation(confidence_KN=torch.rand(2, 4), cost_K=(1, 2),
    ...     correct_KN=torch.tensor([[1, 0, 0, 1], [0, 1, 0, 1]])))
    >>> found["accuracy"], found["unique_accuracy"]
    ((0.5, 0.5), (0.25, 0.25))

    One of another package that raises an error or returns another number of values is NaN at every exit, with a
    warning: it does not end a run.
    """
    return {name: _values_of(name, metric, evaluation) for name, metric in all_exit_metrics().items()}


def _values_of(name: str, metric: ExitMetric, evaluation: ExitEvaluation) -> tuple[float, ...]:
    try:
        values = tuple(float(value) for value in metric.values(evaluation))
        count, exits = len(values), evaluation.exits
        problem = "" if count == exits else f"returned {count} values for {exits} exits"
    except ClframeError:
        raise
    except Exception as error:  # code of another package raises anything
        problem = f"raised {type(error).__name__} ({' '.join(str(error).split())})"
    if not problem:
        return values
    _log.warning("exit metric '%s': %s; it is recorded as undefined, return one number per exit", name, problem)
    return (math.nan,) * evaluation.exits


def static_accuracies(evaluation: ExitEvaluation, *, correct: Mapping[str, Tensor] | None = None) -> dict[str, float]:
    """Accuracy of the rules that use all exits: ``last``, ``confident``, ``oracle`` and those given.

    ``correct`` holds for each further rule, such as the mean of the exits' probabilities or their vote, whether it is
    right on each of the N samples; such rules need scores, which :class:`ExitEvaluation` does not store.
    """
    right = {
        "last": evaluation.correct_KN[-1],
        "confident": evaluation.correct_at(evaluation.most_confident_N()),
        "oracle": evaluation.correct_KN.any(dim=0),
    }
    for name, given_N in (correct or {}).items():
        if tuple(given_N.shape) != (evaluation.samples,):
            raise ClframeError(
                f"correct.{name}: found shape {tuple(given_N.shape)}; give one flag for each of "
                f"{evaluation.samples} samples"
            )
        right[name] = given_N.bool()
    return {name: int(right_N.sum()) / evaluation.samples for name, right_N in right.items()}


def forgetting_by_exit(accuracy_KTE: Sequence[Matrix]) -> tuple[Score, ...]:
    """:func:`clframe.metrics.forgetting` of each exit's accuracy matrix.

    >>> [score.value for score in forgetting_by_exit([[[0.5, 0.0], [0.25, 0.5]], [[1.0, 0.0], [0.5, 1.0]]])]
    [0.25, 0.5]
    """
    return tuple(forgetting(accuracy_TE) for accuracy_TE in accuracy_KTE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExitRecord:
    """All exits after one training experience, on the test samples of all experiences so far.

    Costs are fractions of the MACs of the bare backbone with its own classifier.
    """

    backbone_macs: int
    """MACs of one sample through the bare backbone and its own classifier, with the classes met so far."""
    macs_K: tuple[int, ...]
    """MACs of one sample up to and including each exit, with the heads passed on the way."""
    accuracy_KE: tuple[tuple[float, ...], ...]
    """Accuracy of each exit on every test experience, later ones included, when it predicts every sample."""
    nll_KE: tuple[tuple[float, ...], ...] = ()
    """Nats per token of each exit of a language model on every test experience; empty for classifiers."""
    metrics: Mapping[str, tuple[float, ...]]
    """One value per exit by name in :data:`EXIT_METRICS`."""
    static: Mapping[str, float] = field(default_factory=dict)
    """Accuracy of rules that use all exits: ``last``, ``confident``, ``mean``, ``vote``, ``oracle``."""
    curve: AccuracyCostCurve
    """Accuracy against cost over thresholds of the largest probability, shared by all exits."""
    points: BudgetPoints
    """Accuracy at budgets, thresholds chosen on validation samples."""
    share_PK: tuple[tuple[float, ...], ...] = ()
    """Share of samples that each exit predicts, at each of ``points``."""
    accuracy_PK: tuple[tuple[float, ...], ...] = ()
    """Accuracy of each exit on the samples that it predicts there; NaN where there are none."""
    similarity_K: tuple[float, ...] = ()
    """Linear CKA between each exit's tap now and after the first experience, on samples of the first."""
    simulated: str = ""
    """Reason why dynamic inference cannot skip computation with this strategy; empty where it can."""

    @property
    def accuracy_K(self) -> tuple[float, ...]:
        """Accuracy of each exit when it classifies every sample."""
        return self.metrics["accuracy"]

    @property
    def oracle_accuracy(self) -> float:
        """Share of samples that at least one exit classifies correctly: a perfect choice among the exits."""
        return self.static.get("oracle", math.nan)

    @property
    def overthinking(self) -> float:
        """Oracle accuracy minus the last exit's. Source: Kaya et al., "Shallow-Deep Networks" (2019)."""
        return self.oracle_accuracy - self.accuracy_K[-1]

    @property
    def overthinking_relative(self) -> float:
        """Overthinking over the last exit's accuracy; NaN where that is 0."""
        return self.overthinking / self.accuracy_K[-1] if self.accuracy_K[-1] else math.nan

    @classmethod
    def upgrade(cls, content: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the content of an older file, which had ``diagnostics``, in today's shape."""
        if "diagnostics" not in content:
            return content
        metrics = {
            name.removesuffix("_K"): values for name, values in content["diagnostics"].items() if name.endswith("_K")
        }
        return {**content, "metrics": metrics}

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> ExitRecord:
        """Rebuild the record from what ``dataclasses.asdict`` returned."""
        return read_record(cls, content, prefix="exits.")


def make_exit_record(
    test: ExitEvaluation,
    validation: ExitEvaluation | None,
    *,
    backbone_macs: int,
    accuracy_KE: tuple[tuple[float, ...], ...],
    correct: Mapping[str, Any],
    similarity_K: tuple[float, ...],
    rule: BudgetRule = "best",
    fallback: Fallback = "last",
    simulated: str = "",
    budgets: Sequence[float] = BUDGETS,
    most: int = 41,
    nll_KE: tuple[tuple[float, ...], ...] = (),
) -> ExitRecord:
    """Make the record of one evaluation.

    Args:
        test: Evaluation on the test samples of the experiences so far.
        validation: Evaluation on their validation samples, None where none are held out.
        backbone_macs: MACs of one sample in the bare backbone.
        accuracy_KE: Accuracy of each exit on every test experience.
        correct: For each further static rule, whether it is right on each test sample.
        similarity_K: See :class:`ExitRecord`.
        rule: Choice of the budget points' thresholds.
        fallback: Prediction of samples that reach no threshold, in the budget points and the curve.
        simulated: See :class:`ExitRecord`.
        budgets: Shares of the bare backbone's MACs with a budget point each.
        most: Largest number of thresholds in the curve.
        nll_KE: Nats per token of each exit of a language model on every test experience.
    """
    points = budget_points(
        validation, test, backbone_cost=backbone_macs, budgets=budgets, rule=rule, fallback=fallback
    )
    outcomes = [
        None
        if point.undefined
        else evaluate_thresholds(test, shared(point.threshold, exits=test.exits), fallback=fallback)
        for point in points.points or ()
    ]
    nothing = (float("nan"),) * test.exits
    return ExitRecord(
        backbone_macs=backbone_macs,
        macs_K=tuple(int(cost) for cost in test.cost_K),
        accuracy_KE=accuracy_KE,
        nll_KE=nll_KE,
        metrics=compute_exit_metrics(test),
        static=static_accuracies(test, correct=correct),
        curve=accuracy_cost_curve(test, backbone_cost=backbone_macs, most=most, fallback=fallback),
        points=points,
        share_PK=tuple(nothing if outcome is None else outcome.share_K for outcome in outcomes),
        accuracy_PK=tuple(nothing if outcome is None else outcome.accuracy_K for outcome in outcomes),
        similarity_K=similarity_K,
        simulated=simulated,
    )
