"""Comparison of an accuracy with chance."""

from __future__ import annotations

from math import sqrt

from torch import Tensor


def chance_limit(chance: float, count: int) -> float:
    """Return the largest accuracy on ``count`` targets that is not significantly above ``chance``.

    The test is one-sided at 95 %, with the normal approximation of the binomial distribution:
    ``c + 1.645 sqrt(c (1 - c) / N)``.

    >>> round(chance_limit(0.5, 100), 5)
    0.58225
    """
    return chance + 1.645 * sqrt(chance * (1 - chance) / count)


def above_chance(accuracy: float, targets_N: Tensor) -> float | None:
    """Return None if an accuracy is significantly above chance, else the accuracy of chance.

    Chance is the share of the most frequent target; see :func:`chance_limit` for the test.

    >>> import torch
    >>> y = torch.tensor([0, 0, 1, 1] * 25)
    >>> above_chance(0.9, y), above_chance(0.55, y)
    (None, 0.5)
    """
    count = len(targets_N)
    chance = int(targets_N.unique(return_counts=True)[1].max()) / count
    return None if accuracy > chance_limit(chance, count) else chance
