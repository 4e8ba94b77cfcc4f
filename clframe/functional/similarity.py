"""Similarity of two representations of the same samples: linear centered kernel alignment (CKA).

Source: Kornblith et al., "Similarity of Neural Network Representations Revisited" (2019). Their estimate is biased
upward for few samples: unrelated representations approach 1 as features outnumber samples. Here it is unbiased.

Shape suffixes: N samples, D and E features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from clframe.errors import ClframeError

NO_VARIANCE = 1e-12
"""Norm of centered features, relative to the features, below which they are the rounding errors of constants."""

COLUMNS_AT_ONCE = 16384
"""Features that are added to a Gram matrix together, so that a large tap is never converted as a whole."""


def unbiased_linear_cka(x_ND: Tensor, y_NE: Tensor) -> float:
    """Return the linear CKA of two representations of the same N samples, in expectation independent of N.

    ``h(K, L) / sqrt(h(K, K) h(L, L))`` with K = X X', L = Y Y', both with their diagonals set to 0, and
    ``h(K, L) = (tr(K L) + 1'K1 1'L1 / ((N-1)(N-2)) - 2 1'KL1 / (N-2)) / (N (N-3))``, the unbiased estimate of HSIC by
    Song et al., "Feature Selection via Dependence Maximization" (2012). Source: Nguyen et al., "Do Wide and Deep
    Networks Learn the Same Things?" (2021).

    It is 1 for a representation with itself, near 0 for unrelated features, slightly negative by chance, and invariant
    to an orthogonal map of the features, a common scale and a shift, but not to linear maps in general. NaN for fewer
    than four samples, and if a representation is the same for all samples (dead features), which has no variance.
    Computed in double precision.

    Raises:
        ClframeError: Shapes other than [N, D] and [N, E].

    >>> x_ND = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0], [3.0, 3.0]])
    >>> round(unbiased_linear_cka(x_ND, 3 * x_ND.flip(1) + 1), 12)
    1.0
    """
    _check(x_ND, y_NE)
    if len(x_ND) < 4:
        return math.nan
    gram_x_NN, gram_y_NN = _gram_NN(x_ND).fill_diagonal_(0.0), _gram_NN(y_NE).fill_diagonal_(0.0)
    own = _unbiased_hsic(gram_x_NN, gram_x_NN) * _unbiased_hsic(gram_y_NN, gram_y_NN)
    return _ratio(_unbiased_hsic(gram_x_NN, gram_y_NN), own.clamp(min=0.0).sqrt())


def flat_tap(tap: Tensor, *, grid: int | None = None) -> Tensor:
    """Flatten a tap (N, ...) to features (N, D), each position of a map or a token sequence separately.

    With ``grid``, maps (N, C, H, W) larger than ``grid`` x ``grid`` are first averaged to that size, which is cheaper
    and ignores shifts smaller than a cell.

    >>> flat_tap(torch.zeros(2, 3, 8, 8)).shape, flat_tap(torch.zeros(2, 3, 8, 8), grid=2).shape
    (torch.Size([2, 192]), torch.Size([2, 12]))
    """
    if tap.ndim == 4 and grid is not None and max(tap.shape[2:]) > grid:
        height, width = (min(size, grid) for size in tap.shape[2:])
        tap = F.adaptive_avg_pool2d(tap.float(), (height, width))
    return tap.detach().reshape(len(tap), -1)


def _check(x_ND: Tensor, y_NE: Tensor) -> None:
    shapes = tuple(x_ND.shape), tuple(y_NE.shape)
    if any(len(shape) != 2 for shape in shapes) or shapes[0][0] != shapes[1][0] or not len(x_ND):
        raise ClframeError(f"linear CKA: shapes {shapes[0]} and {shapes[1]}; use two of the same samples, flattened")


def _center(x_ND: Tensor) -> Tensor:
    """Subtract the mean in double precision; all zeros if only rounding errors remain."""
    x_ND = x_ND.detach().double()
    centered_ND = x_ND - x_ND.mean(dim=0)
    varies = centered_ND.norm() > NO_VARIANCE * x_ND.norm()
    return torch.where(varies, centered_ND, 0.0)


def _gram_NN(x_ND: Tensor) -> Tensor:
    gram_NN = torch.zeros(len(x_ND), len(x_ND), dtype=torch.float64, device=x_ND.device)
    for part_ND in x_ND.split(COLUMNS_AT_ONCE, dim=1):
        centered_ND = _center(part_ND)
        gram_NN += centered_ND @ centered_ND.T
    return gram_NN


def _unbiased_hsic(gram_x_NN: Tensor, gram_y_NN: Tensor) -> Tensor:
    """Return the unbiased HSIC without the factor 1 / (N (N-3)), which cancels; diagonals are 0."""
    samples = len(gram_x_NN)
    sums_x_N, sums_y_N = gram_x_NN.sum(dim=0), gram_y_NN.sum(dim=0)
    apart = sums_x_N.sum() * sums_y_N.sum() / ((samples - 1) * (samples - 2))
    return (gram_x_NN * gram_y_NN).sum() + apart - 2 / (samples - 2) * sums_x_N @ sums_y_N


def _ratio(common: Tensor, size: Tensor) -> float:
    return float(common / size) if size > 0 else math.nan
