"""What choose_defaults.py tries: a grid of options for each component, and the settings it is tried in.

A setting is a small class-incremental stream that takes seconds. Among the candidates are the published values, which
were chosen for longer training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """A data set, a backbone and how it is trained."""

    config: str
    overrides: tuple[str, ...] = ()


SETTINGS = {
    "digits": Setting("quickstart"),
    "digits, mlp": Setting("quickstart", ("backbone=mlp",)),
    "digits, SGD": Setting("quickstart", ("optimizer.name=sgd", "optimizer.lr=0.05", "trainer.batch_size=64")),
    "mnist": Setting("split_mnist"),
    "mnist, CNN": Setting("split_mnist", ("backbone=small_cnn",)),
    "mnist, batches of 64": Setting("split_mnist", ("trainer.epochs=4", "trainer.batch_size=64")),
}
"""``mnist`` stands for 1,000 images a class of its training part."""


@dataclass(frozen=True)
class Grid:
    """What is tried for one component.

    Attributes:
        beside: Components that it is used with, as an expression with options.
        settings: Names of the settings.
        candidates: Options tried, the more cautious of a kind first; those not named keep their defaults.
        rule: ``best``: the first candidate that is within one standard error of the highest mean accuracy;
            ``largest``: the largest value of the one option whose mean is within one of that of the smallest.
        published: The candidate that others are compared with, and that is kept where the best one is not more than
            three standard errors above it; with ``largest`` the smallest value.
    """

    beside: str
    settings: Sequence[str]
    candidates: Sequence[Options]
    published: Options
    rule: Literal["best", "largest"] = "best"


def around(center: Options, **others: Sequence[Any]) -> list[dict[str, Any]]:
    """``center``, then each of the other values of each option alone.

    >>> around({"a": 1, "b": 2}, b=[0, 3])
    [{'a': 1, 'b': 2}, {'a': 1, 'b': 0}, {'a': 1, 'b': 3}]
    """
    return [dict(center), *({**center, key: value} for key, values in others.items() for value in values)]


def crossed(**values: Sequence[Any]) -> list[dict[str, Any]]:
    """All combinations.

    >>> crossed(a=[1, 2], b=[3])
    [{'a': 1, 'b': 3}, {'a': 2, 'b': 3}]
    """
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


PRD = {"attract": 2.0, "distill": 4.0, "temperature": 0.1, "distill_temperature": 1.0}
HERDED = "er(memory=200, selection='herding', replay='concatenate')"
GRIDS = {
    "lucir": Grid(
        HERDED, ["digits", "mnist"],
        [*crossed(eta=[1.0, 3.0, 10.0, 30.0], less_forget=[1.0, 5.0]),
         *crossed(eta=[10.0, 30.0], less_forget=[0.3])],
        published={"eta": 1.0, "less_forget": 5.0},
    ),
    "podnet": Grid(
        HERDED, ["digits", "mnist, CNN"],
        [*crossed(spatial=[0.3, 1.0, 3.0], eta=[10.0], flat=[1.0]),
         *crossed(spatial=[1.0], eta=[3.0, 30.0, 100.0], flat=[1.0]), {"spatial": 3.0, "eta": 1.0, "flat": 1.0}],
        published={"spatial": 3.0, "eta": 1.0, "flat": 1.0},
    ),
    "prd": Grid(
        "", ["digits, SGD", "mnist, batches of 64"],
        [*crossed(attract=[1.0, 2.0, 4.0], distill=[1.0, 4.0, 16.0], temperature=[0.1], distill_temperature=[1.0]),
         *around({"attract": 2.0, "distill": 4.0}, temperature=[0.05, 0.2, 0.5], distill_temperature=[0.1, 0.3, 3.0])[1:]],
        published=PRD,
    ),
    "sparsity": Grid(
        "er(memory=200)", ["digits", "digits, mlp", "mnist"],
        [{"strength": value} for value in (0.0, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)],
        published={"strength": 0.0}, rule="largest",
    ),
}  # fmt: skip
"""Component -> what is tried."""
