"""Similarity of two representations of the same samples: linear centered kernel alignment (CKA).

Source: Kornblith et al., "Similarity of Neural Network Representations Revisited" (2019).

Shape suffixes: N samples, D and E features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from clframe.errors import ClframeError, unknown_name

NO_VARIANCE = 1e-12
"""Norm of centered features, relative to the features, below which they are the rounding errors of constants."""

COLUMNS_AT_ONCE = 16384
"""Features that are added to a Gram matrix together, so that a large tap is never converted as a whole."""


def linear_cka(x_ND: Tensor, y_NE: Tensor) -> float:
    """Return the linear CKA of two representations of the same N samples, from 0 to 1.

    ``|Yc' Xc|^2 / (|Xc' Xc| |Yc' Yc|)`` in Frobenius norms, with every feature centered over the samples (their
    equation 5). It is 1 for a representation with itself, and invariant to an orthogonal map of the features, a common
    scale and a shift, but not to linear maps in general. NaN if a representation is the same for all samples (one
    sample, dead features), which has no variance.

    Biased upward for few samples: unrelated representations approach 1 as features outnumber samples. Compare values of
    equal N and D, or use :func:`unbiased_linear_cka`.

    Computed in double precision, from N x N Gram matrices if there are fewer samples than features and from feature
    products otherwise, which are equal.

    >>> x_ND = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0]])
    >>> round(linear_cka(x_ND, 3 * x_ND.flip(1) + 1), 12)
    1.0
    """
    _check(x_ND, y_NE)
    if len(x_ND) < max(x_ND.shape[1], y_NE.shape[1]):
        return cka_from_grams(x_ND, y_NE)
    return cka_from_features(x_ND, y_NE)


def cka_from_features(x_ND: Tensor, y_NE: Tensor) -> float:
    """Compute :func:`linear_cka` from products of features, D x E, D x D and E x E: for few features."""
    x_ND, y_NE = _center(x_ND), _center(y_NE)
    cross, own_x, own_y = y_NE.T @ x_ND, x_ND.T @ x_ND, y_NE.T @ y_NE
    return _ratio(cross.square().sum(), own_x.norm() * own_y.norm())


def cka_from_grams(x_ND: Tensor, y_NE: Tensor) -> float:
    """Compute :func:`linear_cka` from N x N Gram matrices, ``<K, L> / (|K| |L|)``, K = Xc Xc': for few samples."""
    gram_x_NN, gram_y_NN = _gram_NN(x_ND), _gram_NN(y_NE)
    return _ratio((gram_x_NN * gram_y_NN).sum(), gram_x_NN.norm() * gram_y_NN.norm())


def unbiased_linear_cka(x_ND: Tensor, y_NE: Tensor) -> float:
    """Return linear CKA with an expectation independent of the number of samples; near 0 for unrelated features.

    ``h(K, L) / sqrt(h(K, K) h(L, L))`` with K = X X', L = Y Y', both with their diagonals set to 0, and
    ``h(K, L) = (tr(K L) + 1'K1 1'L1 / ((N-1)(N-2)) - 2 1'KL1 / (N-2)) / (N (N-3))``, the unbiased estimate of HSIC by
    Song et al., "Feature Selection via Dependence Maximization" (2012). Source: Nguyen et al., "Do Wide and Deep
    Networks Learn the Same Things?" (2021). 1 for a representation with itself, invariant as :func:`linear_cka`;
    slightly negative by chance. NaN for fewer than four samples and without variance.
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


def tap_similarity(
    reference: Mapping[str, Tensor], taps: Mapping[str, Tensor], *, grid: int | None = None
) -> dict[str, float]:
    """Return the linear CKA of each tap with that of a reference, such as the network after the first experience.

    Both are of the same samples in the same order, samples first, as flattened by :func:`flat_tap`. Values are
    comparable for one ``grid`` only.

    Raises:
        ClframeError: A tap that the reference does not have, or another number of samples.

    >>> tap = torch.arange(24.0).reshape(3, 2, 2, 2).sin()
    >>> {name: round(cka, 12) for name, cka in tap_similarity({"pool": tap}, {"pool": 2 * tap}).items()}
    {'pool': 1.0}
    """
    found: dict[str, float] = {}
    for name, tap in taps.items():
        if name not in reference:
            raise ClframeError(unknown_name("tap", name, reference, where="reference taps"))
        if len(tap) != len(reference[name]):
            raise ClframeError(
                f"tap '{name}': {len(tap)} samples, {len(reference[name])} in the reference; use the same samples"
            )
        found[name] = linear_cka(flat_tap(reference[name], grid=grid), flat_tap(tap, grid=grid))
    return found


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
