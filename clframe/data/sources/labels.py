"""Labels as they come: checked, numbered 0..C-1, and dealt to a training and a test part."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clframe.errors import ConfigError, DataError
from clframe.functional.seeding import generator_for

logger = logging.getLogger("clframe.data")

Labels = npt.NDArray[Any]
"""Whole numbers or names, one for each sample."""


def checked_labels(labels: npt.ArrayLike, *, where: str) -> Labels:
    """Labels as int64 from 0, or as text.

    Raises:
        DataError: Not one label a sample, negative, not whole, not finite, or no label at all.

    >>> checked_labels([2.0, 0.0], where="y")
    array([2, 0])
    """
    y = np.asarray(labels)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1:
        raise DataError(f"{where}: labels of shape {y.shape}; give one whole number or name for each sample")
    if y.dtype.kind in "US":
        return y.astype(str)
    if y.dtype.kind not in "iubf":
        raise DataError(f"{where}: labels of type {y.dtype}; give whole numbers from 0 or names")
    if y.dtype.kind == "f" and len(y):
        bad = ~np.isfinite(y) | (y != np.floor(y))
        if bad.any():
            at = int(bad.argmax())
            raise DataError(f"{where}: label {y[at]} of sample {at} is no whole number; give whole numbers from 0")
    if len(y) and y.min() < 0:
        at = int(y.argmin())
        raise DataError(f"{where}: label {y[at]} of sample {at} is out of range; give whole numbers from 0")
    return y.astype(np.int64)


def relabel(train: Labels, test: Labels, *, where: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Both parts numbered 0..C-1 in ascending order of the labels, and the labels themselves as class names.

    Names that are all whole numbers are ordered as numbers. A renumbering is said in the log.

    Raises:
        DataError: A part without samples, or a class that only one of the parts has.

    >>> relabel(np.array([7, 3, 7]), np.array([3, 7]), where="mine")
    (tensor([1, 0, 1]), tensor([0, 1]), ('3', '7'))
    """
    for part, labels in (("training", train), ("test", test)):
        if not len(labels):
            raise DataError(f"{where}: no {part} samples; add some")
    names = _ascending(set(train.tolist()))
    strange = set(test.tolist()) - set(names)
    if strange:
        raise DataError(
            f"{where}: the test data has class '{_ascending(strange)[0]}', which no training sample has; "
            f"remove it or add training samples"
        )
    untested = set(names) - set(test.tolist())
    if untested:
        raise DataError(f"{where}: class '{_ascending(untested)[0]}' has no test samples; add some or remove the class")
    if names != list(range(len(names))):
        logger.info("%s: %s", where, _mapping(names))
    number = {name: i for i, name in enumerate(names)}
    train_y, test_y = (
        torch.tensor([number[label] for label in labels.tolist()], dtype=torch.long) for labels in (train, test)
    )
    return train_y, test_y, tuple(map(str, names))


def split_off_test(
    y_N: Tensor, *, fraction: float, name: str, where: str = "", class_names: Sequence[str] = ()
) -> tuple[Tensor, Tensor]:
    """Indices of a training and a test part, drawn class by class; the same for every seed of a run.

    Args:
        y_N: Labels 0..C-1.
        fraction: Share of each class to test on; at least one sample, and never all of them.
        name: What the draw depends on, beside the size of each class.
        where: The data, for messages; ``name`` where none is given.
        class_names: Of the classes, for messages.

    Raises:
        ConfigError: A fraction that is none.
        DataError: A class with a single sample.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"benchmark.test_fraction: found {fraction}; give a number between 0 and 1")
    train, test = [], []
    for c in range(int(y_N.max()) + 1):
        members = (y_N == c).nonzero().flatten()
        if len(members) == 1:
            raise DataError(
                f"{where or name}: class '{class_names[c] if class_names else c}' has one sample, which "
                f"cannot be trained on and tested on; add samples or give test data of its own"
            )
        members = members[torch.randperm(len(members), generator=generator_for(0, name, c))]
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        test.append(members[:count])
        train.append(members[count:])
    return torch.cat(train).sort().values, torch.cat(test).sort().values


def warn_of_duplicates(train: Tensor, test: Tensor, *, where: str) -> int:
    """How many test inputs are also trained on, byte for byte; said in a warning where there are any."""
    known = {_digest(x) for x in train}
    count = sum(_digest(x) in known for x in test)
    if count:
        logger.warning(
            "%s: %d of %d test samples are also in the training data; accuracy will look better than it is",
            where, count, len(test),
        )  # fmt: skip
    return count


def _digest(x: Tensor) -> bytes:
    return hashlib.blake2b(x.contiguous().numpy().tobytes(), digest_size=16).digest()


def _ascending(labels: set[Any]) -> list[Any]:
    if all(isinstance(label, str) and label.isdecimal() for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def _mapping(names: Sequence[Any], limit: int = 10) -> str:
    shown = ", ".join(f"{name} -> {i}" for i, name in enumerate(names[:limit]))
    rest = f", ... {len(names)} in all" if len(names) > limit else ""
    return f"classes are numbered {shown}{rest}"
