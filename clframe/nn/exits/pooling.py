"""Pooling between a tap and its classifier.

All of it is plain pooling, slicing and gathering: torch's adaptive pooling has no deterministic gradient on
CUDA and would stop a deterministic run.

Shape suffixes: B batch, C channels, H height, W width, F features, L length of the longest window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Pair = tuple[Tensor, Tensor]
"""A map after max pooling, and after average pooling."""


class MaxAverage(nn.Module):
    """Max pooling and average pooling of a map, side by side; no parameters.

    Args:
        size: None pools windows of 2x2 and drops the last row or column of an odd side, as torch does; a
            side of 1 is not pooled. A number n pools to n x n with the windows of adaptive pooling, [floor(i
            H / n), ceil((i + 1) H / n)) for row i; a side that is no longer than n stays.

    >>> [tuple(pooled.shape) for pooled in MaxAverage()(torch.zeros(2, 3, 7, 1))]
    [(2, 3, 3, 1), (2, 3, 3, 1)]
    >>> [tuple(pooled.shape) for pooled in MaxAverage(size=4)(torch.zeros(2, 3, 7, 3))]
    [(2, 3, 4, 3), (2, 3, 4, 3)]
    """

    def __init__(self, *, size: int | None = None) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Pair:
        """x_BCHW pooled by the maximum, and by the average."""
        if self.size is None:
            kernel = (min(2, x.shape[2]), min(2, x.shape[3]))
            return F.max_pool2d(x, kernel), F.avg_pool2d(x, kernel)
        return _pooled_to(self.size, F.max_pool2d, x), _pooled_to(self.size, F.avg_pool2d, x)

    def extra_repr(self) -> str:
        """The size, as ``print`` shows it."""
        return "2x2 windows" if self.size is None else f"size={self.size}"


class Blend(nn.Module):
    """``a * max + (1 - a) * average`` of two pooled maps.

    Attributes:
        a: One learnable scalar, drawn from U[0, 1) and not held there; at 0 the blend is the average, at 1 the
            maximum, bit for bit.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.rand(()))

    def forward(self, pooled: Pair) -> Tensor:
        """The blended map, of the shape of both."""
        maximum, average = pooled
        return torch.lerp(average, maximum, self.a.to(average.dtype))  # maps may be bfloat16 under autocast


def blend_all(blends: Sequence[Blend], pooled: Pair) -> Tensor:
    """What each of T ``blends`` makes of the same two maps, stacked: the same numbers, in one operation."""
    maximum, average = pooled
    a_T = torch.stack([blend.a for blend in blends]).to(average.dtype)
    return torch.lerp(average, maximum, a_T.reshape(-1, *(1,) * average.dim()))


class SDNPool(nn.Module):
    """Learnable mix of max and average pooling (Kaya et al., "Shallow-Deep Networks", 2019).

    ``a * max_pool(x) + (1 - a) * average_pool(x)``, ``a`` one learnable scalar for all channels.

    Args:
        size: None for windows of 2x2, n for a map of n x n; see :class:`MaxAverage`.

    >>> tuple(SDNPool(size=4)(torch.zeros(2, 16, 32, 32)).shape)
    (2, 16, 4, 4)
    """

    def __init__(self, *, size: int | None = None) -> None:
        super().__init__()
        self.pools = MaxAverage(size=size)
        self.blend = Blend()

    @property
    def a(self) -> nn.Parameter:
        """The share of the maximum."""
        return self.blend.a

    def forward(self, x: Tensor) -> Tensor:
        """x_BCHW pooled."""
        blended: Tensor = self.blend(self.pools(x))
        return blended


class FlattenTo(nn.Module):
    """Flatten, then bring to exactly F features by adaptive average pooling; no parameters.

    Feature i is the mean of the flat features [floor(i N / F), ceil((i + 1) N / F)) of N: neighbours are averaged
    where N is larger, features are repeated where F is (and averaged with a neighbour where F is no multiple).

    Args:
        features: Width F wanted.
        inputs: Width N of the flattened tap.

    >>> FlattenTo(4, inputs=2)(torch.tensor([[1.0, 2.0]]))
    tensor([[1., 1., 2., 2.]])
    """

    index: Tensor
    length_F: Tensor
    outside_FL: Tensor

    def __init__(self, features: int, *, inputs: int) -> None:
        super().__init__()
        self.features = features
        first_F, end_F = (torch.tensor(ends) for ends in zip(*_windows(inputs, features), strict=True))
        offset_L = torch.arange(int((end_F - first_F).max()))
        index_FL = first_F[:, None] + offset_L
        outside_FL = index_FL >= end_F[:, None]
        self.register_buffer("index", index_FL.clamp(max=inputs - 1).flatten(), persistent=False)
        self.register_buffer("length_F", end_F - first_F, persistent=False)
        self.register_buffer("outside_FL", outside_FL, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """features_BF of a tap of any shape."""
        windows_BFL = x.flatten(1).index_select(1, self.index).unflatten(1, self.outside_FL.shape)
        features_BF: Tensor = windows_BFL.masked_fill(self.outside_FL, 0).sum(2) / self.length_F
        return features_BF

    def extra_repr(self) -> str:
        """The width, as ``print`` shows it."""
        return f"features={self.features}"


def _windows(side: int, size: int) -> list[tuple[int, int]]:
    """First and end of each of the ``size`` windows that adaptive pooling lays over ``side``."""
    return [(i * side // size, -(-(i + 1) * side // size)) for i in range(size)]


def _pooled_to(size: int, pool: Callable[..., Tensor], x: Tensor) -> Tensor:
    """x_BCHW pooled to ``size`` rows and columns: in one go where they divide, else side by side in strips."""
    height, width = x.shape[2:]
    rows, columns = min(size, height), min(size, width)
    if height % rows == 0 and width % columns == 0:
        return pool(x, (height // rows, width // columns))
    strips = [pool(x[:, :, first:end], (end - first, 1)) for first, end in _windows(height, rows)]
    x = torch.cat(strips, 2)
    return torch.cat([pool(x[..., first:end], (1, end - first)) for first, end in _windows(width, columns)], 3)
