"""Cost of one prediction: MACs (one multiply-add counts 1; FLOPs = 2 x MACs) by part, by exit and by role of layers.

Recorded after each experience. The cost of a part follows from shapes; the exits at which samples stop, the experts
that run and the products with zeros are counted on test samples. None of it is part of the costs of the run itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, get_args

from clframe.accounting.entries import Count, Experts, Part, PartKind, Products, Stop, as_rows, read_row
from clframe.errors import ConfigError, UnknownNameError, unknown_name

Row = TypeVar("Row", Part, Stop, Products, Experts)


class Predictions:
    """Costs of predictions, in rows that are appended; queries are about the last experience by default.

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

    # --- rows -------------------------------------------------------------------------------------

    def add_part(
        self, name: str, *, kind: PartKind, macs: int, component: str = "", experience: int | None = None
    ) -> None:
        """Append the cost of one part; see :class:`Part`.

        Raises:
            UnknownNameError: Unknown kind.
            ConfigError: A negative count.
        """
        if kind not in get_args(PartKind):
            raise UnknownNameError(unknown_name("kind of part", kind, get_args(PartKind)))
        self._parts.append(_checked(Part(name=name, kind=kind, macs=macs, component=component, experience=experience)))

    def add_stops(
        self,
        *,
        names: Sequence[str],
        cost_K: Sequence[int],
        count_K: Sequence[int],
        experience: int | None = None,
    ) -> None:
        """Append the samples that stopped at each exit, with the cost of one of them.

        Args:
            names: Names of the exits.
            cost_K: MACs of one sample up to each.
            count_K: Number of samples that stopped there.
            experience: Training experience after which they were counted.
        """
        rows = list(zip(names, cost_K, count_K, strict=True))
        self._stops += [
            _checked(Stop(exit=name, macs=cost, samples=count, experience=experience))
            for name, cost, count in rows
        ]

    def add_products(
        self, role: str, *, macs: int, effective_macs: int, samples: int, experience: int | None = None
    ) -> None:
        """Append the products of one role; see :class:`Products`.

        Raises:
            ConfigError: A negative count.
        """
        row = Products(role=role, macs=macs, effective_macs=effective_macs, samples=samples, experience=experience)
        self._products.append(_checked(row))

    def add_experts(self, row: Experts) -> None:
        """Append the use of one layer of experts."""
        self._experts.append(_checked(row))

    # --- queries ----------------------------------------------------------------------------------

    def parts(self, *, experience: int | None = None) -> tuple[Part, ...]:
        """Return the parts of a prediction, in the order in which they run."""
        return _rows_of(self._parts, experience)

    def stops(self, *, experience: int | None = None) -> tuple[Stop, ...]:
        """Return the samples that stopped at each exit."""
        return _rows_of(self._stops, experience)

    def products(self, *, experience: int | None = None) -> tuple[Products, ...]:
        """Return the multiply-adds by role."""
        return _rows_of(self._products, experience)

    def experts(self, *, experience: int | None = None) -> tuple[Experts, ...]:
        """Return the use of each layer of experts."""
        return _rows_of(self._experts, experience)

    def whole(self, *, experience: int | None = None) -> int:
        """Return the MACs of a sample that passes all parts, with all experts on."""
        return sum(part.macs for part in self.parts(experience=experience))

    def by_kind(self, *, experience: int | None = None) -> dict[str, int]:
        """Return the MACs of such a sample by kind of part."""
        return _sum_by(self.parts(experience=experience), lambda part: part.kind)

    def by_component(self, *, experience: int | None = None) -> dict[str, int]:
        """Return the MACs of such a sample by component, with an empty name for backbone and final classifier."""
        return _sum_by(self.parts(experience=experience), lambda part: part.component)

    def by_exit(self, *, experience: int | None = None) -> dict[str, int]:
        """Return the MACs of a sample up to each exit, heads and confidence measures included."""
        return {stop.exit: stop.macs for stop in self.stops(experience=experience)}

    def samples_by_exit(self, *, experience: int | None = None) -> dict[str, int]:
        """Count the samples that stopped at each exit."""
        found: dict[str, int] = {}
        for stop in self.stops(experience=experience):
            found[stop.exit] = found.get(stop.exit, 0) + stop.samples
        return found

    def expected(self, *, experience: int | None = None) -> float:
        """Return the mean MACs of a prediction under the exit policy; NaN without samples."""
        stops = self.stops(experience=experience)
        samples = sum(stop.samples for stop in stops)
        return sum(stop.macs * stop.samples for stop in stops) / samples if samples else math.nan

    def mean(self, *, experience: int | None = None) -> float:
        """Return the same less the experts that did not run, for the samples that reach them; NaN without samples.

        The saving of a layer of experts, less its router, was counted on a few samples that passed all parts.
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
        """Return the smallest cost that at least this share of the predictions do not exceed; None without samples."""
        stops = sorted(self.stops(experience=experience), key=lambda stop: stop.macs)
        wanted, reached = max(1, math.ceil(share * sum(stop.samples for stop in stops))), 0
        for stop in stops:
            reached += stop.samples
            if reached >= wanted:
                return stop.macs
        return None

    def by_role(self, *, experience: int | None = None, count: Count = "dense") -> dict[str, float]:
        """Return mean MACs of a sample by role; effective ones without products with zeros and experts that are off."""
        return {
            row.role: (row.macs if count == "dense" else row.effective_macs) / row.samples
            for row in self.products(experience=experience)
        }

    # --- storing ----------------------------------------------------------------------------------

    def as_tree(self) -> dict[str, list[dict[str, Any]]]:
        """Return plain values; :meth:`of` is the inverse."""
        lists = {"parts": self._parts, "stops": self._stops, "products": self._products, "experts": self._experts}
        return {name: as_rows(rows) for name, rows in lists.items()}  # type: ignore[arg-type]

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> Predictions:
        """Build from :meth:`as_tree`; unknown fields, of later versions, are ignored."""
        found = cls()
        found._parts = [_checked(read_row(Part, row)) for row in tree.get("parts", ())]
        found._stops = [_checked(read_row(Stop, row)) for row in tree.get("stops", ())]
        found._products = [_checked(read_row(Products, row)) for row in tree.get("products", ())]
        found._experts = [_checked(read_row(Experts, row)) for row in tree.get("experts", ())]
        return found


def _rows_of(rows: Sequence[Row], experience: int | None) -> tuple[Row, ...]:
    """Return the rows of one experience; of the last one that has any if None."""
    if experience is None and rows:
        experience = rows[-1].experience
    return tuple(row for row in rows if row.experience == experience)


def _sum_by(parts: Sequence[Part], key: Callable[[Part], str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in parts:
        found[key(part)] = found.get(key(part), 0) + part.macs
    return found


def _checked(row: Row) -> Row:
    """Return the row if none of its counts is negative."""
    for name, value in vars(row).items():
        if name != "experience" and isinstance(value, int) and value < 0:
            raise ConfigError(f"predictions: found {name} {value}; use counts of at least 0")
    return row

