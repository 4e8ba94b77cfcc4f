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
from torch import Tensor

from clframe.errors import DataError
from clframe.exits.budgets import Method
from clframe.exits.calibration import Calibrated, Calibration
from clframe.exits.curves import AccuracyCostCurve, BudgetPoints, accuracy_cost_curve, budget_points
from clframe.exits.decisions import ExitEvaluation
from clframe.exits.diagnostics import ExitRecord
from clframe.exits.failure import mean_over_exits
from clframe.exits.learned import confidences, held_out_confidences
from clframe.exits.policies import fitted_class, restore_confidence
from clframe.exits.study import ExitScores, metrics_of
from clframe.nn.exit_ensemble import Single

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
            fitted, measured = evaluations(name, *pair, cost_K)
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
    weight_RV = _weights(variants, resamples=resamples, seed=seed)
    found = []
    for metric in METRICS:
        for gain in GAINS:
            x_V, y_V = _column(variants, metric, gain)
            rho, *rho_R = spearman(x_V, y_V, weight_RV)
            low, high = _limits(rho_R)
            count = int((~np.isnan(x_V) & ~np.isnan(y_V)).sum())
            found.append(Correlation(metric=metric, gain=gain, rho=rho, low=low, high=high, variants=count))
    return found


def difference(
    variants: Sequence[Variant], first: str, second: str, *, gain: str, resamples: int = 500, seed: int = 0
) -> Correlation:
    """|rho| of one metric minus |rho| of another with the same gain, with an interval from the same resamples."""
    weight_RV = _weights(variants, resamples=resamples, seed=seed)
    one_R, other_R = (np.abs(spearman(*_column(variants, metric, gain), weight_RV)) for metric in (first, second))
    gap, *gap_R = (one_R - other_R).tolist()
    low, high = _limits(gap_R)
    return Correlation(metric=f"{first} - {second}", gain=gain, rho=gap, low=low, high=high, variants=len(variants))


def spearman(x_V: NDArray[np.float64], y_V: NDArray[np.float64], weight_RV: NDArray[np.float64]) -> NDArray[np.float64]:
    """rho_R: Spearman correlation in each of R resamples, which are given as multiplicities of the V pairs.

    Ties have the mean of their ranks. Pairs with NaN are left out. NaN with fewer than three pairs, and where all
    values of one side are equal.

    >>> spearman(np.array([1.0, 2, 3]), np.array([2.0, 9, 5]), np.array([[1.0, 1, 1], [2, 0, 1]])).round(12).tolist()
    [0.5, 1.0]
    """
    defined_V = ~np.isnan(x_V) & ~np.isnan(y_V)
    x_V, y_V, weight_RV = x_V[defined_V], y_V[defined_V], weight_RV[:, defined_V]
    found = []
    for part_RV in np.array_split(weight_RV, max(1, weight_RV.size // 500_000)):  # bounds the memory
        # Ranks of n values have the mean (n + 1) / 2, ties or not.
        middle_R1 = (part_RV.sum(1, keepdims=True) + 1) / 2
        a_RV, b_RV = (_ranks(values_V, part_RV) - middle_R1 for values_V in (x_V, y_V))
        cross_R, a_R, b_R = ((part_RV * u * v).sum(1) for u, v in ((a_RV, b_RV), (a_RV, a_RV), (b_RV, b_RV)))
        known_R = (part_RV.sum(1) >= 3) & (a_R > 1e-9) & (b_R > 1e-9)
        found.append(np.divide(cross_R, np.sqrt(a_R * b_R), out=np.full(len(part_RV), nan), where=known_R))
    return np.concatenate(found)


def _ranks(values_V: NDArray[np.float64], weight_RV: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean rank of each value in each resample; of no meaning where its multiplicity is 0."""
    if not len(values_V):
        return weight_RV
    distinct, group_V = np.unique(values_V, return_inverse=True)
    order_V = np.argsort(group_V, kind="stable")
    first_G = np.searchsorted(group_V[order_V], np.arange(len(distinct)))
    count_RG = np.add.reduceat(weight_RV[:, order_V], first_G, axis=1)
    return np.asarray((np.cumsum(count_RG, axis=1) - (count_RG - 1) / 2)[:, group_V])


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


def evaluations(
    name: str, validation: ExitScores, test: ExitScores, cost_K: Sequence[int], *, method: Method = "shared"
) -> tuple[ExitEvaluation, ExitEvaluation]:
    """Validation and test under a measure, fitted on validation data where it has parameters.

    Thresholds are chosen on the former by ``method``, see :func:`~clframe.exits.learned.held_out_confidences`.
    """
    kind, y_N = fitted_class(name), torch.from_numpy(validation.y_N)
    held_out, tested = (
        [torch.from_numpy(np.array(scores_NC)) for scores_NC in scores.scores_KNC] for scores in (validation, test)
    )
    measure = restore_confidence(name, None, exits=len(held_out)) if kind is None else kind.fit(held_out, y_N)
    held_out_KN = held_out_confidences(measure, held_out, y_N, method=method)
    return (
        _evaluation(held_out_KN, held_out, validation.y_N, cost_K),
        _evaluation(confidences(measure, tested), tested, test.y_N, cost_K),
    )


def _evaluation(
    confidence_KN: Tensor, scores: Sequence[Tensor], y_N: NDArray[np.int64], cost_K: Sequence[int]
) -> ExitEvaluation:
    correct = []
    for scores_NC in scores:
        finite_N = scores_NC.softmax(1).amax(1).isfinite()  # NaN scores predict nothing
        correct.append((scores_NC.argmax(1) == torch.from_numpy(y_N)) & finite_N)
    return ExitEvaluation(confidence_KN=confidence_KN.double(), correct_KN=torch.stack(correct), cost_K=tuple(cost_K))


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


def _weights(variants: Sequence[Variant], *, resamples: int, seed: int) -> NDArray[np.float64]:
    """Multiplicity of each variant: once in the first row, then in each resample, where whole runs are drawn.

    One row for variants of one run: all resamples would be equal.
    """
    runs = {run: r for r, run in enumerate(sorted({variant.run for variant in variants}))}
    run_V = np.array([runs[variant.run] for variant in variants])
    if len(runs) < 2:
        return np.ones((1, len(variants)))
    chosen_RU = np.random.default_rng(seed).integers(len(runs), size=(resamples, len(runs)))
    flat = (chosen_RU + len(runs) * np.arange(resamples)[:, None]).ravel()
    count_RU = np.bincount(flat, minlength=resamples * len(runs)).reshape(resamples, len(runs))
    return np.concatenate([np.ones((1, len(variants))), count_RU[:, run_V]])


def _limits(values: Sequence[float]) -> tuple[float, float]:
    defined = [value for value in values if not isnan(value)]
    if len(defined) < 2:
        return nan, nan
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low), float(high)
