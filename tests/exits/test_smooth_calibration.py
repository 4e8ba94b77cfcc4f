"""Smooth calibration error: the definition longhand, numbers of its authors' package, and bad input."""

from __future__ import annotations

from math import isnan, nan

import numpy as np
import pytest

from clframe.errors import DataError
from clframe.exits.smooth_calibration import smooth_ece


def sampled(n, power, seed):
    generator = np.random.default_rng(seed)
    confidence_N = generator.random(n) * 0.8 + 0.2
    return confidence_N, generator.random(n) < confidence_N**power


def error(confidence_N, correct_N, sigma, *, points=2000):
    """Integral of the smoothed residual with the Gaussian and its mirror images, summed one by one."""
    t_P = (np.arange(points) + 0.5) / points
    residual_P = np.zeros(points)
    for s, c in zip(confidence_N, correct_N, strict=True):
        for shift in range(-6, 8, 2):
            for image in (s + shift, shift - s):
                residual_P += (c - s) * np.exp(-((t_P - image) ** 2) / (2 * sigma**2)) / (sigma * np.sqrt(2 * np.pi))
    return float(np.abs(residual_P / len(confidence_N)).mean())


@pytest.mark.parametrize(("n", "power"), [(30, 1), (80, 3)])
def test_the_error_at_the_bandwidth_is_the_bandwidth(n, power):
    confidence_N, correct_N = sampled(n, power, 0)
    found = smooth_ece(confidence_N, correct_N)
    assert error(confidence_N, correct_N, found) == pytest.approx(found, abs=1e-3)


@pytest.mark.parametrize(
    ("n", "power", "seed", "theirs"),
    [(50, 1, 0, 0.13475), (200, 2, 1, 0.15626), (1000, 1, 2, 0.0288), (1000, 0.5, 3, 0.14433), (10000, 3, 5, 0.28799)],
)
def test_numbers_of_relplot_1_0_3(n, power, seed, theirs):
    assert smooth_ece(*sampled(n, power, seed)) == pytest.approx(theirs, abs=1e-3)


def test_extremes_by_arithmetic():
    assert smooth_ece([0.0, 1.0], [0, 1]) == 0
    assert smooth_ece([0.0] * 4, [1] * 4) == pytest.approx(1, abs=1e-6)  # every residual is 1, whatever the bandwidth
    assert smooth_ece([0.8] * 5, [1, 1, 1, 1, 0]) == pytest.approx(0, abs=1e-9)


def test_bad_input_is_one_line_or_nan():
    assert isnan(smooth_ece([nan, 0.5], [1, 0]))
    with pytest.raises(DataError, match="give one of each per sample"):
        smooth_ece([], [])
    with pytest.raises(DataError, match="found confidences from 0.5 to 2; give probabilities"):
        smooth_ece([0.5, 2.0], [1, 0])
