"""Means and deviations of the published sets, and the same measured on any other.

All in units of the stored bytes, 0..255, over every pixel of the training set. Sources: MNIST and CIFAR-100
are measured here on the original files (a test repeats it); the others are the pixel statistics that are
commonly published, such as SVHN's 0.4377/0.1980 and KMNIST's 0.1918/0.3483, times 255. ImageNet's are
torchvision's. For Tiny ImageNet the often seen deviations 0.2302, 0.2265, 0.2262 are means of per-image
deviations; these are not.
"""

from __future__ import annotations

import torch
from torch import Tensor

Normalization = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and deviation, one value for each channel or one for all."""

PUBLISHED: dict[str, Normalization] = {
    "mnist": ((33.3184,), (78.5675,)),
    "fashion_mnist": ((72.9404,), (90.0212,)),
    "kmnist": ((48.8993,), (88.8274,)),
    "svhn": ((111.6089, 113.1613, 120.5651), (50.4977, 51.2590, 50.2442)),
    "cifar10": ((125.3069, 122.9501, 113.8660), (62.9932, 62.0887, 66.7049)),
    "cifar100": ((129.3042, 124.0700, 112.4341), (68.1702, 65.3918, 70.4184)),
    "tiny_imagenet": ((122.4510, 114.2655, 101.3625), (70.6350, 68.6205, 71.9355)),
    "imagenet": ((123.675, 116.280, 103.530), (58.395, 57.120, 57.375)),
}

UNCHANGED: Normalization = ((0.0,), (1.0,))
"""Of inputs that are taken as they are."""


def measured(x: Tensor, *, chunk: int = 2**20) -> Normalization:
    """Mean and deviation of every channel of [N, C, ...], or of all values of [N, D].

    Sums of bytes are exact; a constant channel gets the deviation 1, so that it is shifted to zero. About
    ``chunk`` values are held as doubles at a time.

    >>> measured(torch.tensor([[[[0, 2]], [[5, 5]]]], dtype=torch.uint8))
    ((1.0, 5.0), (1.0, 1.0))
    """
    kept = [d for d in range(x.ndim) if d != 1 or x.ndim < 3]
    channels = x.shape[1] if x.ndim >= 3 else 1
    total, square = (torch.zeros(channels, dtype=torch.float64) for _ in range(2))
    for part in x.split(max(1, chunk * len(x) // max(1, x.numel()))):
        values = part.double()
        total += values.sum(kept)
        square += values.square_().sum(kept)
    count = x.numel() / channels
    mean = total / count
    variance = (square / count - mean.square()).clamp_(min=0)
    std = torch.where(variance > 1e-12, variance.sqrt(), torch.ones_like(variance))
    return tuple(mean.tolist()), tuple(std.tolist())


def evenly_spaced(size: int, *, limit: int = 8192) -> Tensor:
    """Up to ``limit`` of ``size`` indices at even distances: enough to measure a large image set.

    >>> evenly_spaced(10, limit=4).tolist()
    [0, 3, 6, 9]
    """
    if size <= limit:
        return torch.arange(size)
    return torch.arange(limit) * (size - 1) // (limit - 1)
