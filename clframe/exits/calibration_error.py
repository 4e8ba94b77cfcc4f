"""Calibration of probabilities: expected calibration error, negative log-likelihood, Brier score.

ECE uses bins (l, u]; the first one includes 0. Sources: Guo et al., "On Calibration of Modern Neural Networks" (2017,
bins of equal width); Nixon et al., "Measuring Calibration in Deep Learning" (2019, bins of equal mass).

Shape suffixes: N samples, C classes, G groups of equal confidence, R resamples, M bins.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clframe.errors import DataError
from clframe.exits.ranking import Floats, Ranking, cumulative_sum

BINS: Final = 15
"""Bins of ECE, as Guo et al. use."""


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
    sums_RM = cumulative_sum(ranking, gap_RG, n - edges)
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


def _precise(scores_NC: Tensor) -> Tensor:
    """Double precision, or single where the device (MPS) has no double."""
    return scores_NC.float() if scores_NC.device.type == "mps" else scores_NC.double()


def _require_probabilities(ranking: Ranking) -> None:
    low, high = ranking.confidence_G[-1], ranking.confidence_G[0]
    if low < 0 or high > 1 + 1e-6:
        raise DataError(f"calibration: found confidences from {low:g} to {high:g}; give probabilities")
