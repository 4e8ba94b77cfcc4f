"""Calibration and failure prediction of exits: confidence against correctness, with exact ties.

Every metric is a function of a *ranking*: samples grouped by equal confidence, in descending order of confidence.
Inside a group the order is undefined, so a metric that depends on it takes the expectation over random orders; no
result depends on the order in which samples arrive. A metric that is undefined (one class of outcomes only,
confidences that are not finite) is NaN; :func:`undefined_reason` has the reason.

Conventions that differ between libraries:

- AURC and AUGRC are means over k = 1..n. torch-uncertainty integrates by trapezoids between coverage 1/n and 1 and
  rescales by n / (n - 1); fd-shifts integrates from coverage 0 and multiplies by 1,000.
- E-AURC subtracts the exact AURC of the best order of n samples; fd-shifts subtracts its limit for large n,
  err + (1 - err) ln(1 - err).
- FPR95 is the smallest false positive rate among thresholds whose true positive rate is at least 0.95; fd-shifts
  takes 0.9495.
- ECE uses bins (l, u] of equal width; the first one includes 0.

Sources: Geifman et al., "Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers" (2019, AURC, E-AURC); Traub
et al., "Overcoming Common Flaws in the Evaluation of Selective Classification Systems" (2024, AUGRC); Guo et al., "On
Calibration of Modern Neural Networks" (2017, ECE); Nixon et al., "Measuring Calibration in Deep Learning" (2019, equal
mass). The target of early-exit failure prediction is second-hand, see :func:`failure_targets`.

Shape suffixes: N samples, G groups of equal confidence, K exits, R resamples, M bins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isnan, nan
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from clframe.errors import DataError

Floats = NDArray[np.float64]

BINS: Final = 15
"""Bins of ECE, as Guo et al. use."""


@dataclass(frozen=True, eq=False)
class Ranking:
    """Samples grouped by equal confidence, the most confident group first; one row per resample.

    Attributes:
        confidence_G: Confidence of each group, descending.
        count_RG: Samples of each group; 0 where a resample has none.
        correct_RG: How many of them are correct.
    """

    confidence_G: Floats
    count_RG: Floats
    correct_RG: Floats

    @property
    def n(self) -> int:
        """Number of samples of each resample."""
        return round(float(self.count_RG[0].sum()))

    @property
    def errors_RG(self) -> Floats:
        """Number of wrong samples of each group."""
        return self.count_RG - self.correct_RG


def rank(confidence_N: ArrayLike, correct_N: ArrayLike, *, weight_RN: ArrayLike | None = None) -> Ranking:
    """Group samples by confidence.

    Args:
        confidence_N: Larger means more confident; any finite numbers.
        correct_N: Whether each prediction is correct (or, for EEFP, its target).
        weight_RN: Multiplicity of each sample in each resample; None: one resample with each sample once.

    Raises:
        DataError: No samples, lengths that differ, or a confidence that is not finite.

    >>> ranking = rank([0.9, 0.5, 0.9], [True, False, False])
    >>> ranking.confidence_G.tolist(), ranking.count_RG.tolist(), ranking.correct_RG.tolist()
    ([0.9, 0.5], [[2.0, 1.0]], [[1.0, 0.0]])
    """
    values_N, right_N = np.asarray(confidence_N, dtype=np.float64), np.asarray(correct_N, dtype=np.float64)
    if values_N.ndim != 1 or values_N.shape != right_N.shape or not len(values_N):
        raise DataError(f"confidence: found shapes {values_N.shape} and {right_N.shape}; give one of each per sample")
    if not np.isfinite(values_N).all():
        raise DataError("confidence: found values that are not finite; leave these samples out")
    order_N = np.argsort(-values_N, kind="stable")
    sorted_N = values_N[order_N]
    first_G = np.flatnonzero(np.concatenate([[True], sorted_N[1:] != sorted_N[:-1]]))
    weights_RN = np.ones((1, len(values_N)))
    if weight_RN is not None:
        weights_RN = np.asarray(weight_RN, dtype=np.float64)[:, order_N]
    if len(first_G) == len(sorted_N):  # no ties: every group is one sample
        return Ranking(sorted_N, weights_RN, weights_RN * right_N[order_N])
    return Ranking(
        sorted_N[first_G],
        np.add.reduceat(weights_RN, first_G, axis=1),
        np.add.reduceat(weights_RN * right_N[order_N], first_G, axis=1),
    )


# --- ranking metrics: functions of a Ranking, one value per resample ------------------------------


def auroc(ranking: Ranking) -> Floats:
    """AUROC_R of confidence against correctness: P(correct ranked above wrong) + P(tie) / 2."""
    right_RG, wrong_RG = ranking.correct_RG, ranking.errors_RG
    rights_R, wrongs_R = right_RG.sum(1), wrong_RG.sum(1)
    below_RG = wrongs_R[:, None] - np.cumsum(wrong_RG, axis=1)
    return _ratio((right_RG * (below_RG + wrong_RG / 2)).sum(1), rights_R * wrongs_R)


def fpr95(ranking: Ranking, *, tpr: float = 0.95) -> Floats:
    """Smallest share of wrong predictions above a threshold that keeps at least ``tpr`` of the correct ones."""
    right_RG, wrong_RG = np.cumsum(ranking.correct_RG, axis=1), np.cumsum(ranking.errors_RG, axis=1)
    # Counts are whole numbers: the tolerance covers only the rounding of tpr * count.
    enough_RG = right_RG >= tpr * right_RG[:, -1:] - 1e-9
    at_R = enough_RG.argmax(axis=1)[:, None]
    rate_R = _ratio(np.take_along_axis(wrong_RG, at_R, axis=1)[:, 0], wrong_RG[:, -1])
    return np.where(right_RG[:, -1] > 0, rate_R, nan)


def aurc(ranking: Ranking) -> Floats:
    """Area under the risk-coverage curve: mean over k of the error rate among the k most confident samples.

    In a group of m samples with e errors, after n0 samples with E0 errors, the expected error count of the first j is
    E0 + j e / m, so the group adds e + (E0 - n0 e / m) (H(n0 + m) - H(n0)) with the harmonic numbers H.
    """
    count_RG, errors_RG = ranking.count_RG, ranking.errors_RG
    end_RG = np.cumsum(count_RG, axis=1)
    start_RG = end_RG - count_RG
    before_RG = np.cumsum(errors_RG, axis=1) - errors_RG
    spread_RG = np.diff(_harmonic(ranking.n)[np.rint(end_RG).astype(np.int64)], axis=1, prepend=0.0)
    rate_RG = errors_RG / np.maximum(count_RG, 1)
    return np.asarray((errors_RG + (before_RG - start_RG * rate_RG) * spread_RG).sum(1) / ranking.n)


def e_aurc(ranking: Ranking) -> Floats:
    """Excess AURC: AURC minus that of the best order, in which every correct prediction precedes every wrong one."""
    return aurc(ranking) - _best_aurc(ranking)


def augrc(ranking: Ranking) -> Floats:
    """Area under the generalized risk-coverage curve: mean over k of (errors among the k most confident) / n."""
    count_RG, errors_RG = ranking.count_RG, ranking.errors_RG
    before_RG = np.cumsum(errors_RG, axis=1) - errors_RG
    return np.asarray((count_RG * before_RG + errors_RG * (count_RG + 1) / 2).sum(1) / ranking.n**2)


def e_augrc(ranking: Ranking) -> Floats:
    """Excess AUGRC: AUGRC minus that of the best order, err (err + 1 / n) / 2."""
    errors_R = ranking.errors_RG.sum(1)
    return np.asarray(augrc(ranking) - errors_R * (errors_R + 1) / 2 / ranking.n**2)


def coverage_at_risk(ranking: Ranking, *, risk: float = 0.05) -> Floats:
    """Largest coverage of a threshold whose error rate is at most ``risk``; 0 where no threshold has one."""
    count_RG, errors_RG = np.cumsum(ranking.count_RG, axis=1), np.cumsum(ranking.errors_RG, axis=1)
    within_RG = errors_RG <= risk * count_RG + 1e-9
    return np.asarray(np.where(within_RG, count_RG, 0.0).max(1) / ranking.n)


def risk_at_coverage(ranking: Ranking, *, coverage: float = 0.8) -> Floats:
    """Expected error rate of the ``ceil(coverage n)`` most confident samples."""
    taken = ceil(coverage * ranking.n - 1e-9)
    return _cumulative(ranking, ranking.errors_RG, np.array([taken]))[:, 0] / taken


# --- calibration ----------------------------------------------------------------------------------


def ece(ranking: Ranking, *, bins: int = BINS) -> Floats:
    """Expected calibration error, bins of equal width: sum over bins of share x |accuracy - mean confidence|.

    Confidences are probabilities in [0, 1].
    """
    _require_probabilities(ranking)
    bin_G = bin_of(ranking.confidence_G, bins=bins)
    first_M = np.flatnonzero(np.concatenate([[True], bin_G[1:] != bin_G[:-1]]))  # groups are sorted: bins are runs
    gap_RG = ranking.correct_RG - ranking.count_RG * ranking.confidence_G
    return np.asarray(np.abs(np.add.reduceat(gap_RG, first_M, axis=1)).sum(1) / ranking.n)


def bin_of(confidence_N: Floats, *, bins: int = BINS) -> NDArray[np.int64]:
    """Index of the bin (l, u] of each probability; 0 belongs to the first one."""
    # The tolerance is for edges such as 3 * (1 / 15), which floating point does not hit.
    return np.asarray(np.clip(np.ceil(confidence_N * bins - 1e-12).astype(np.int64) - 1, 0, bins - 1))


def ece_equal_mass(ranking: Ranking, *, bins: int = BINS) -> Floats:
    """Expected calibration error, bins of equal numbers of samples (the first n mod M bins hold one more).

    A group of equal confidences that crosses an edge is divided in proportion.
    """
    _require_probabilities(ranking)
    n = ranking.n
    edges = np.cumsum([0, *(n // bins + (m < n % bins) for m in range(bins))])
    gap_RG = ranking.correct_RG - ranking.count_RG * ranking.confidence_G
    # Bins run from the least confident sample, as in torch-uncertainty: count positions from the other end.
    sums_RM = _cumulative(ranking, gap_RG, n - edges)
    return np.asarray(np.abs(np.diff(sums_RM, axis=1)).sum(1) / n)


def nll_N(scores_NC: Tensor, y_N: Tensor) -> Tensor:
    """Negative log-likelihood of each sample in nats, ``-log softmax(scores)[y]``; infinite for a class without one."""
    known_N = y_N < scores_NC.shape[1]
    found_N = -_precise(scores_NC).log_softmax(1).gather(1, y_N.where(known_N, 0)[:, None])[:, 0]
    return found_N.where(known_N, torch.inf)


def brier_N(scores_NC: Tensor, y_N: Tensor) -> Tensor:
    """Brier score of each sample: sum over classes of (p_c - 1[c = y])^2, from 0 to 2."""
    p_NC, known_N = _precise(scores_NC).softmax(1), y_N < scores_NC.shape[1]
    target_N = p_NC.gather(1, y_N.where(known_N, 0)[:, None])[:, 0].where(known_N, 0.0)
    return p_NC.square().sum(1) + 1 - 2 * target_N


# --- failure prediction for early exits -----------------------------------------------------------


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


# --- all metrics by name --------------------------------------------------------------------------

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


_MERGEABLE: Final = frozenset(RANKING_METRICS) - {"ece", "ece_equal_mass", "cov_at_5_risk"}
"""Metrics that stay the same when neighboring groups of only correct, or only wrong, predictions are merged."""


def bootstrap(
    confidence_N: ArrayLike,
    correct_N: ArrayLike,
    *,
    metric: str,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap interval of a metric: samples are drawn with replacement, ``resamples`` times.

    Samples are sorted once; a resample is the number of times that each of them was drawn. Resamples in which the
    metric is undefined are left out.

    Args:
        confidence_N: As for :func:`rank`.
        correct_N: As for :func:`rank`.
        metric: A name in :data:`RANKING_METRICS`.
        resamples: Number of resamples.
        level: Probability that the interval covers.
        seed: Of the resamples: the same seed gives the same interval.

    Returns:
        Lower and upper limit; NaN where no resample defines the metric or a confidence is not finite.

    Raises:
        DataError: No samples, or lengths that differ.
    """
    values_N, right_N = np.asarray(confidence_N, dtype=np.float64), np.asarray(correct_N, dtype=bool)
    if values_N.shape == right_N.shape and not np.isfinite(values_N).all():
        return nan, nan
    group_N, confidence_G = _groups(values_N, right_N, merge=metric in _MERGEABLE)
    found_R = np.concatenate([
        RANKING_METRICS[metric](Ranking(confidence_G, *counted))
        for counted in _resampled(group_N, right_N, len(confidence_G), resamples=resamples, seed=seed)
    ])  # fmt: skip
    found_R = found_R[~np.isnan(found_R)]
    if not len(found_R):
        return nan, nan
    low, high = np.quantile(found_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _groups(values_N: Floats, right_N: NDArray[np.bool_], *, merge: bool) -> tuple[NDArray[np.intp], Floats]:
    """Group of each sample, and confidence_G of the groups, descending.

    Args:
        values_N: Confidences.
        right_N: Whether each prediction is correct.
        merge: Merge neighboring groups of only correct, or of only wrong, predictions.
    """
    ranking = rank(values_N, right_N)
    first_G = np.ones(len(ranking.confidence_G), dtype=bool)
    if merge:
        right_G, wrong_G = ranking.correct_RG[0] > 0, ranking.errors_RG[0] > 0
        mixed_G = right_G & wrong_G
        first_G[1:] = mixed_G[1:] | mixed_G[:-1] | (right_G[1:] != right_G[:-1])
    at_N = np.searchsorted(-ranking.confidence_G, -values_N)
    return (np.cumsum(first_G) - 1)[at_N], ranking.confidence_G[first_G]


def _resampled(
    group_N: NDArray[np.intp], right_N: NDArray[np.bool_], groups: int, *, resamples: int, seed: int
) -> Iterator[tuple[Floats, Floats]]:
    """count_RG and correct_RG of resamples, in portions: memory stays near 50 MB whatever the number of samples."""
    generator, count = np.random.default_rng(seed), len(group_N)
    key_N = (2 * group_N + right_N).astype(np.int32)
    portion = max(1, 500_000 // count)
    for start in range(0, resamples, portion):
        rows = min(portion, resamples - start)
        index_RN = generator.integers(count, size=(rows, count), dtype=np.int32)
        flat_RN = key_N[index_RN] + (2 * groups * np.arange(rows, dtype=np.int32))[:, None]
        counted = np.bincount(flat_RN.ravel(), minlength=2 * groups * rows).reshape(rows, groups, 2).astype(np.float64)
        yield counted.sum(2), counted[:, :, 1]


def _precise(scores_NC: Tensor) -> Tensor:
    """Double precision, or single where the device (MPS) has no double."""
    return scores_NC.float() if scores_NC.device.type == "mps" else scores_NC.double()


def _ratio(above_R: Floats, below_R: Floats) -> Floats:
    """Divide; NaN where ``below_R`` is 0."""
    return np.divide(above_R, below_R, out=np.full_like(above_R, nan), where=below_R > 0)


def _harmonic(n: int) -> Floats:
    """H(0) .. H(n)."""
    return np.concatenate([[0.0], np.cumsum(1 / np.arange(1, n + 1))])


def _best_aurc(ranking: Ranking) -> Floats:
    """Sum over the wrong predictions, which come last: (1 / n) sum_{j=1..e} j / (n - e + j)."""
    n, harmonic = ranking.n, _harmonic(ranking.n)
    errors_R = ranking.errors_RG.sum(1)
    right_R = np.rint(n - errors_R).astype(np.int64)
    return np.asarray((errors_R - right_R * (harmonic[n] - harmonic[right_R])) / n)


def _cumulative(ranking: Ranking, value_RG: Floats, positions: NDArray[Any]) -> Floats:
    """Sum of ``value`` over the first samples up to each position, linear inside a group."""
    end_RG = np.cumsum(ranking.count_RG, axis=1)
    total_RG = np.cumsum(value_RG, axis=1)
    return np.stack([
        np.interp(positions, np.concatenate([[0.0], end_G]), np.concatenate([[0.0], total_G]))
        for end_G, total_G in zip(end_RG, total_RG, strict=True)
    ])  # fmt: skip


def _require_probabilities(ranking: Ranking) -> None:
    low, high = ranking.confidence_G[-1], ranking.confidence_G[0]
    if low < 0 or high > 1 + 1e-6:
        raise DataError(f"calibration: found confidences from {low:g} to {high:g}; give probabilities")
