"""Comparison of an accuracy with chance."""

from __future__ import annotations

from math import sqrt

from torch import Tensor


def above_chance(accuracy: float, targets_N: Tensor) -> float | None:
    """Return None if an accuracy is significantly above chance, else the accuracy of chance.

    Chance is the share of the most frequent target. The test is one-sided at 95 %, with the normal approximation of the
    binomial distribution: ``accuracy > c + 1.645 sqrt(c (1 - c) / N)``.

    >>> import torch
    >>> y = torch.tensor([0, 0, 1, 1] * 25)
    >>> above_chance(0.9, y), above_chance(0.55, y)
    (None, 0.5)
    """
    count = len(targets_N)
    chance = int(targets_N.unique(return_counts=True)[1].max()) / count
    return None if accuracy > chance + 1.645 * sqrt(chance * (1 - chance) / count) else chance
