"""Activation sparsity as pure functions: penalties, masks, critical sparsity, and random baselines."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from clframe.errors import ConfigError
from clframe.sparsity.top_p import kernel_top_p

MaskKind = Literal["top_p", "top_k", "max_p", "threshold"]
"""Rule that selects the entries to keep, token by token: see :func:`keep`."""

Schedule = Literal["constant", "linear", "warmup"]
"""Change of a penalty's weight during training: see :func:`schedule_factor`."""

_EPSILON = 1e-15


def schedule_factor(schedule: Schedule, fraction: float) -> float:
    """Factor of a penalty's weight after a fraction of the training, counted in epochs or in steps.

    ``constant``: 1; ``linear``: the fraction; ``warmup``: twice the fraction, at most 1.

    >>> [schedule_factor("warmup", done / 4) for done in (1, 2, 4)]
    [0.5, 1.0, 1.0]
    """
    return {"constant": 1.0, "linear": fraction, "warmup": min(1.0, 2 * fraction)}[schedule]


def hoyer(x_TN: Tensor) -> Tensor:
    """Compute the squared Hoyer measure, averaged over tokens: ``mean_t ||x_t||_1^2 / (||x_t||_2^2 + 1e-15)``.

    1 where one neuron is active, N where all are equally active, 0 with gradient 0 where none is. At least in float32,
    because squares of half-precision numbers overflow. 0 without tokens.

    Returns:
        A scalar.

    >>> hoyer(torch.tensor([[0.0, 3.0, 0.0], [2.0, 2.0, 2.0]]))
    tensor(2.)
    """
    x_TN = _full(x_TN)
    return _mean(x_TN.abs().sum(-1).square() / (x_TN.square().sum(-1) + _EPSILON))


def l1(x_TN: Tensor) -> Tensor:
    """Compute the mean over tokens of ``||x_t||_1``: a scalar; 0 without tokens."""
    return _mean(_full(x_TN).abs().sum(-1))


def displacement(pre_TN: Tensor, *, by: float = -10.0) -> Tensor:
    """Return the distance of pre-activations above ``by``: ``max(pre, d) - d``, for models with GELU (D2DMoE).

    Where GELU is flat, only its input measures how far a neuron is from being active; a penalty on this value pushes
    the input below ``d``, where its gradient is 0.

    >>> displacement(torch.tensor([-12.0, -10.0, 0.0, 2.5]))
    tensor([ 0.0000,  0.0000, 10.0000, 12.5000])
    """
    return pre_TN.clamp(min=by) - by


def keep(x_TN: Tensor, value: float, *, kind: MaskKind, power: float = 1.0) -> Tensor:
    """Select the entries of each token to keep.

    ``top_p``: the smallest set of largest ``|x|^power`` whose sum is at least ``value`` of the whole; entries as large
    as the smallest one kept are kept too; cumulative sums in float64. ``top_k``: the ``value`` largest, exactly.
    ``max_p``: ``|x| >= value * max |x|``, so one at least. ``threshold``: ``|x| >= value``.

    Args:
        x_TN: Activations.
        value: The share p, the number k or the threshold.
        kind: As above.
        power: Of magnitudes, in ``top_p``.

    Returns:
        mask_TN, boolean.

    Raises:
        ConfigError: A value out of range.

    >>> x = torch.tensor([[4.0, -3.0, 2.0, 1.0]])
    >>> [int(keep(x, p, kind="top_p").sum()) for p in (1.0, 0.9, 0.7, 0.4, 0.0)]
    [4, 3, 2, 1, 0]
    """
    require_value(value, kind=kind)
    size_TN = x_TN.abs()
    if x_TN.shape[-1] == 0:
        return torch.ones_like(x_TN, dtype=torch.bool)
    if kind == "threshold":
        return size_TN >= value
    if kind == "max_p":
        return size_TN >= value * size_TN.amax(-1, keepdim=True)
    if kind == "top_k":
        index_TK = size_TN.topk(min(int(value), x_TN.shape[-1]), dim=-1).indices
        return torch.zeros_like(x_TN, dtype=torch.bool).scatter_(-1, index_TK, value=True)
    found_TN = kernel_top_p(x_TN, value, plain=keep_by_sorting) if power == 1 else None
    return keep_by_sorting(x_TN, value, power=power) if found_TN is None else found_TN


def keep_by_sorting(x_TN: Tensor, value: float, *, power: float = 1.0) -> Tensor:
    """Select by top-p as in :func:`keep`, on every device by sorting."""
    size_TN = x_TN.abs()
    sorted_TN = _descending(size_TN)
    mass_TN = sorted_TN.double() if power == 1 else sorted_TN.double().pow(power)
    sums_TN = mass_TN.cumsum(-1)
    needed_T1 = value * sums_TN[..., -1:]
    count_T1 = torch.searchsorted(sums_TN, needed_T1)  # entries before the one that reaches it
    least_T1 = sorted_TN.gather(-1, count_T1.clamp(max=x_TN.shape[-1] - 1))
    return (size_TN >= least_T1) & (size_TN > 0) & (needed_T1 > 0)


def _descending(size_TN: Tensor) -> Tensor:
    """Sort each token's entries, largest first; on the CPU with numpy, which sorts no indices and takes a tenth."""
    if size_TN.device.type != "cpu":
        return size_TN.sort(dim=-1, descending=True).values
    return torch.from_numpy(np.sort(_full(size_TN.detach()).numpy(), axis=-1)).flip(-1)


def require_value(value: float, *, kind: MaskKind) -> None:
    """Raise :class:`ConfigError` for a value out of the range of ``kind``."""
    if kind in ("top_p", "max_p") and not 0 <= value <= 1:
        raise ConfigError(f"sparsity.{kind}: found {value}; give a share between 0 and 1")
    if kind == "top_k" and (value != int(value) or value < 0):
        raise ConfigError(f"sparsity.top_k: found {value}; give a whole number of at least 0")
    if kind == "threshold" and not value >= 0:
        raise ConfigError(f"sparsity.threshold: found {value}; give a number of at least 0")


def sparsity(x_TN: Tensor) -> Tensor:
    """Compute the share of zeros of each token: sparsity_T, in float32; 0 without entries."""
    return (x_TN == 0).sum(-1).float() / max(x_TN.shape[-1], 1)


def critical_point(
    sparsities: Sequence[float],
    scores: Sequence[float],
    *,
    dense: float,
    share: float = 0.99,
    least: float | None = None,
) -> tuple[int, int, float]:
    """Find where a sweep falls below ``share`` of the dense score: points i and j and the fraction of the way between.

    Interpolation is linear in order of sparsity; i is the curve's last point at or above ``share * dense``, or at or
    above ``least`` if it is given.

    Raises:
        ConfigError: No points, or without ``least`` a dense score that is not above 0.
    """
    if least is None and not dense > 0:
        raise ConfigError(f"sparsity.score: found {dense} for the dense model; give one above 0 where higher is better")
    if not sparsities:
        raise ConfigError("sparsity.sweep: found no values; give some")
    least = share * dense if least is None else least
    order = sorted(range(len(sparsities)), key=lambda at: (sparsities[at], scores[at]))
    last = max((place for place, at in enumerate(order) if scores[at] >= least), default=0)
    i, j = order[last], order[min(last + 1, len(order) - 1)]
    drop = scores[i] - scores[j]
    return i, j, min(max((scores[i] - least) / drop, 0.0), 1.0) if drop > 0 else 0.0


def critical_sparsity(
    sparsities: Sequence[float], scores: Sequence[float], *, dense: float, share: float = 0.99
) -> float:
    """Compute the highest sparsity that keeps ``share`` of the dense score, interpolated between points of a sweep.

    See :func:`critical_point`. If no point keeps the share, the sparsity of the least sparse one.

    Args:
        sparsities: Achieved mean sparsity of each point, in any order.
        scores: Score of each point, higher is better.
        dense: Score without any mask.
        share: Of the dense score that must be kept.

    Raises:
        ConfigError: As there.

    >>> critical_sparsity([0.0, 0.5, 0.7], [1.0, 1.0, 0.98], dense=1.0)
    0.6
    """
    i, j, way = critical_point(sparsities, scores, dense=dense, share=share)
    return sparsities[i] + way * (sparsities[j] - sparsities[i])


def effective_rank(x_TN: Tensor) -> float:
    """Compute ``exp(-sum p_i log p_i)`` of the singular values normalized to sum 1.

    Roy and Vetterli, "The effective rank" (2007). Between 1 and min(T, N); 0 for zeros or an empty
    input. In float64, without gradient.

    >>> round(effective_rank(torch.eye(5)), 6)
    5.0
    """
    matrix_TN = x_TN.detach().reshape(-1, x_TN.shape[-1]).double()
    if 0 in matrix_TN.shape:
        return 0.0
    values = torch.linalg.svdvals(matrix_TN)
    total = values.sum()
    return float(torch.special.entr(values / total).sum().exp()) if total > 0 else 0.0


def jaccard(active_N: Tensor, other_N: Tensor) -> float:
    """Compute the overlap of active neurons: ``sum min(a, b) / sum max(a, b)``.

    For boolean masks this is ``|A and B| / |A or B|``; for rates of activity, its generalization (Ruzicka). 1 where
    neither has active neurons.

    >>> jaccard(torch.tensor([True, True, False]), torch.tensor([False, True, True]))
    0.3333333333333333
    """
    a_N, b_N = active_N.double(), other_N.double()
    whole = float(torch.maximum(a_N, b_N).sum())
    return float(torch.minimum(a_N, b_N).sum()) / whole if whole else 1.0


def _full(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _mean(values_T: Tensor) -> Tensor:
    return values_T.sum() / max(values_T.numel(), 1)


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
    """Compute the sparsity that the same rule gives a dense vector of independent numbers, as a baseline.

    With ``|v|^b / b`` of the law Gamma(1/b), b = 2 for a Gaussian and ``|v|`` of Gamma(1) for a Laplace: top-p zeroes
    the share below the t above which ``value`` of the mass ``E |v|^power`` is (for a Gaussian and power 1,
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
    """Compute the expected share below p times the largest of n, by quadrature over the quantiles of the largest."""
    if neurons < 2:
        return 0.0
    u = (torch.arange(_FINE, dtype=torch.float64) + 0.5) / _FINE
    # |v| tabulated against its distribution function: only ratios matter, so the scale is free.
    grid = torch.linspace(0, 12 if shape == 0.5 else 80, _FINE, dtype=torch.float64)
    below = torch.special.gammainc(_f64(shape), grid.square() / 2 if shape == 0.5 else grid)
    quantile = u.pow(1 / neurons)
    largest = grid[torch.searchsorted(below, quantile).clamp(max=_FINE - 1)]
    at = p * largest
    share = torch.special.gammainc(_f64(shape), at.square() / 2 if shape == 0.5 else at) / quantile
    return float(share.clamp(max=1).mean()) * (neurons - 1) / neurons


@lru_cache(maxsize=1024)
def _inverse_upper_gamma(share: float, *, shape: float) -> float:
    """Find by bisection the x with probability ``share`` above it under Gamma(shape)."""
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
