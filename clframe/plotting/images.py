"""Heat maps, and figures as arrays of pixels for TensorBoard and PNG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clframe.errors import ClframeError
from clframe.metrics.continual import Matrix
from clframe.plotting.style import INK, PAPER, label, render_pixels, shades, spaced_indices, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from clframe.plotting.style import PixelArray

WIDEST, HIGHEST = 14.0, 12.0
"""Inches beyond which a figure does not grow with its numbers."""
LARGEST_WITH_NUMBERS = 30
"""Rows and columns up to which a heat map has its numbers drawn in."""


def draw_heat_map(
    axes: Any,
    values_RC: Sequence[Sequence[float]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    lowest: float = 0.0,
    highest: float = 1.0,
    percent: bool = False,
    undefined: str = "-",
    most: int = LARGEST_WITH_NUMBERS,
) -> None:
    """Draw colored cells with their numbers, first row on top; no color where undefined.

    Args:
        axes: Where to draw.
        values_RC: Numbers by row and column.
        rows: Names of the rows.
        columns: Names of the columns.
        lowest: Value of the palest color.
        highest: Value of the darkest color.
        percent: Whether numbers are shown as whole percents instead of with two decimals.
        undefined: Text of a cell without a number.
        most: Rows and columns up to which numbers are drawn in.
    """
    import numpy as np

    numbers_RC = np.ma.masked_invalid(np.asarray(values_RC, dtype=float))
    large = max(numbers_RC.shape) > LARGEST_WITH_NUMBERS
    # A large map as vectors would make an SVG of megabytes.
    axes.pcolormesh(numbers_RC, vmin=lowest, vmax=highest, cmap=shades(), edgecolors="none" if large else PAPER,
                    linewidth=0 if large else 1.2, rasterized=large)  # fmt: skip
    axes.invert_yaxis()
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    for axis, names in ((axes.xaxis, columns), (axes.yaxis, rows)):
        places = spaced_indices(len(names), most=most)
        axis.set_ticks([place + 0.5 for place in places], [names[place] for place in places])
    if max(numbers_RC.shape) > most:
        return
    for (r, c), value in np.ndenumerate(np.asarray(values_RC, dtype=float)):
        text = undefined if math.isnan(value) else f"{100 * value:.0f}" if percent else f"{value:.2f}"
        dark = (value - lowest) / max(highest - lowest, 1e-9) > 0.55
        number = axes.text(c + 0.5, r + 0.5, text, ha="center", va="center", color=PAPER if dark else INK)
        number.set_in_layout(False)  # inside the axes: measuring each would take longer than drawing it


@styled()
def heat_image(
    values_RC: Sequence[Sequence[float]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    lowest: float = 0.0,
    highest: float = 1.0,
    row_label: str = "",
    column_label: str = "after experience",
    percent: bool = False,
) -> PixelArray:
    """Draw a heat map that grows with its table; see :func:`draw_heat_map`."""
    require_table(values_RC, columns, "values_RC")
    if len(rows) != len(values_RC):
        raise ClframeError(f"rows: {len(rows)} names for {len(values_RC)} rows; give one each")
    width, height = _heat_size(len(rows), len(columns))
    figure, axes = make_axes(width=width, height=height)
    axes.set(title=title, ylabel=row_label, xlabel=column_label)
    draw_heat_map(axes, values_RC, rows=rows, columns=columns, lowest=lowest, highest=highest, percent=percent)
    return render_pixels(figure)


def matrix_image(accuracy_TE: Matrix) -> PixelArray:
    """Draw the accuracy matrix as a heat map from 0 to 1 with percents drawn in."""
    return heat_image(
        accuracy_TE, rows=[str(i) for i in range(len(accuracy_TE))],
        columns=[str(j) for j in range(len(accuracy_TE[0]))], title="accuracy, %", row_label="after experience",
        column_label="test experience", percent=True,
    )  # fmt: skip


def class_shares(counts_CC: Sequence[Sequence[int]]) -> list[list[float]]:
    """Divide each row of a confusion matrix by its sum; NaN for a class without samples.

    >>> class_shares([[3, 1], [0, 2]])
    [[0.75, 0.25], [0.0, 1.0]]
    """
    totals = [sum(row) for row in counts_CC]
    return [[n / total if total else math.nan for n in row] for row, total in zip(counts_CC, totals, strict=True)]


def draw_confusion(
    axes: Any, shares_CC: Sequence[Sequence[float]], *, names: Sequence[str], most: int = LARGEST_WITH_NUMBERS
) -> None:
    """Draw a confusion matrix as a heat map: rows are true classes, columns predicted ones.

    Args:
        axes: Where to draw.
        shares_CC: Shares of the samples of each true class, as :func:`class_shares` returns them.
        names: Names of the classes, in the order of rows and columns.
        most: Classes up to which numbers are drawn in.
    """
    shown = [label(name, most=16) for name in names]
    draw_heat_map(axes, shares_CC, rows=shown, columns=shown, percent=True, most=most)
    if max(map(len, shown)) > 3:
        axes.tick_params(axis="x", labelrotation=90)
    axes.set(xlabel="predicted class", ylabel="true class")


@styled()
def confusion_image(counts_CC: Sequence[Sequence[int]], *, names: Sequence[str]) -> PixelArray:
    """Draw a confusion matrix with the percentage of each true class; see :func:`draw_confusion`."""
    require_table(counts_CC, names, "counts_CC")
    width, height = _heat_size(len(names), len(names))
    figure, axes = make_axes(width=width, height=height)
    axes.set(title="predicted class, % of the samples of each true class")
    draw_confusion(axes, class_shares(counts_CC), names=names)
    return render_pixels(figure)


@styled()
def triangles_image(panels: Mapping[str, Sequence[Sequence[float]]]) -> PixelArray:
    """Draw heat maps of shares next to each other: ``panels[title][i][j]`` of experience j after experience i.

    Rows are the experiences, columns after which training experience, as in :func:`heat_image`.
    """
    import numpy as np
    from matplotlib.figure import Figure

    require_some(panels, "panels")
    count = max(len(rows) for rows in panels.values())
    names = [f"{n}" for n in range(count)]
    width, height = _heat_size(count, count)
    size = (min(width, WIDEST / 2) * len(panels), max(height, 2.6))
    figure = Figure(figsize=size, dpi=100, layout="constrained")
    for place, (title, rows) in enumerate(panels.items(), start=1):
        numbers_RC = np.full((count, count), np.nan)
        for i, row in enumerate(rows):
            numbers_RC[: len(row), i] = row
        axes: Any = figure.add_subplot(1, len(panels), place)
        axes.set(title=title, ylabel="experience", xlabel="after experience")
        draw_heat_map(axes, numbers_RC.tolist(), rows=names, columns=names, undefined="")
    return render_pixels(figure)


def make_axes(*, width: float, height: float) -> tuple[Figure, Any]:
    """Make a figure for pixels with one pair of axes; call it within :func:`~clframe.plotting.style.styled`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    return figure, figure.add_subplot()


def _heat_size(rows: int, columns: int) -> tuple[float, float]:
    """Return the inches that numbers need, or a fifth where there are too many to draw."""
    wide = 0.55 if max(rows, columns) <= LARGEST_WITH_NUMBERS else 0.1
    return min(WIDEST + 6, max(4.0, wide * columns + 2.4)), min(HIGHEST, max(2.5, 0.42 * rows + 1.3))


def require_some(given: Mapping[str, object], where: str) -> None:
    """Raise :class:`ClframeError` for an empty mapping."""
    if not given:
        raise ClframeError(f"{where}: none; give at least one")


def require_table(rows: Sequence[Sequence[float]], names: Sequence[str], where: str) -> None:
    """Raise :class:`ClframeError` where rows and names differ in length."""
    if not rows or any(len(row) != len(names) for row in rows) or not names:
        raise ClframeError(
            f"{where}: rows of {sorted({len(row) for row in rows})} numbers for {len(names)} names; give one for each"
        )


def matrix_markdown(accuracy_TE: Matrix) -> str:
    """Return the accuracy matrix in percent as a Markdown table, numbers to copy; ``-`` where not evaluated.

    >>> print(matrix_markdown([[1.0, float("nan")], [0.5, 0.75]]))
    | after | 0 | 1 |
    |---|---|---|
    | **0** | 100.0 | - |
    | **1** | 50.0 | 75.0 |
    """
    columns = range(len(accuracy_TE[0]))
    lines = [f"| after | {' | '.join(str(j) for j in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for i, row in enumerate(accuracy_TE):
        cells = ("-" if math.isnan(accuracy) else f"{100 * accuracy:.1f}" for accuracy in row)
        lines.append(f"| **{i}** | {' | '.join(cells)} |")
    return "\n".join(lines)
