"""Calibration and failure prediction of exits: every metric of confidence and correctness by its name in results.

The metrics of a ranking and their conventions are in :mod:`clframe.exits.ranking`, those of probabilities in
:mod:`clframe.exits.calibration_error`. Early-exit failure prediction (EEFP) is defined here; its target is second-hand,
see :func:`failure_targets`. A metric that is undefined (one class of outcomes only, confidences that are not finite) is
NaN; :func:`undefined_reason` has the reason.

Shape suffixes: N samples, K exits, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isnan, nan
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clframe.exits.calibration_error import ece, ece_equal_mass
from clframe.exits.ranking import (
    Floats,
    Ranking,
    augrc,
    aurc,
    auroc,
    coverage_at_risk,
    e_augrc,
    e_aurc,
    fpr95,
    rank,
    risk_at_coverage,
)


def failure_targets(correct_KN: ArrayLike) -> NDArray[np.bool_]:
    """target_KN of early-exit failure prediction: whether stopping at exit k is right, or continuing is futile.

    e_k = 1 if exit k is correct, or if every later exit is wrong; e_k = 0 only where exit k is wrong and a later exit
    is correct. At the last exit it is 1 for every sample. The definition is taken from summaries of the paper, whose
    text was not available.

    >>> failure_targets([[0, 0, 1], [1, 0, 0], [0, 0, 1]]).astype(int).tolist()
    [[0, 1, 1], [1, 1, 0], [1, 1, 1]]
    """
    right_KN = np.asarray(correct_KN, dtype=bool)
    later_KN = np.zeros_like(right_KN)
    for exit in range(len(right_KN) - 2, -1, -1):
        later_KN[exit] = later_KN[exit + 1] | right_KN[exit + 1]
    return np.asarray(right_KN | ~later_KN)


def eefp_K(confidence_KN: ArrayLike, correct_KN: ArrayLike) -> tuple[float, ...]:
    """EEFP of each exit: AUROC of its confidence against :func:`failure_targets`.

    NaN at the last exit, and at exits with a confidence that is not finite.
    """
    targets_KN = failure_targets(correct_KN)
    return tuple(
        float(auroc(rank(confidence_N, target_N))[0]) if np.isfinite(confidence_N).all() else nan
        for confidence_N, target_N in zip(np.asarray(confidence_KN), targets_KN, strict=True)
    )


RANKING_METRICS: Final[Mapping[str, Callable[[Ranking], Floats]]] = {
    "ece": ece,
    "ece_equal_mass": ece_equal_mass,
    "auroc": auroc,
    "fpr95": fpr95,
    "aurc": aurc,
    "e_aurc": e_aurc,
    "augrc": augrc,
    "e_augrc": e_augrc,
    "cov_at_5_risk": coverage_at_risk,
    "risk_at_80_cov": risk_at_coverage,
}
"""Metrics of confidence and correctness, by the names that results use; the definitions are in their docstrings."""

LOWER_IS_BETTER: Final = frozenset(
    {"ece", "ece_equal_mass", "brier", "nll", "fpr95", "aurc", "e_aurc", "augrc", "e_augrc", "risk_at_80_cov"}
)
"""Metrics that a better exit has less of."""

LABELS: Final[Mapping[str, str]] = {
    "ece": "ECE",
    "ece_equal_mass": "ECE, equal mass",
    "brier": "Brier score",
    "nll": "NLL, nats",
    "auroc": "AUROC",
    "fpr95": "FPR95",
    "aurc": "AURC",
    "e_aurc": "E-AURC",
    "augrc": "AUGRC",
    "e_augrc": "E-AUGRC",
    "cov_at_5_risk": "Cov@5Risk",
    "risk_at_80_cov": "Risk@80Cov",
    "eefp": "EEFP",
}
"""Names in tables and figures."""

UNDEFINED: Final[Mapping[str, str]] = {
    "auroc": "all predictions are correct, or all are wrong",
    "fpr95": "all predictions are correct, or all are wrong",
    "eefp": "no sample can gain from a later exit, or every sample can",
}
"""Reasons for NaN on finite confidences, by metric."""


def undefined_reason(metric: str, values: Mapping[str, Sequence[float]], *, exit: int) -> str:
    """Reason why a metric is NaN at an exit, given the values of all metrics, one per exit."""
    exits = len(values[metric])
    if metric == "eefp" and exit == exits - 1:
        return "there is no later exit"
    # AURC is defined for any samples with finite confidences.
    if isnan(values.get("aurc", (nan,) * exits)[exit]):
        return "no samples" if isnan(values["accuracy"][exit]) else "confidences are not finite"
    return UNDEFINED.get(metric, "not recorded")


def mean_over_exits(values: Sequence[float]) -> float:
    """Mean over the exits that define a metric; NaN where none does.

    >>> mean_over_exits([0.5, 0.75, float("nan")])
    0.625
    """
    defined = [value for value in values if not isnan(value)]
    return sum(defined) / len(defined) if defined else nan


def failure_metrics(confidence_N: ArrayLike, correct_N: ArrayLike) -> dict[str, float]:
    """All metrics of :data:`RANKING_METRICS` for one exit; NaN where a confidence is not finite.

    >>> found = failure_metrics([0.9, 0.8, 0.6, 0.55], [1, 1, 0, 1])
    >>> round(found["auroc"], 4), round(found["aurc"], 4), found["cov_at_5_risk"]
    (0.6667, 0.1458, 0.5)
    """
    if not np.isfinite(np.asarray(confidence_N, dtype=np.float64)).all():
        return dict.fromkeys(RANKING_METRICS, nan)
    ranking = rank(confidence_N, correct_N)
    return {name: float(metric(ranking)[0]) for name, metric in RANKING_METRICS.items()}
