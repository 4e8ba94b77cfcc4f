"""Stored numbers of a sweep file, and their comparison with measured ones.

::

    expected:
      source: docs/results.md, Split digits
      tolerance: {final_average_accuracy: 0.03, forgetting: 0.04}
      rows:
        er: {set: {strategy: er}, final_average_accuracy: 0.94, forgetting: 0.06}

Numbers are means over the seeds of the file, as fractions. One is reproduced if the measured mean differs by at most
the tolerance of its metric.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from clframe.errors import ConfigError, UnknownNameError, unknown_name
from clframe.metrics.registry import METRICS
from clframe.metrics.statistics import mean
from clframe.results import Result
from clframe.sweep.cells import Cell
from clframe.sweep.file import SweepFile
from clframe.sweep.space import Axes, Setting, Space
from clframe.sweep.values import as_text
from clframe.tables import Quantity, Table

_KEYS: Final = ("source", "tolerance", "rows")


@dataclass(frozen=True, kw_only=True)
class ExpectedRow:
    """Stored numbers of one row of a table."""

    name: str
    setting: Setting
    """Values of the sweep's keys that the row has."""
    metrics: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Stored numbers of a table."""

    source: str
    """Page and section that publish them."""
    tolerance: Mapping[str, float]
    """Largest difference by metric."""
    rows: tuple[ExpectedRow, ...]

    def row(self, name: str) -> ExpectedRow:
        """Return the row called ``name``; raises :class:`UnknownNameError` with the nearest name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise UnknownNameError(unknown_name("row", name, [row.name for row in self.rows], where="reproduce"))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One number, stored and measured."""

    row: str
    metric: str
    stored: float
    measured: float
    tolerance: float

    @property
    def reproduced(self) -> bool:
        """Whether the measured number is within the tolerance of the stored one; NaN is not."""
        return abs(self.measured - self.stored) <= self.tolerance


def read_expected(file: SweepFile) -> Expected:
    """Read the block ``expected`` of a sweep file.

    Raises:
        ConfigError: It has none, or one that is not as described above.
    """
    where, tree = f"{file.path}: expected", file.expected
    if not tree:
        raise ConfigError(f"{where}: has no stored numbers; give a sweep file that has the block expected")
    unknown = [key for key in tree if key not in _KEYS]
    rows, tolerance = tree.get("rows"), tree.get("tolerance")
    if unknown or not isinstance(rows, Mapping) or not isinstance(tolerance, Mapping) or not rows:
        found = f"unknown key '{unknown[0]}'" if unknown else "no rows or no tolerance"
        raise ConfigError(f"{where}: found {found}; give the keys {', '.join(_KEYS)}")
    limits = {str(name): _number(value, where=f"{where}.tolerance.{name}") for name, value in tolerance.items()}
    found_rows = tuple(_row(str(name), row, limits, where=f"{where}.rows.{name}") for name, row in rows.items())
    return Expected(source=str(tree.get("source", file.path)), tolerance=limits, rows=found_rows)


def _row(name: str, tree: Any, limits: Mapping[str, float], *, where: str) -> ExpectedRow:
    if not isinstance(tree, Mapping) or not isinstance(tree.get("set"), Mapping):
        raise ConfigError(f"{where}: has no set; give the values of the row, such as set: {{strategy: er}}")
    metrics = {str(key): _number(value, where=f"{where}.{key}") for key, value in tree.items() if key != "set"}
    for metric in metrics:
        METRICS.get(metric, where=where)
        if metric not in limits:
            raise ConfigError(f"{where}: found {metric} without a tolerance; add it to tolerance")
    setting = {str(key): as_text(value, where=f"{where}.set.{key}") for key, value in tree["set"].items()}
    return ExpectedRow(name=name, setting=setting, metrics=metrics)


def _number(value: Any, *, where: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ConfigError(f"{where}: found {value!r}; give a number")
    return float(value)


def restrict(space: Space, setting: Setting) -> Space:
    """Return the part of a sweep that has the values of a row.

    Raises:
        ConfigError: A value that the sweep does not have.
    """
    rows = tuple(kept for row in space.rows if (kept := _kept(row, setting)) is not None)
    grid = _kept(space.grid, setting)
    missing = [key for key in setting if key not in space.grid and not any(key in row for row in rows)]
    if grid is None or (space.rows and not rows) or missing:
        found = ", ".join(f"{key}={value}" for key, value in setting.items())
        raise ConfigError(f"expected: found a row with {found}, which no cell of the sweep has; correct its values")
    left = {name: axes for name, axes in space.strategies.items() if name == setting.get("strategy", name)}
    return replace(space, grid=grid, rows=rows, strategies=left)


def _kept(axes: Axes, setting: Setting) -> dict[str, tuple[str, ...]] | None:
    """The axes with the values of a setting; None if they do not have them."""
    kept = {key: values if key not in setting else tuple(v for v in values if v == setting[key])
            for key, values in axes.items()}  # fmt: skip
    return kept if all(kept.values()) else None


def compare(row: ExpectedRow, cells: Sequence[Cell], tolerance: Mapping[str, float]) -> list[Comparison]:
    """Compare the means over finished cells with the stored numbers of their row."""
    results = [Result.from_json(cell.results) for cell in cells]
    return [
        Comparison(row=row.name, metric=metric, stored=stored, tolerance=tolerance[metric],
                   measured=mean([result.score(metric).value for result in results]))
        for metric, stored in row.metrics.items()
    ]  # fmt: skip


def comparison_table(found: Sequence[Comparison], *, title: str) -> Table:
    """Return stored and measured numbers with their differences as a table."""
    rows: list[tuple[str | Quantity, ...]] = []
    for one in found:
        metric = METRICS.get(one.metric)
        verdict = "reproduced" if one.reproduced else "not reproduced"
        shown = [Quantity(value, kind=metric.kind) for value in (one.stored, one.measured)]
        limit = Quantity(one.tolerance, kind="percent" if metric.kind == "points" else metric.kind)
        difference = Quantity(one.measured - one.stored, kind="points" if metric.kind == "percent" else metric.kind)
        rows.append((one.row, metric.label, *shown, difference, limit, verdict))
    return Table(
        name="reproduced", title=title,
        columns=("row", "metric", "stored", "measured", "difference", "tolerance", "verdict"), rows=tuple(rows),
    )  # fmt: skip
