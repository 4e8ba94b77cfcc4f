"""Tables: one object, rendered as text for a terminal, CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from clframe.metrics.registry import Kind
from clframe.metrics.statistics import NAN, deviation, mean
from clframe.printable import csv_cell, printable

WIDTH = 100
"""Columns of a terminal that a table may take."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number with its format and, where it is NaN, the reason.

    >>> str(Quantity(0.925, deviation=0.0125)), str(Quantity(float("nan"), undefined="one experience"))
    ('92.5 ± 1.2', 'undefined: one experience')
    """

    value: float
    deviation: float = NAN
    """Sample standard deviation over seeds; NaN shows none."""
    kind: Kind = "percent"
    undefined: str = ""
    """Why ``value`` is NaN."""

    def __str__(self) -> str:
        if math.isnan(self.value):
            return f"undefined: {self.undefined or 'no reason given'}"
        text = self._format(self.value)
        if self.kind == "points":
            text = text if text.startswith("-") else f"+{text}"
        # Counts such as parameters are equal for all seeds; "± 0" would only take room.
        exact = math.isnan(self.deviation) or (self.kind == "whole" and self.deviation == 0)
        return text if exact else f"{text} ± {self._format(self.deviation)}"

    def _format(self, value: float) -> str:
        if math.isinf(value):
            return "infinite"
        if self.kind == "whole":
            return f"{value:,.0f}"
        if self.kind == "fine":
            return f"{value:,.3f}"
        scale = 100 if self.kind in ("percent", "points") else 1
        return f"{round(scale * value, 1) + 0.0:,.1f}"  # + 0.0: never "-0.0"


Cell = str | Quantity


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of texts and quantities under column headings."""

    name: str
    """Name of its files, without an ending."""
    title: str
    note: str = ""
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def over_seeds(values: Mapping[int, float], *, kind: Kind = "percent", reason: str = "") -> Quantity:
    """Return mean and sample standard deviation over seeds; undefined where any seed has no number.

    >>> str(over_seeds({0: 0.5, 1: float("nan")}, reason="not evaluated"))
    'undefined: not evaluated (seed 1)'
    """
    missing = [seed for seed, value in values.items() if math.isnan(value)]
    if missing:
        which = "" if len(values) == 1 else f" (seed {', '.join(map(str, missing))})"
        return Quantity(NAN, undefined=(reason or "no number") + which)
    found = list(values.values())
    return Quantity(mean(found), deviation=deviation(found), kind=kind)


def to_text(table: Table, *, width: int = WIDTH, gap: int = 2) -> str:
    """Render as aligned text for a terminal.

    Headings are wrapped where they are wider than the cells below them. Columns that do not fit into ``width`` follow
    in further blocks, each with the first column. A number that is undefined is shown as ``-``; the reasons follow
    below the table.

    >>> print(to_text(Table(name="t", title="Exits", columns=("exit", "accuracy, %"), rows=(("a", Quantity(0.5)),))))
    Exits
    exit  accuracy, %
    -----------------
    a            50.0
    """
    columns = [_column(table, k) for k in range(len(table.columns))]
    lines = [printable(table.title), *(textwrap.wrap(printable(table.note), width) if table.note else [])]
    for block in _blocks(columns, width=width, gap=gap):
        lines += _block_lines(block, gap=gap)
    cells = [cell for row in table.rows for cell in row if isinstance(cell, Quantity) and math.isnan(cell.value)]
    reasons = dict.fromkeys(cell.undefined for cell in cells if cell.undefined)
    if reasons:
        lines += textwrap.wrap(printable(f"-: {'; '.join(reasons)}"), width)
    return "\n".join(lines)


class _Column(NamedTuple):
    heading: str
    cells: tuple[str, ...]
    numeric: bool
    width: int


def _column(table: Table, k: int) -> _Column:
    cells = tuple(
        "-" if isinstance(row[k], Quantity) and math.isnan(row[k].value) else printable(str(row[k]))  # type: ignore[union-attr]
        for row in table.rows
    )
    heading = printable(table.columns[k])
    return _Column(heading, cells, _numeric(table, k), max(map(len, (heading, *cells))))


def _blocks(columns: Sequence[_Column], *, width: int, gap: int) -> list[list[_Column]]:
    """Split columns into blocks that fit, narrowing headings and then the first column where that helps."""

    def total(found: Sequence[_Column]) -> int:
        return sum(column.width for column in found) + gap * (len(found) - 1)

    def narrowed(lines: int) -> list[_Column]:
        """Columns whose headings take about so many lines."""
        return [
            c._replace(width=max(-(-len(c.heading) // lines), *map(len, ("", *c.heading.split(), *c.cells))))
            for c in columns
        ]

    for lines in (1, 2, 3):
        if total(narrowed(lines)) <= width:
            return [narrowed(lines)]
    first, *rest = narrowed(3)
    room = width - total(rest) - gap
    if first.width > room:
        first = first._replace(width=min(first.width, max(room, min(24, width // 3))))
    blocks = [[first]]
    for column in rest:
        if len(blocks[-1]) > 1 and total([*blocks[-1], column]) > width:
            blocks.append([first])
        blocks[-1].append(column)
    return blocks


def _block_lines(block: Sequence[_Column], *, gap: int) -> list[str]:
    def line(texts: Sequence[str]) -> str:
        aligned = (t.rjust(c.width) if c.numeric else t.ljust(c.width) for t, c in zip(texts, block, strict=True))
        return (" " * gap).join(aligned).rstrip()

    headings = [textwrap.wrap(column.heading, max(column.width, 1)) for column in block]
    height = max(map(len, headings))
    headings = [[""] * (height - len(words)) + words for words in headings]  # the last line is next to the rule
    lines = [line(texts) for texts in zip(*headings, strict=True)]
    lines.append("-" * (sum(column.width for column in block) + gap * (len(block) - 1)))
    for first, *others in zip(*(column.cells for column in block), strict=True):
        wrapped = textwrap.wrap(first, max(block[0].width, 1)) or [""]
        lines += [line([wrapped[0], *others]), *wrapped[1:]]
    return lines


def to_csv(table: Table) -> str:
    """Render as CSV: unrounded numbers, fractions as fractions, a column of deviations where there are any.

    A text that a spreadsheet would compute, such as a class named ``=A1``, begins with a ``'``.
    """
    spread = [_has_deviation(table, k) for k in range(len(table.columns))]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [_without_unit(name) for name in table.columns]
    writer.writerow(
        [csv_cell(part) for name, wide in zip(names, spread, strict=True) for part in _with_deviation(name, wide)]
    )
    for row in table.rows:
        cells: list[object] = []
        for k, (cell, wide) in enumerate(zip(row, spread, strict=True)):
            if isinstance(cell, Quantity):
                cells.append(_exact(cell.value) or str(cell))
            else:  # the label of a row may have the unit, too
                cells.append(csv_cell(cell if k else _without_unit(cell)))
            if wide:
                cells.append(_exact(cell.deviation) if isinstance(cell, Quantity) else "")
        writer.writerow(cells)
    return text.getvalue()


def _without_unit(label: str) -> str:
    """A label without the unit that its numbers have in text only."""
    return label.removesuffix(", %").removesuffix(", points")


def _exact(value: float) -> str:
    return "" if math.isnan(value) else repr(float(value))


def _has_deviation(table: Table, column: int) -> bool:
    cells = [row[column] for row in table.rows]
    return any(isinstance(cell, Quantity) and not math.isnan(cell.deviation) for cell in cells)


def _with_deviation(name: str, wide: int) -> list[str]:
    return [name, f"{name}: deviation"] if wide else [name]


def to_markdown(table: Table) -> str:
    """Render as a Markdown pipe table with its title and note."""

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(_for_markdown(str(cell)) for cell in cells) + " |"

    rule = "|" + "|".join("---:" if _numeric(table, k) else "---" for k in range(len(table.columns))) + "|"
    head = [f"**{_for_markdown(table.title)}**", ""] + ([_for_markdown(table.note), ""] if table.note else [])
    return "\n".join([*head, line(table.columns), rule, *(line(row) for row in table.rows)]) + "\n"


def to_latex(table: Table) -> str:
    r"""Render as a LaTeX ``table`` that needs no package, to be included with ``\input``."""
    layout = "".join("r" if _numeric(table, k) else "l" for k in range(len(table.columns)))

    def line(cells: Sequence[object]) -> str:
        return " & ".join(_for_latex(str(cell)) for cell in cells) + r" \\"

    return "\n".join([
        r"\begin{table}", r"\centering", rf"\caption{{{_for_latex(f'{table.title}. {table.note}'.strip(' .') + '.')}}}",
        rf"\begin{{tabular}}{{{layout}}}", r"\hline", line(table.columns), r"\hline",
        *(line(row) for row in table.rows), r"\hline", r"\end{tabular}", r"\end{table}", "",
    ])  # fmt: skip


def _numeric(table: Table, column: int) -> bool:
    return any(isinstance(row[column], Quantity) for row in table.rows)


def _for_markdown(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", printable(" ".join(text.split())))


_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
    "<": r"$<$", ">": r"$>$", "≥": r"$\geq$", **{c: f"\\{c}" for c in "&%$#_{}"},
}  # fmt: skip


def _for_latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in printable(" ".join(text.split())))
