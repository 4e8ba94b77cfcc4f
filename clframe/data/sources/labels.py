"""Class labels, the split into training and test data, and mean and standard deviation of inputs."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clframe.errors import ConfigError, DataError
from clframe.seeding import generator_for

Normalization = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation, per channel or one value for all channels."""

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

IDENTITY: Normalization = ((0.0,), (1.0,))
"""Normalization that changes nothing."""


def measure_normalization(x: Tensor, *, chunk: int = 2**20) -> Normalization:
    """Mean and standard deviation of each channel of [N, C, ...], or of all values of [N, D].

    Sums of bytes are exact. A constant channel gets the standard deviation 1, which normalizes it to zero. About
    ``chunk`` values are converted to double at a time.

    >>> measure_normalization(torch.tensor([[[[0, 2]], [[5, 5]]]], dtype=torch.uint8))
    ((1.0, 5.0), (1.0, 1.0))
    """
    kept = [d for d in range(x.ndim) if d != 1 or x.ndim < 3]
    channels = x.shape[1] if x.ndim >= 3 else 1
    if x.dtype == torch.uint8 and x.ndim >= 3:
        total, square = _sum_bytes(x)
    else:
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


def _sum_bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Exact sums of the values and of their squares by channel, from how often each byte occurs: ten times faster."""
    counts = [torch.bincount(x[:, channel].reshape(-1), minlength=256) for channel in range(x.shape[1])]
    counts_C256, values = torch.stack(counts).double(), torch.arange(256, dtype=torch.float64)
    return counts_C256 @ values, counts_C256 @ values.square()


def evenly_spaced(size: int, *, limit: int = 8192) -> Tensor:
    """Up to ``limit`` of ``size`` indices at equal distances: enough to measure a large image set.

    >>> evenly_spaced(10, limit=4).tolist()
    [0, 3, 6, 9]
    """
    if size <= limit:
        return torch.arange(size)
    return torch.arange(limit) * (size - 1) // (limit - 1)


logger = logging.getLogger("clframe.data")

Labels = npt.NDArray[Any]
"""Integers or names, one per sample."""


def check_labels(labels: npt.ArrayLike, *, where: str) -> Labels:
    """Convert labels to int64 from 0, or to text.

    Raises:
        DataError: More than one label per sample, or labels that are negative, not integers, or not finite.

    >>> check_labels([2.0, 0.0], where="y")
    array([2, 0])
    """
    y = np.asarray(labels)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise DataError(f"{where}: found labels of shape {y.shape}; give one integer or name per sample")
    if y.dtype.kind in "US":
        return y.astype(str)
    if y.dtype.kind not in "iubf":
        raise DataError(f"{where}: found labels of type {y.dtype}; give integers from 0 or names")
    if y.dtype.kind == "f" and len(y):
        bad = ~np.isfinite(y) | (y != np.floor(y))
        if bad.any():
            at = int(bad.argmax())
            raise DataError(f"{where}: label {y[at]} of sample {at} is not an integer; give integers from 0")
    if len(y) and y.min() < 0:
        at = int(y.argmin())
        raise DataError(f"{where}: label {y[at]} of sample {at} is out of range; give integers from 0")
    return y.astype(np.int64)


def relabel(train: Labels, test: Labels, *, where: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Number the classes of both splits 0..C-1 in ascending order of the labels, which become the class names.

    Names that are all integers are ordered as numbers. A renumbering is logged.

    Raises:
        DataError: A split without samples, or a class that occurs in only one of them.

    >>> relabel(np.array([7, 3, 7]), np.array([3, 7]), where="mine")
    (tensor([1, 0, 1]), tensor([0, 1]), ('3', '7'))
    """
    for split, labels in (("training", train), ("test", test)):
        if not len(labels):
            raise DataError(f"{where}: found no {split} samples; add some")
    names = _sort_labels(set(train.tolist()))
    untrained = set(test.tolist()) - set(names)
    if untrained:
        raise DataError(
            f"{where}: class '{_sort_labels(untrained)[0]}' has test samples but no training samples; add some or "
            f"remove the class"
        )
    untested = set(names) - set(test.tolist())
    if untested:
        raise DataError(
            f"{where}: class '{_sort_labels(untested)[0]}' has no test samples; add some or remove the class"
        )
    if names != list(range(len(names))):
        logger.info("%s: %s", where, _numbering(names))
    number = {name: i for i, name in enumerate(names)}
    train_y, test_y = (
        torch.tensor([number[label] for label in labels.tolist()], dtype=torch.long) for labels in (train, test)
    )
    return train_y, test_y, tuple(map(str, names))


def split_off_test(
    y_N: Tensor, *, fraction: float, name: str, where: str = "", class_names: Sequence[str] = ()
) -> tuple[Tensor, Tensor]:
    """Split samples class by class into training and test data: ascending indices, the same for every seed of a run.

    Args:
        y_N: Labels 0..C-1.
        fraction: Fraction of each class to test on; at least one sample, and never all of them.
        name: Seed of the draw, together with the class.
        where: The data, for messages; default: ``name``.
        class_names: Names of the classes, for messages.

    Raises:
        ConfigError: A fraction outside (0, 1).
        DataError: A class with a single sample.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"benchmark.test_fraction: found {fraction}; give a number between 0 and 1")
    train, test = [], []
    for c in range(int(y_N.max()) + 1):
        members = (y_N == c).nonzero().flatten()
        if len(members) == 1:
            raise DataError(
                f"{where or name}: class '{class_names[c] if class_names else c}' has one sample, too few to split "
                f"into training and test data; add samples or give separate test data"
            )
        members = members[torch.randperm(len(members), generator=generator_for(0, name, c))]
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        test.append(members[:count])
        train.append(members[count:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values


def warn_of_duplicates(train: Tensor, test: Tensor, *, where: str) -> int:
    """Count the test inputs that are also training inputs, byte for byte, and log a warning if there are any."""
    known = set(_digests(train))
    count = sum(digest in known for digest in _digests(test))
    if count:
        logger.warning(
            "%s: %d of %d test samples are also in the training data; accuracy will be overestimated",
            where, count, len(test),
        )  # fmt: skip
    return count


def _digests(x: Tensor) -> Iterator[bytes]:
    rows = x.reshape(len(x), -1).contiguous().numpy()
    return (hashlib.blake2b(row, digest_size=16).digest() for row in rows)


def _sort_labels(labels: set[Any]) -> list[Any]:
    if all(isinstance(label, str) and label.isdecimal() for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def _numbering(names: Sequence[Any], limit: int = 10) -> str:
    shown = ", ".join(f"{name} -> {i}" for i, name in enumerate(names[:limit]))
    rest = f", ... {len(names)} in all" if len(names) > limit else ""
    return f"classes are numbered {shown}{rest}"
