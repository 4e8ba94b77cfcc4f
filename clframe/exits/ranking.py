"""Rankings of samples by confidence, with exact ties, and the metrics that are functions of one.

A *ranking* is samples grouped by equal confidence, in descending order of confidence. Inside a group the order is
undefined, so a metric that depends on it takes the expectation over random orders; no result depends on the order in
which samples arrive. A metric that is undefined, such as AUROC where all predictions are correct, is NaN.

Conventions that differ between libraries:

- AURC and AUGRC are means over k = 1..n. torch-uncertainty integrates by trapezoids between coverage 1/n and 1 and
  rescales by n / (n - 1); fd-shifts integrates from coverage 0 and multiplies by 1,000.
- E-AURC subtracts the exact AURC of the best order of n samples; fd-shifts subtracts its limit for large n,
  err + (1 - err) ln(1 - err).
- FPR95 is the smallest false positive rate among thresholds whose true positive rate is at least 0.95; fd-shifts
  takes 0.9495.

Sources: Geifman et al., "Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers" (2019, AURC, E-AURC); Traub
et al., "Overcoming Common Flaws in the Evaluation of Selective Classification Systems" (2024, AUGRC).

Shape suffixes: N samples, G groups of equal confidence, R resamples.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, nan
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clframe.errors import DataError

Floats = NDArray[np.float64]


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
    return cumulative_sum(ranking, ranking.errors_RG, np.array([taken]))[:, 0] / taken


def cumulative_sum(ranking: Ranking, value_RG: Floats, positions: NDArray[Any]) -> Floats:
    """Sum of ``value`` over the first samples up to each position, linear inside a group."""
    end_RG = np.cumsum(ranking.count_RG, axis=1)
    total_RG = np.cumsum(value_RG, axis=1)
    return np.stack([
        np.interp(positions, np.concatenate([[0.0], end_G]), np.concatenate([[0.0], total_G]))
        for end_G, total_G in zip(end_RG, total_RG, strict=True)
    ])  # fmt: skip


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
