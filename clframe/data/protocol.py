"""Who learns what when: classes dealt out to experiences."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clframe.errors import ConfigError
from clframe.functional.seeding import generator_for


def class_order(classes: int, *, order: str | Sequence[int], seed: int) -> tuple[int, ...]:
    """The order in which classes are learnt.

    Args:
        classes: How many there are; ids are 0 .. classes - 1.
        order: ``"seeded"`` (a permutation drawn from ``seed``), ``"sorted"``, or the ids themselves.
        seed: The run's seed.

    Raises:
        ConfigError: Unknown word, or ids that are no permutation of all classes.
    """
    if order == "seeded":
        return tuple(torch.randperm(classes, generator=generator_for(seed, "class order")).tolist())
    if order == "sorted":
        return tuple(range(classes))
    if isinstance(order, str):
        raise ConfigError(
            f"benchmark.class_order: found '{order}'; give 'seeded', 'sorted' or a list of class ids"
        )
    given = tuple(order)
    if sorted(given) != list(range(classes)):
        raise ConfigError(
            f"benchmark.class_order: found {len(given)} ids that are no permutation of 0..{classes - 1}; "
            f"name every class once"
        )
    return given


def deal(classes: int, experiences: int) -> tuple[int, ...]:
    """How many classes each experience brings: equal parts, leftovers to the first ones.

    >>> deal(10, 3)
    (4, 3, 3)
    """
    if experiences < 1:
        raise ConfigError(f"benchmark.experiences: found {experiences}; give at least 1")
    if experiences > classes:
        raise ConfigError(
            f"benchmark.experiences: found {experiences} for {classes} classes; give at most {classes}"
        )
    share, rest = divmod(classes, experiences)
    return tuple(share + (i < rest) for i in range(experiences))
