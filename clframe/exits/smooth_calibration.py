"""Smooth calibration error: a calibration error without bins.

Source: Błasiok and Nakkiran, "Smooth ECE: Principled Reliability Diagrams via Kernel Smoothing" (2023). Their package
relplot adds a small constant to the density and searches the bandwidth in 10 steps; its numbers differ by up to 0.001.

Shape suffixes: N samples, M cells.
"""

from __future__ import annotations

from math import isfinite, nan, pi
from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clframe.errors import DataError

CELLS: Final = 4096
"""Cells of [0, 1] in which confidences are counted."""

NARROWEST: Final = 1e-4
"""Smallest bandwidth that is searched."""


def smooth_ece(confidence_N: ArrayLike, correct_N: ArrayLike) -> float:
    """The bandwidth that equals the smoothed calibration error at that bandwidth.

    The residuals ``correct - confidence`` are smoothed over confidence with a Gaussian that is reflected at 0 and 1;
    the error at bandwidth sigma is the integral over [0, 1] of the absolute value of
    ``r(t) = (1 / n) sum_i (correct_i - confidence_i) K_sigma(t, confidence_i)``. It never rises with sigma, so one
    sigma equals it, which is found by bisection.

    Args:
        confidence_N: Probabilities.
        correct_N: Whether each prediction is correct.

    Returns:
        From 0 to 1; NaN where a confidence is not finite.

    Raises:
        DataError: No samples, lengths that differ, or confidences outside [0, 1].

    >>> round(smooth_ece([0.5] * 10, [1, 0] * 5), 3), round(smooth_ece([0.9] * 10, [1, 0] * 5), 2)
    (0.0, 0.4)
    """
    values_N, right_N = np.asarray(confidence_N, dtype=np.float64), np.asarray(correct_N, dtype=np.float64)
    if values_N.ndim != 1 or values_N.shape != right_N.shape or not len(values_N):
        raise DataError(f"confidence: found shapes {values_N.shape} and {right_N.shape}; give one of each per sample")
    if not isfinite(values_N.sum()):
        return nan
    if values_N.min() < 0 or values_N.max() > 1 + 1e-6:
        found = f"from {values_N.min():g} to {values_N.max():g}"
        raise DataError(f"calibration: found confidences {found}; give probabilities")
    coefficient_M = _spectrum(values_N, right_N - values_N)
    low, high = NARROWEST, 1.0
    if _error(coefficient_M, low) <= low:
        return _error(coefficient_M, low)
    while high - low > 1e-7:
        middle = (low + high) / 2
        low, high = (middle, high) if _error(coefficient_M, middle) > middle else (low, middle)
    return high


def _spectrum(values_N: NDArray[np.float64], residual_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosine transform of the residuals, mean over samples, by cell."""
    from scipy.fft import dct

    cell_N = np.minimum((values_N * CELLS).astype(np.int64), CELLS - 1)
    return np.asarray(dct(np.bincount(cell_N, weights=residual_N, minlength=CELLS) / len(values_N)))


def _error(coefficient_M: NDArray[np.float64], sigma: float) -> float:
    """Integral of the absolute smoothed residual: reflection at the ends makes the Gaussian diagonal in cosines."""
    from scipy.fft import idct

    damped_M = coefficient_M * np.exp(-((pi * sigma * np.arange(CELLS)) ** 2) / 2)
    return float(np.abs(idct(damped_M)).sum())
