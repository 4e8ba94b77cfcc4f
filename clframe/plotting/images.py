"""Heat maps and accuracy matrices as arrays for TensorBoard and PNG files."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clframe.errors import ClframeError
from clframe.metrics.continual import Matrix

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    PixelArray = NDArray[np.uint8]

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000", "#F0E442")
"""Okabe and Ito, "Color Universal Design" (2008), the palest last."""

MARKERS = "osD^vP*X"
LONGEST_LEGEND = 16
WIDEST, HIGHEST = 14.0, 12.0
"""Inches beyond which a figure does not grow with its numbers."""
LARGEST_WITH_DIGITS = 30
"""Rows and columns up to which a heat map has its numbers drawn in."""


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
) -> PixelArray:
    """A small heat map: similarity of each tap, overthinking; white where undefined.

    Numbers are drawn in, ``-`` where undefined, up to :data:`LARGEST_WITH_DIGITS` rows and columns.
    """
    import numpy as np

    require_table(values_RC, columns, "values_RC")
    if len(rows) != len(values_RC):
        raise ClframeError(f"rows: {len(rows)} names for {len(values_RC)} rows; give one each")
    numbers_RC = np.asarray(values_RC, dtype=float)
    width, height = _heat_size(len(rows), len(columns))
    figure, axes = make_axes(width=width, height=height)
    axes.set(title=title, ylabel=row_label, xlabel=column_label)
    _heat(axes, numbers_RC, rows=rows, columns=columns, lowest=lowest, highest=highest)
    return render(figure)


def triangles_image(panels: Mapping[str, Sequence[Sequence[float]]]) -> PixelArray:
    """Heat maps of shares side by side: ``panels[title][i][j]`` of experience j after experience i, j up to i.

    Rows are the experiences, columns after which training experience, as in :func:`heat_image`.
    """
    import numpy as np
    from matplotlib.figure import Figure

    require_some(panels, "panels")
    count = max(len(rows) for rows in panels.values())
    names = [f"{n}" for n in range(count)]
    width, height = _heat_size(count, count)
    figure = Figure(figsize=(min(width, WIDEST / 2) * len(panels), max(height, 2.6)), dpi=100)
    for place, (title, rows) in enumerate(panels.items(), start=1):
        numbers_RC = np.full((count, count), np.nan)
        for i, row in enumerate(rows):
            numbers_RC[: len(row), i] = row
        axes: Any = figure.add_subplot(1, len(panels), place)
        axes.set(title=title, ylabel="experience", xlabel="after experience")
        _heat(axes, numbers_RC, rows=names, columns=names, undefined="")
    return render(figure)


def png(picture: PixelArray) -> bytes:
    """A picture as the bytes of a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="PNG")
    return file.getvalue()


def _heat_size(rows: int, columns: int) -> tuple[float, float]:
    """Inches that numbers need, or a tenth where there are too many to draw."""
    wide = 0.55 if _has_digits(rows, columns) else 0.1
    return min(WIDEST + 6, max(4.0, wide * columns + 2.4)), min(HIGHEST, max(2.2, 0.42 * rows + 1.3))


def _has_digits(rows: int, columns: int) -> bool:
    return max(rows, columns) <= LARGEST_WITH_DIGITS


def _heat(
    axes: Any, numbers_RC: NDArray[np.float64], *, rows: Sequence[str], columns: Sequence[str],
    lowest: float = 0.0, highest: float = 1.0, undefined: str = "-",
) -> None:  # fmt: skip
    """Colors, ticks and, unless there are too many, numbers."""
    import numpy as np

    axes.imshow(np.ma.masked_invalid(numbers_RC), vmin=lowest, vmax=highest, cmap="viridis", aspect="auto")
    axes.grid(False)
    at_R = spaced_indices(len(rows), most=LARGEST_WITH_DIGITS)
    at_C = spaced_indices(len(columns), most=LARGEST_WITH_DIGITS)
    axes.set_yticks(at_R, [rows[r] for r in at_R])
    axes.set_xticks(at_C, [columns[c] for c in at_C])
    if not _has_digits(len(rows), len(columns)):
        return
    for (r, c), value in np.ndenumerate(numbers_RC):
        dark = not math.isnan(value) and (value - lowest) < 0.6 * (highest - lowest)
        text = undefined if math.isnan(value) else f"{value:.2f}"
        if not text:
            continue
        number = axes.text(c, r, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
        number.set_in_layout(False)  # inside the axes: measuring each would take longer than drawing it


def make_axes(*, width: float, height: float) -> tuple[Figure, Any]:
    """Make a figure with one pair of axes in the common style."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100)
    axes = figure.add_subplot()
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def render(figure: Figure) -> PixelArray:
    """Render a figure as an array (height, width, 3)."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    figure.tight_layout()
    canvas.draw()
    return np.array(canvas.buffer_rgba(), dtype=np.uint8)[:, :, :3]


def series_colors(count: int) -> list[Any]:
    """Colors of ``count`` series: the palette, or viridis where it has too few."""
    from matplotlib import colormaps

    if count <= len(PALETTE):
        return list(PALETTE[:count])
    return [colormaps["viridis"](0.92 * n / (count - 1)) for n in range(count)]


def add_legend(axes: Any, entries: int, *, falling: bool = False) -> None:
    """Beside the axes, never over the lines; every so many entries where there are too many to read."""
    handles, names = axes.get_legend_handles_labels()
    chosen = spaced_indices(entries, most=LONGEST_LEGEND)
    if falling:
        chosen.reverse()
    axes.legend([handles[n] for n in chosen], [names[n] for n in chosen], fontsize=8, frameon=False,
                loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)  # fmt: skip


def percent_axis(axes: Any) -> None:
    """Label the y axis in percent."""
    axes.yaxis.set_major_formatter(lambda share, _position: f"{100 * share:g}")


def spaced_indices(count: int, *, most: int = 20) -> list[int]:
    """At most about ``most`` of 0 .. count - 1, evenly spaced from 0."""
    return list(range(0, count, max(1, math.ceil(count / most))))


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


def matrix_image(accuracy_TE: Matrix) -> NDArray[np.uint8]:
    """The accuracy matrix as a picture (height, width, 3): a heat map from 0 to 1 with percents drawn in."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # never pyplot, which keeps figures and picks a backend globally

    matrix_TE = np.asarray(accuracy_TE, dtype=float)
    rows, columns = matrix_TE.shape
    digits = columns <= LARGEST_WITH_DIGITS
    inch = 0.5 if digits else 15 / columns
    figure = Figure(figsize=(max(4.0, columns * inch + 2), max(2.5, rows * inch + 1.2)), dpi=100)
    canvas: Any = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(np.ma.masked_invalid(matrix_TE), vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set(xlabel="test experience", ylabel="after experience", title="accuracy in %")
    if digits:
        axes.set_xticks(range(columns))
        axes.set_yticks(range(rows))
        for (i, j), accuracy in np.ndenumerate(matrix_TE):
            text = "-" if np.isnan(accuracy) else f"{100 * accuracy:.0f}"
            dark = not np.isnan(accuracy) and accuracy < 0.6
            number = axes.text(j, i, text, ha="center", va="center", fontsize=11, color="white" if dark else "black")
            number.set_in_layout(False)  # inside the axes: measuring each would take longer than drawing it
    figure.tight_layout()
    canvas.draw()
    return np.array(canvas.buffer_rgba(), dtype=np.uint8)[:, :, :3]


def matrix_markdown(accuracy_TE: Matrix) -> str:
    """The accuracy matrix in percent as a Markdown table, numbers to copy; ``-`` where not evaluated.

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
