"""Zeros that rules make of dense random vectors: what stands beside every figure of activation sparsity."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from clframe.functional.sparsity import MaskKind, require_value

_FINE = 2**16


def baseline_sparsity(
    value: float,
    *,
    kind: MaskKind,
    neurons: int,
    law: Literal["gaussian", "laplace"] = "gaussian",
    power: float = 1.0,
    scale: float = 1.0,
) -> float:
    """Zeros that a dense vector of independent numbers gets from the same rule: what no finding is.

    With ``|v|^b / b`` of the law Gamma(1/b), b = 2 for a Gaussian and ``|v|`` of Gamma(1) for a Laplace: top-p zeroes
    the share below the t above which ``value`` of the mass ``E |v|^power`` lies (for a Gaussian and power 1,
    ``erf(sqrt(-log p))``); max-p the expected share below p times the largest of ``neurons``; a threshold the share
    below it; top-k all but k. Many neurons are assumed for top-p.

    Args:
        value: p, k or threshold.
        kind: As in :func:`keep`.
        neurons: Length of the vector.
        law: Its distribution.
        power: As in :func:`keep`.
        scale: Root mean square of the vector, for thresholds.

    >>> [round(100 * baseline_sparsity(p, kind="top_p", neurons=512)) for p in (0.99, 0.95, 0.9, 0.8)]
    [11, 25, 35, 50]
    """
    require_value(value, kind=kind)
    shape = 0.5 if law == "gaussian" else 1.0
    if kind == "top_k":
        return 1 - min(value / max(neurons, 1), 1.0)
    if kind == "threshold":
        # Of unit variance: v^2 / 2 of a Gaussian, sqrt(2) |v| of a Laplace are Gamma(shape).
        t = value / scale if scale > 0 else float("inf")
        at = t * t / 2 if law == "gaussian" else 2**0.5 * t
        return float(torch.special.gammainc(_f64(shape), _f64(at)))
    if kind == "top_p":
        if value <= 0:
            return 1.0
        at_mass = _inverse_upper_gamma(value, shape=(power + 1) / 2 if law == "gaussian" else power + 1)
        return float(torch.special.gammainc(_f64(shape), _f64(at_mass)))
    return _max_p(value, shape=shape, neurons=neurons)


@lru_cache(maxsize=1024)
def _max_p(p: float, *, shape: float, neurons: int) -> float:
    """Expected share below p times the largest of n: quadrature over that largest, by midpoints of its quantiles."""
    if neurons < 2:
        return 0.0
    u = (torch.arange(_FINE, dtype=torch.float64) + 0.5) / _FINE
    # |v| as a function of its own distribution: only ratios matter, so any scale will do.
    grid = torch.linspace(0, 12 if shape == 0.5 else 80, _FINE, dtype=torch.float64)
    below = torch.special.gammainc(_f64(shape), grid.square() / 2 if shape == 0.5 else grid)
    quantile = u.pow(1 / neurons)
    largest = grid[torch.searchsorted(below, quantile).clamp(max=_FINE - 1)]
    at = p * largest
    share = torch.special.gammainc(_f64(shape), at.square() / 2 if shape == 0.5 else at) / quantile
    return float(share.clamp(max=1).mean()) * (neurons - 1) / neurons


def _inverse_upper_gamma(share: float, *, shape: float) -> float:
    """The x above which ``share`` of Gamma(shape) lies, by bisection."""
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        if float(torch.special.gammaincc(_f64(shape), _f64(middle))) > share:
            low = middle
        else:
            high = middle
    return low


def _f64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)
