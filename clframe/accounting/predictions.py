"""What one prediction costs: MACs (one multiply-add counts 1; FLOPs = 2 x MACs) by part, by exit and by kind of layer.

Noted after each experience. What one part costs follows shapes; how many samples stop where, which experts run and
which products have a zero in them is counted on real samples. Nothing here is part of what the run itself cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar, get_args

from clframe.accounting.entries import Count, Experts, Part, PartKind, Products, Stop, read_row
from clframe.errors import ConfigError, UnknownNameError, unknown_name

Row = TypeVar("Row", Part, Stop, Products, Experts)


class Predictions:
    """Costs of predictions, rows that are only ever added; questions are about the last experience unless told.

    >>> predictions = Predictions()
    >>> predictions.add_part("layer1", kind="stage", macs=100)
    >>> predictions.add_part("exit/final", kind="head", macs=20)
    >>> predictions.add_stops(names=("layer1", "final"), cost_K=(100, 120), count_K=(3, 1))
    >>> predictions.whole(), predictions.expected(), predictions.quantile(0.5)
    (120, 105.0, 100)
    """

    def __init__(self) -> None:
        self._parts: list[Part] = []
        self._stops: list[Stop] = []
        self._products: list[Products] = []
        self._experts: list[Experts] = []

    # --- adding -----------------------------------------------------------------------------------

    def add_part(
        self, name: str, *, kind: PartKind, macs: int, component: str = "", experience: int | None = None
    ) -> None:
        """Note what one part costs a sample; see :class:`Part`.

        Raises:
            UnknownNameError: No such kind.
            ConfigError: A count below zero.
        """
        if kind not in get_args(PartKind):
            raise UnknownNameError(unknown_name("kind of part", kind, get_args(PartKind)))
        self._parts.append(_counts(Part(name=name, kind=kind, macs=macs, component=component, experience=experience)))

    def add_stops(
        self,
        *,
        names: Sequence[str],
        cost_K: Sequence[int],
        count_K: Sequence[int],
        of: int | None = None,
        experience: int | None = None,
    ) -> None:
        """Note how many samples stopped at each exit: a table of costs times counts, exact.

        Args:
            names: Names of the exits.
            cost_K: MACs of one sample up to each.
            count_K: How many samples stopped there.
            of: The test experience they are from.
            experience: After which training experience.
        """
        rows = list(zip(names, cost_K, count_K, strict=True))
        self._stops += [
            _counts(Stop(exit=name, macs=cost, samples=count, of=of, experience=experience))
            for name, cost, count in rows
        ]

    def add_products(
        self, role: str, *, macs: int, effective_macs: int, samples: int, experience: int | None = None
    ) -> None:
        """Note the products of one role; see :class:`Products`.

        Raises:
            ConfigError: A count below zero.
        """
        row = Products(role=role, macs=macs, effective_macs=effective_macs, samples=samples, experience=experience)
        self._products.append(_counts(row))

    def add_experts(self, row: Experts) -> None:
        """Note what one layer of experts did."""
        self._experts.append(_counts(row))

    # --- asking -----------------------------------------------------------------------------------

    def parts(self, *, experience: int | None = None) -> tuple[Part, ...]:
        """Every part of a prediction, in the order in which they run."""
        return _of(self._parts, experience)

    def stops(self, *, experience: int | None = None) -> tuple[Stop, ...]:
        """Who stopped where."""
        return _of(self._stops, experience)

    def products(self, *, experience: int | None = None) -> tuple[Products, ...]:
        """Multiply-adds by role."""
        return _of(self._products, experience)

    def experts(self, *, experience: int | None = None) -> tuple[Experts, ...]:
        """What each layer of experts did."""
        return _of(self._experts, experience)

    def whole(self, *, experience: int | None = None) -> int:
        """MACs of a sample that passes all parts, all experts run."""
        return sum(part.macs for part in self.parts(experience=experience))

    def by_kind(self, *, experience: int | None = None) -> dict[str, int]:
        """MACs of such a sample by kind of part."""
        return _summed(self.parts(experience=experience), lambda part: part.kind)

    def by_component(self, *, experience: int | None = None) -> dict[str, int]:
        """MACs of such a sample by component, backbone and final classifier under the empty name."""
        return _summed(self.parts(experience=experience), lambda part: part.component)

    def by_exit(self, *, experience: int | None = None) -> dict[str, int]:
        """MACs of a sample up to each exit, heads and policy included."""
        return {stop.exit: stop.macs for stop in self.stops(experience=experience)}

    def samples_by_exit(self, *, experience: int | None = None) -> dict[str, int]:
        """How many samples stopped at each exit."""
        found: dict[str, int] = {}
        for stop in self.stops(experience=experience):
            found[stop.exit] = found.get(stop.exit, 0) + stop.samples
        return found

    def expected(self, *, experience: int | None = None) -> float:
        """Mean MACs of a prediction, where each sample stops as the policy has it; NaN without samples."""
        stops = self.stops(experience=experience)
        samples = sum(stop.samples for stop in stops)
        return sum(stop.macs * stop.samples for stop in stops) / samples if samples else math.nan

    def mean(self, *, experience: int | None = None) -> float:
        """The same with the experts that ran, as far as samples get; NaN without samples.

        What experts leave out, less their router, was counted on a few samples that passed all parts.
        """
        names = [part.name for part in self.parts(experience=experience)]
        macs, stopped = self.expected(experience=experience), self.samples_by_exit(experience=experience)
        samples = sum(stopped.values())
        for layer in self.experts(experience=experience):
            behind = names[names.index(layer.part) :] if layer.part in names else ()
            reach = sum(count for exit, count in stopped.items() if f"exit/{exit}" in behind)
            macs -= (layer.dense_macs - layer.macs) / layer.samples * (reach / samples if samples else math.nan)
        return macs

    def quantile(self, share: float, *, experience: int | None = None) -> int | None:
        """The least MACs that at least this share of the predictions stay within; None without samples."""
        stops = sorted(self.stops(experience=experience), key=lambda stop: stop.macs)
        wanted, reached = max(1, math.ceil(share * sum(stop.samples for stop in stops))), 0
        for stop in stops:
            reached += stop.samples
            if reached >= wanted:
                return stop.macs
        return None

    def by_role(self, *, experience: int | None = None, count: Count = "dense") -> dict[str, float]:
        """Mean MACs of a sample by role; effective ones leave out products with zeros and experts that rest."""
        return {
            row.role: (row.macs if count == "dense" else row.effective_macs) / row.samples
            for row in self.products(experience=experience)
        }

    # --- storing ----------------------------------------------------------------------------------

    def as_tree(self) -> dict[str, list[dict[str, Any]]]:
        """Plain values; :meth:`of` is the inverse."""
        lists = {"parts": self._parts, "stops": self._stops, "products": self._products, "experts": self._experts}
        return {name: [asdict(row) for row in rows] for name, rows in lists.items()}  # type: ignore[attr-defined]

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> Predictions:
        """What :meth:`as_tree` was taken of; fields that this version does not know are left out."""
        found = cls()
        found._parts = [_counts(read_row(Part, row)) for row in tree.get("parts", ())]
        found._stops = [_counts(read_row(Stop, row)) for row in tree.get("stops", ())]
        found._products = [_counts(read_row(Products, row)) for row in tree.get("products", ())]
        found._experts = [_counts(read_row(Experts, row)) for row in tree.get("experts", ())]
        return found


def _of(rows: Sequence[Row], experience: int | None) -> tuple[Row, ...]:
    """Rows of one experience, the last that has any if None is given."""
    if experience is None and rows:
        experience = rows[-1].experience
    return tuple(row for row in rows if row.experience == experience)


def _summed(parts: Sequence[Part], key: Callable[[Part], str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in parts:
        found[key(part)] = found.get(key(part), 0) + part.macs
    return found


def _counts(row: Row) -> Row:
    """The row, if all its counts are such."""
    for name, value in asdict(row).items():
        if name not in ("experience", "of") and isinstance(value, int) and value < 0:
            raise ConfigError(f"predictions: found {name} {value}; give counts of 0 or more")
    return row

