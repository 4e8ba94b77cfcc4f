"""Proxy study: which metric of exits follows the accuracy that early exit really reaches.

A variant is one set of exit scores: a run at its end under one calibration and confidence measure, or a run after one
experience. For each metric, the mean over exits is correlated (Spearman) with the realized gain over all variants; the
claim to test is that failure prediction follows gains more closely than calibration does. Variants of one run are not
independent, so intervals resample runs, not variants.

Shape suffixes: C classes, K exits, N samples, V variants.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from clframe.errors import DataError
from clframe.exits.calibration import Calibrated, Calibration
from clframe.exits.curves import AccuracyCostCurve, BudgetPoints, accuracy_cost_curve, budget_points
from clframe.exits.decisions import ExitEvaluation
from clframe.exits.diagnostics import ExitRecord
from clframe.exits.failure import mean_over_exits
from clframe.exits.policies import ConfidenceMeasure, fitted_class, restore_confidence
from clframe.exits.study import ExitScores, metrics_of
from clframe.nn.network import Carried, Single

METRICS: Final = (
    "ece", "ece_equal_mass", "brier", "nll", "auroc", "fpr95", "aurc", "e_aurc", "augrc", "e_augrc", "cov_at_5_risk",
    "risk_at_80_cov", "eefp", "accuracy",
)  # fmt: skip
"""Metrics compared; ``accuracy`` of the exits is the obvious rival."""

GAIN_LABELS: Final[Mapping[str, str]] = {
    "accuracy_25": "accuracy at 25 %",
    "accuracy_50": "accuracy at 50 %",
    "accuracy_75": "accuracy at 75 %",
    "area": "area under accuracy-cost curve",
    "gain_50": "accuracy at 50 % minus last exit's",
}
"""Realized gains by name, with their labels in tables and figures."""

GAINS: Final = tuple(GAIN_LABELS)
"""Names of the realized gains."""

CALIBRATIONS: Final[tuple[Calibration, ...]] = ("none", "temperature", "vector", "isotonic")
MEASURES: Final = ("max_probability", "entropy", "margin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One set of exit scores with its metrics and realized gains."""

    run: str
    label: str
    """Calibration and measure, or the experience."""
    metrics: Mapping[str, float]
    """Mean over exits of each metric, over those that define it."""
    gains: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Correlation:
    """Spearman correlation of a metric with a gain over variants, or the difference of two absolute correlations."""

    metric: str
    """A metric, or ``first - second`` for a difference."""
    gain: str
    rho: float
    low: float
    high: float
    """Ends of the 95 % interval over resampled runs; NaN for one run."""
    variants: int


def variants_of_scores(
    run: str,
    validation: ExitScores,
    test: ExitScores,
    *,
    cost_K: Sequence[int],
    backbone_cost: float,
    calibrations: Sequence[Calibration] = CALIBRATIONS,
    measures: Sequence[str] = MEASURES,
) -> list[Variant]:
    """Variants of one run at its end: every calibration, fitted on validation data, under every confidence measure."""
    found = []
    for kind in calibrations:
        pair = _calibrate(kind, validation, test)
        for name in measures:
            measure = _measure(name, pair[0])
            fitted, measured = (_evaluation(scores, measure, cost_K) for scores in pair)
            everything = np.ones(len(pair[1]), dtype=bool)
            metrics = metrics_of(pair[1], measured, everything)
            points = budget_points(fitted, measured, backbone_cost=backbone_cost)
            curve = accuracy_cost_curve(measured, backbone_cost=backbone_cost)
            found.append(
                Variant(run=run, label=f"{kind}, {name}", metrics=_means(metrics), gains=_gains(points, curve, metrics))
            )
    return found


def variants_of_records(run: str, records: Sequence[ExitRecord]) -> list[Variant]:
    """Variants of one run after each experience, from its results."""
    return [
        Variant(
            run=run, label=f"experience {e}", metrics=_means(record.metrics),
            gains=_gains(record.points, record.curve, record.metrics),
        )
        for e, record in enumerate(records)
    ]  # fmt: skip


def correlations(variants: Sequence[Variant], *, resamples: int = 500, seed: int = 0) -> list[Correlation]:
    """Spearman correlation of every metric with every gain.

    Raises:
        DataError: Fewer than three variants.
    """
    if len(variants) < 3:
        raise DataError(f"proxy: found {len(variants)} variants; give at least 3, better 100")
    draws = _draws(variants, resamples=resamples, seed=seed)
    found = []
    for metric in METRICS:
        for gain in GAINS:
            x_V, y_V = _column(variants, metric, gain)
            values = [_spearman(x_V[index], y_V[index]) for index in draws]
            low, high = _limits(values)
            count = int((~np.isnan(x_V) & ~np.isnan(y_V)).sum())
            found.append(
                Correlation(metric=metric, gain=gain, rho=_spearman(x_V, y_V), low=low, high=high, variants=count)
            )
    return found


def difference(
    variants: Sequence[Variant], first: str, second: str, *, gain: str, resamples: int = 500, seed: int = 0
) -> Correlation:
    """|rho| of one metric minus |rho| of another with the same gain, with an interval from the same resamples."""
    one, other = _column(variants, first, gain), _column(variants, second, gain)

    def value(index: NDArray[np.int64] | slice) -> float:
        return abs(_spearman(one[0][index], one[1][index])) - abs(_spearman(other[0][index], other[1][index]))

    values = [value(index) for index in _draws(variants, resamples=resamples, seed=seed)]
    low, high = _limits(values)
    return Correlation(
        metric=f"{first} - {second}", gain=gain, rho=value(slice(None)), low=low, high=high, variants=len(variants)
    )


def _calibrate(kind: Calibration, validation: ExitScores, test: ExitScores) -> tuple[ExitScores, ExitScores]:
    if kind == "none":
        return validation, test
    exits = len(validation.scores_KNC)
    calibrated = Calibrated(Single(), kind, exits=exits)
    fitting = [torch.from_numpy(np.array(scores_NC)) for scores_NC in validation.scores_KNC]
    calibrated.fit(fitting, torch.from_numpy(validation.y_N))

    def apply(scores: ExitScores) -> ExitScores:
        mapped = [
            calibrated.calibrate(exit, torch.from_numpy(np.array(scores_NC))).numpy()
            for exit, scores_NC in enumerate(scores.scores_KNC)
        ]
        return ExitScores(np.stack(mapped), scores.y_N, scores.experience_N)

    return apply(validation), apply(test)


def _measure(name: str, validation: ExitScores) -> ConfidenceMeasure:
    """The measure of a name, fitted on validation data where it has parameters."""
    kind = fitted_class(name)
    if kind is None:
        return restore_confidence(name, None, exits=len(validation.scores_KNC))
    scores = [torch.from_numpy(np.array(scores_NC)) for scores_NC in validation.scores_KNC]
    return kind.fit(scores, torch.from_numpy(validation.y_N))


def _evaluation(scores: ExitScores, measure: ConfidenceMeasure, cost_K: Sequence[int]) -> ExitEvaluation:
    confidences, correct = [], []
    carried: Carried = ()
    for exit, scores_NC in enumerate(scores.scores_KNC):
        tensor_NC = torch.from_numpy(np.array(scores_NC))
        confidence_N, carried = measure(exit, tensor_NC, carried)
        confidences.append(confidence_N)
        finite_N = tensor_NC.softmax(1).amax(1).isfinite()  # NaN scores predict nothing
        correct.append((tensor_NC.argmax(1) == torch.from_numpy(scores.y_N)) & finite_N)
    return ExitEvaluation(
        confidence_KN=torch.stack(confidences).double(), correct_KN=torch.stack(correct), cost_K=tuple(cost_K)
    )


def _means(metrics: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: mean_over_exits(values) for name, values in metrics.items()}


def _gains(points: BudgetPoints, curve: AccuracyCostCurve, metrics: Mapping[str, Sequence[float]]) -> dict[str, float]:
    at = {point.name: point.accuracy for point in points.points or ()}
    gains = {f"accuracy_{share}": at.get(f"{share}%", nan) for share in (25, 50, 75)}
    gains["area"] = area(curve)
    gains["gain_50"] = gains["accuracy_50"] - metrics["accuracy"][-1]
    return gains


def area(curve: AccuracyCostCurve) -> float:
    """Mean accuracy over costs from the cheapest to the dearest point of the curve, by trapezoids."""
    order = np.argsort(curve.costs, kind="stable")
    cost_P, accuracy_P = np.asarray(curve.costs)[order], np.asarray(curve.accuracies)[order]
    span = cost_P[-1] - cost_P[0]
    if span <= 0:
        return float(accuracy_P.mean())
    return float(((accuracy_P[1:] + accuracy_P[:-1]) / 2 * np.diff(cost_P)).sum() / span)


def _column(variants: Sequence[Variant], metric: str, gain: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x_V = np.array([variant.metrics.get(metric, nan) for variant in variants], dtype=np.float64)
    y_V = np.array([variant.gains.get(gain, nan) for variant in variants], dtype=np.float64)
    return x_V, y_V


def _draws(variants: Sequence[Variant], *, resamples: int, seed: int) -> list[NDArray[np.int64]]:
    """Indices of variants in each resample: whole runs are drawn with replacement. None of one run: all are equal."""
    runs = sorted({variant.run for variant in variants})
    if len(runs) < 2:
        return []
    members = {run: np.array([v for v, variant in enumerate(variants) if variant.run == run]) for run in runs}
    generator = np.random.default_rng(seed)
    chosen_RU = generator.integers(len(runs), size=(resamples, len(runs)))
    return [np.concatenate([members[runs[u]] for u in chosen_U]) for chosen_U in chosen_RU]


def _spearman(x_V: NDArray[np.float64], y_V: NDArray[np.float64]) -> float:
    from scipy.stats import rankdata

    defined_V = ~np.isnan(x_V) & ~np.isnan(y_V)
    if defined_V.sum() < 3:
        return nan
    x_V, y_V = rankdata(x_V[defined_V]), rankdata(y_V[defined_V])
    if x_V.std() == 0 or y_V.std() == 0:
        return nan
    return float(np.corrcoef(x_V, y_V)[0, 1])


def _limits(values: Sequence[float]) -> tuple[float, float]:
    defined = [value for value in values if not isnan(value)]
    if len(defined) < 2:
        return nan, nan
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low), float(high)
