"""Bootstrap intervals of the metrics of confidence and correctness.

Shape suffixes: N samples, G groups of equal confidence, R resamples.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import nan
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clframe.exits.failure import RANKING_METRICS
from clframe.exits.ranking import Floats, Ranking, rank

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
