"""Class order, classes per experience, and the split into training and validation samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clframe.errors import ConfigError, DataError
from clframe.options import convert_argument, require_count
from clframe.seeding import generator_for

ICARL_ORDER = (
    68, 56, 78, 8, 23, 84, 90, 65, 74, 76, 40, 89, 3, 92, 55, 9, 26, 80, 43, 38, 58, 70, 77, 1, 85,
    19, 17, 50, 28, 53, 13, 81, 45, 82, 6, 59, 83, 16, 15, 44, 91, 41, 72, 60, 79, 52, 20, 10, 31, 54,
    37, 95, 14, 71, 96, 98, 97, 2, 64, 66, 42, 22, 35, 86, 24, 34, 87, 21, 99, 0, 88, 27, 18, 94, 11,
    12, 47, 25, 30, 46, 62, 69, 36, 61, 7, 63, 75, 5, 32, 4, 51, 48, 73, 93, 39, 67, 29, 49, 57, 33,
)  # fmt: skip
"""The class order of CIFAR-100 in Rebuffi et al., "iCaRL" (2017): numpy's permutation of seed 1993.

Written out because numpy keeps its legacy generators only for compatibility.
"""


def class_order(classes: int, *, order: str | Sequence[int], seed: int) -> tuple[int, ...]:
    """Order in which classes are learned.

    Args:
        classes: Number of classes; ids are 0 .. classes - 1.
        order: ``"seeded"`` (a random permutation), ``"sorted"``, ``"icarl"`` (:data:`ICARL_ORDER`, for 100 classes),
            or the ids.
        seed: Seed of the permutation.

    Raises:
        ConfigError: Unknown order, an order for another number of classes, or ids that are not a permutation of whole
            numbers.
    """
    order = convert_argument(order, str | tuple[int, ...], where="benchmark.class_order")
    if order == "seeded":
        return tuple(torch.randperm(classes, generator=generator_for(seed, "class order")).tolist())
    if order == "sorted":
        return tuple(range(classes))
    if order == "icarl":
        if classes != len(ICARL_ORDER):
            raise ConfigError(
                f"benchmark.class_order: found 'icarl', which orders 100 classes, for {classes} classes; "
                f"use 'seeded', 'sorted' or a list of class ids"
            )
        return ICARL_ORDER
    if isinstance(order, str):
        raise ConfigError(
            f"benchmark.class_order: found '{order}'; use 'seeded', 'sorted', 'icarl' or a list of class ids"
        )
    if sorted(order) != list(range(classes)):
        raise ConfigError(
            f"benchmark.class_order: found {len(order)} ids that are not a permutation of 0..{classes - 1}; "
            f"list every class once"
        )
    return tuple(order)


def classes_per_experience(
    classes: int, experiences: int, *, first: int | None = None, counts: Sequence[int] = ()
) -> tuple[int, ...]:
    """Number of new classes of each experience: equal shares, with the remainder going to the first ones.

    Args:
        classes: Number of classes.
        experiences: Number of experiences, including a larger first one.
        first: Classes of the first experience; the others share the rest.
        counts: Classes of each experience; overrides ``experiences``.

    Raises:
        ConfigError: Counts that do not add up to ``classes``, or an experience without classes.

    >>> classes_per_experience(10, 3)
    (4, 3, 3)
    >>> classes_per_experience(100, 11, first=50)
    (50, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5)
    >>> classes_per_experience(10, 5, counts=[2, 7, 1])
    (2, 7, 1)
    """
    first = convert_argument(first, int | None, where="benchmark.first")
    if counts := convert_argument(counts, tuple[int, ...], where="benchmark.counts"):
        return _check_counts(classes, tuple(counts), first)
    require_count(experiences, least=1, where="benchmark.experiences")
    if experiences > classes:
        raise ConfigError(f"benchmark.experiences: found {experiences} for {_classes(classes)}; give at most {classes}")
    if first is None:
        share, rest = divmod(classes, experiences)
        return tuple(share + (i < rest) for i in range(experiences))
    most = classes - experiences + 1
    least = classes if experiences == 1 else 1
    if not least <= first <= most:
        raise ConfigError(
            f"benchmark.first: found {first} for {_classes(classes)} in {experiences} experiences; "
            f"give {least}" + (f" to {most}, so that every experience has a class" if least < most else "")
        )
    return (first, *(classes_per_experience(classes - first, experiences - 1) if experiences > 1 else ()))


def _classes(count: int) -> str:
    return "1 class" if count == 1 else f"{count} classes"


def _check_counts(classes: int, counts: tuple[int, ...], first: int | None) -> tuple[int, ...]:
    if first is not None:
        raise ConfigError(f"benchmark.first: found {first} together with benchmark.counts; use one of them")
    if min(counts) < 1:
        raise ConfigError(f"benchmark.counts: found {min(counts)}; give every experience at least 1 class")
    if sum(counts) != classes:
        raise ConfigError(
            f"benchmark.counts: found {len(counts)} counts with sum {sum(counts)} for {_classes(classes)}; make them "
            f"add up to {classes}"
        )
    return counts


def hold_out(y_N: Tensor, share: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Split samples into training and validation data: the ascending indices index_T and index_V.

    Of a class of n samples, ``share * n`` are held out, rounded, at least 1 and at most n - 1. The draw depends on
    the seed and the class only, not on the class order.

    Raises:
        ConfigError: A share outside [0, 1).
        DataError: A class of one sample.

    >>> train, validation = hold_out(torch.tensor([0, 1, 1, 0, 1, 1, 1]), 0.4, seed=0)
    >>> len(train), len(validation), sorted([*train.tolist(), *validation.tolist()])
    (4, 3, [0, 1, 2, 3, 4, 5, 6])
    """
    share = convert_argument(share, float, where="benchmark.validation")
    if not 0 <= share < 1:
        raise ConfigError(f"benchmark.validation: found {share}; give a number from 0 to below 1")
    held_out_N = torch.zeros(len(y_N), dtype=torch.bool)
    if share > 0:
        for c in y_N.unique().tolist():
            members = (y_N == c).nonzero().flatten().cpu()
            if len(members) == 1:
                raise DataError(f"benchmark.validation: found 1 training sample of class {c}; add samples or set 0")
            count = min(max(1, int(share * len(members) + 0.5)), len(members) - 1)
            drawn = torch.randperm(len(members), generator=generator_for(seed, "validation", c))
            held_out_N[members[drawn[:count]]] = True
    return (~held_out_N).nonzero().flatten(), held_out_N.nonzero().flatten()
