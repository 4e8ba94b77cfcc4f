"""A table, and the same table as CSV, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from clframe.metrics.statistics import NAN, deviation, mean

Kind = Literal["percent", "points", "whole", "decimal", "fine"]


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number with what is needed to show it; a NaN says why.

    >>> str(Quantity(0.925, deviation=0.0125)), str(Quantity(float("nan"), undefined="one experience"))
    ('92.5 ± 1.2', 'undefined: one experience')
    """

    value: float
    deviation: float = NAN
    """Over seeds; NaN shows none."""
    kind: Kind = "percent"
    """``percent`` shows a fraction times 100, ``points`` with its sign; ``whole`` hides a deviation of 0; ``fine``
    shows three decimals."""
    undefined: str = ""

    def __str__(self) -> str:
        if math.isnan(self.value):
            return f"undefined: {self.undefined or 'no reason given'}"
        shown = self._shown(self.value)
        if self.kind == "points":
            shown = shown if shown.startswith("-") else f"+{shown}"
        certain = math.isnan(self.deviation) or (self.kind == "whole" and self.deviation == 0)
        return shown if certain else f"{shown} ± {self._shown(self.deviation)}"

    def _shown(self, value: float) -> str:
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
    """Rows of texts and quantities under headings."""

    name: str
    """Of its files."""
    title: str
    note: str = ""
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def over_seeds(values: dict[int, float], *, kind: Kind = "percent", reason: str = "") -> Quantity:
    """Mean and sample deviation over seeds; undefined where any seed has no number, and says which.

    >>> str(over_seeds({0: 0.5, 1: float("nan")}, reason="not evaluated"))
    'undefined: not evaluated (seed 1)'
    """
    missing = [seed for seed, value in values.items() if math.isnan(value)]
    if missing:
        which = "" if len(values) == 1 else f" (seed {', '.join(map(str, missing))})"
        return Quantity(NAN, undefined=(reason or "no number") + which)
    found = list(values.values())
    return Quantity(mean(found), deviation=deviation(found), kind=kind)


def to_csv(table: Table) -> str:
    """Unrounded numbers, fractions as fractions, with a column of deviations where there are any."""
    spread = [_has_deviation(table, k) for k in range(len(table.columns))]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [name.removesuffix(", %").removesuffix(", points") for name in table.columns]
    writer.writerow([part for name, wide in zip(names, spread, strict=True) for part in _with_deviation(name, wide)])
    for row in table.rows:
        cells: list[object] = []
        for cell, wide in zip(row, spread, strict=True):
            cells.append(_exact(cell.value) or str(cell) if isinstance(cell, Quantity) else cell)
            if wide:
                cells.append(_exact(cell.deviation) if isinstance(cell, Quantity) else "")
        writer.writerow(cells)
    return text.getvalue()


def _exact(value: float) -> str:
    return "" if math.isnan(value) else repr(float(value))


def _has_deviation(table: Table, column: int) -> bool:
    cells = [row[column] for row in table.rows]
    return any(isinstance(cell, Quantity) and not math.isnan(cell.deviation) for cell in cells)


def _with_deviation(name: str, wide: int) -> list[str]:
    return [name, f"{name}: deviation"] if wide else [name]


def to_markdown(table: Table) -> str:
    """A pipe table with its title and note."""

    def line(cells: Sequence[object]) -> str:
        return "| " + " | ".join(_for_markdown(str(cell)) for cell in cells) + " |"

    rule = "|" + "|".join("---:" if _numeric(table, k) else "---" for k in range(len(table.columns))) + "|"
    head = [f"**{_for_markdown(table.title)}**", ""] + ([_for_markdown(table.note), ""] if table.note else [])
    return "\n".join([*head, line(table.columns), rule, *(line(row) for row in table.rows)]) + "\n"


def to_latex(table: Table) -> str:
    r"""A ``table`` that needs no package, to be read with ``\input``."""
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
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", " ".join(text.split()))


_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$",
    "<": r"$<$", ">": r"$>$", "≥": r"$\geq$", **{c: f"\\{c}" for c in "&%$#_{}"},
}  # fmt: skip


def _for_latex(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in " ".join(text.split()))
