"""How alike two representations of the same samples are: linear centered kernel alignment.

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
"""Centered features smaller than this, relative to the features, are the rounding of constant ones."""

COLUMNS_AT_ONCE = 16384
"""Features that a Gram matrix takes at a time, so that a large tap is never held in double precision."""


def linear_cka(x_ND: Tensor, y_NE: Tensor) -> float:
    """Linear CKA of two representations of the same N samples, from 0 to 1.

    ``|Yc' Xc|^2 / (|Xc' Xc| |Yc' Yc|)`` in Frobenius norms, with every feature centered over the samples (their
    equation 5). It is 1 for a representation with itself, and does not change under an orthogonal map of the
    features, a scale common to all of them or a shift; a linear map in general changes it. NaN where a
    representation is the same for all samples (one sample, dead features), which has no variance to compare.

    Biased upward where samples are few for the features: unrelated ones come near 1 as features outnumber samples.
    Compare values of equal N and D, or take :func:`unbiased_linear_cka`.

    Computed in double precision, from N x N Gram matrices where there are fewer samples than features and from
    feature products otherwise: the same number either way.

    >>> x_ND = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0]])
    >>> round(linear_cka(x_ND, 3 * x_ND.flip(1) + 1), 12)
    1.0
    """
    _check(x_ND, y_NE)
    if len(x_ND) < max(x_ND.shape[1], y_NE.shape[1]):
        return cka_from_grams(x_ND, y_NE)
    return cka_from_features(x_ND, y_NE)


def cka_from_features(x_ND: Tensor, y_NE: Tensor) -> float:
    """:func:`linear_cka` from products of features, D x E, D x D and E x E: for few features."""
    x_ND, y_NE = _centered(x_ND), _centered(y_NE)
    cross, own_x, own_y = y_NE.T @ x_ND, x_ND.T @ x_ND, y_NE.T @ y_NE
    return _aligned(cross.square().sum(), own_x.norm() * own_y.norm())


def cka_from_grams(x_ND: Tensor, y_NE: Tensor) -> float:
    """:func:`linear_cka` from N x N Gram matrices: for few samples. ``<K, L> / (|K| |L|)``, K = Xc Xc'."""
    gram_x_NN, gram_y_NN = _gram_NN(x_ND), _gram_NN(y_NE)
    return _aligned((gram_x_NN * gram_y_NN).sum(), gram_x_NN.norm() * gram_y_NN.norm())


def unbiased_linear_cka(x_ND: Tensor, y_NE: Tensor) -> float:
    """Linear CKA whose expectation does not depend on the number of samples; near 0 for unrelated features.

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
    return _aligned(_unbiased_hsic(gram_x_NN, gram_y_NN), own.clamp(min=0.0).sqrt())


def flat_tap(tap: Tensor, *, grid: int | None = None) -> Tensor:
    """A tap (N, ...) as features (N, D): every position of a map or a token sequence counts by itself.

    With ``grid``, maps (N, C, H, W) larger than ``grid`` x ``grid`` are first averaged down to that size, which is
    cheaper and looks past shifts smaller than a cell.

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
    """Linear CKA of each tap with the same tap of a reference, such as the network after the first experience.

    Both hold taps of the same samples in the same order, samples first; see :func:`flat_tap` for what is
    compared. Numbers are comparable for one ``grid`` only.

    Raises :class:`ClframeError` for a tap that the reference lacks, or another number of samples.

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
                f"tap '{name}': {len(tap)} samples, {len(reference[name])} in the reference; give the same samples"
            )
        found[name] = linear_cka(flat_tap(reference[name], grid=grid), flat_tap(tap, grid=grid))
    return found


def _check(x_ND: Tensor, y_NE: Tensor) -> None:
    shapes = tuple(x_ND.shape), tuple(y_NE.shape)
    if any(len(shape) != 2 for shape in shapes) or shapes[0][0] != shapes[1][0] or not len(x_ND):
        raise ClframeError(f"linear CKA: shapes {shapes[0]} and {shapes[1]}; give two of the same samples, flattened")


def _centered(x_ND: Tensor) -> Tensor:
    """Features in double precision minus their mean; zero throughout where only rounding is left."""
    x_ND = x_ND.detach().double()
    centered_ND = x_ND - x_ND.mean(dim=0)
    varies = centered_ND.norm() > NO_VARIANCE * x_ND.norm()
    return torch.where(varies, centered_ND, 0.0)


def _gram_NN(x_ND: Tensor) -> Tensor:
    gram_NN = torch.zeros(len(x_ND), len(x_ND), dtype=torch.float64, device=x_ND.device)
    for part_ND in x_ND.split(COLUMNS_AT_ONCE, dim=1):
        centered_ND = _centered(part_ND)
        gram_NN += centered_ND @ centered_ND.T
    return gram_NN


def _unbiased_hsic(gram_x_NN: Tensor, gram_y_NN: Tensor) -> Tensor:
    """Without the factor 1 / (N (N-3)), which cancels; diagonals are 0."""
    samples = len(gram_x_NN)
    sums_x_N, sums_y_N = gram_x_NN.sum(dim=0), gram_y_NN.sum(dim=0)
    apart = sums_x_N.sum() * sums_y_N.sum() / ((samples - 1) * (samples - 2))
    return (gram_x_NN * gram_y_NN).sum() + apart - 2 / (samples - 2) * sums_x_N @ sums_y_N


def _aligned(common: Tensor, size: Tensor) -> float:
    return float(common / size) if size > 0 else math.nan
