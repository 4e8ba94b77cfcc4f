"""Figures of exits: accuracy against cost, accuracy over experiences, who answers, and small heat maps.

Every function returns a picture (height, width, 3) for TensorBoard or :func:`png`. Lines are told apart by the
Okabe-Ito palette, which color-blind readers can tell apart, and by their markers; more than it holds run along
viridis, in their order. Matplotlib's pyplot is never imported: it keeps figures and picks a backend globally.

Shape suffixes: C columns, E experiences, K exits in order of depth, R rows.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clframe.errors import ClframeError
from clframe.functional.early_exit.curves import BudgetPoints, Curve

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Picture = NDArray[np.uint8]

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000", "#F0E442")
"""Okabe and Ito, "Color Universal Design" (2008), the palest last."""

MARKERS = "osD^vP*X"
LONGEST_LEGEND = 16
WIDEST, HIGHEST = 14.0, 12.0
"""Inches beyond which a figure does not grow with its numbers."""
LARGEST_WITH_DIGITS = 30
"""Rows and columns up to which a heat map has its numbers drawn in."""


def curve_image(
    curves: Mapping[str, Curve], *, points: Mapping[str, BudgetPoints] | None = None, title: str = "accuracy and cost"
) -> Picture:
    """Accuracy against cost, one line per experience or run.

    Small marks, left out where there are more lines than colors, are the exits when they answer everything; large
    rings are the budget points, where the test samples put them. A dotted line marks the cost of the bare backbone.
    """
    _some(curves, "curves")
    figure, axes = _axes(width=7.0, height=4.6)
    colors = _colors(len(curves))
    for n, (name, curve) in enumerate(curves.items()):
        color, marker = colors[n], MARKERS[n % len(MARKERS)]
        axes.plot(curve.costs, curve.accuracies, color=color, linewidth=1.8, label=name, zorder=2)
        if len(curves) <= len(PALETTE):
            axes.plot(curve.exit_costs, curve.exit_accuracies, marker, color=color, markersize=5,
                      markeredgecolor="white", markeredgewidth=0.6, zorder=3)  # fmt: skip
        if points and name in points:
            _rings(axes, points[name], color)
    axes.axvline(1.0, color="#888888", linestyle=":", linewidth=1)
    axes.set(xlabel="mean cost / cost of the bare backbone", ylabel="accuracy in %", title=title, xlim=(0, None))
    axes.margins(y=0.12)
    _percent(axes)
    _legend(axes, len(curves))
    return _drawn(figure)


def exit_accuracy_image(
    accuracy_EK: Sequence[Sequence[float]], *, names: Sequence[str], title: str = "accuracy of each exit"
) -> Picture:
    """One line per exit over the experiences trained on: ``accuracy_EK[e][k]`` after experience e; NaN is a gap."""
    _table(accuracy_EK, names, "accuracy_EK")
    figure, axes = _axes(width=7.0, height=4.2)
    for k, color in enumerate(_colors(len(names))):
        axes.plot(range(len(accuracy_EK)), [row[k] for row in accuracy_EK], color=color,
                  marker=MARKERS[k % len(MARKERS)], markersize=5, linewidth=1.6, label=names[k])  # fmt: skip
    axes.set(xlabel="after experience", ylabel="accuracy in %", title=title)
    axes.set_xticks(_spaced(len(accuracy_EK)))
    _percent(axes)
    _legend(axes, len(names))
    return _drawn(figure)


def who_answers_image(
    share_EK: Sequence[Sequence[float]],
    *,
    names: Sequence[str],
    labels: Sequence[str] | None = None,
    title: str = "who answers",
) -> Picture:
    """One stacked bar per experience (or per budget, see ``labels``): the share that each exit answers.

    Exits run from dark to light with depth, so that deeper answers stand higher and lighter; a row of NaN leaves its
    place empty.
    """
    _table(share_EK, names, "share_EK")
    from matplotlib import colormaps

    figure, axes = _axes(width=min(WIDEST, max(4.5, 0.45 * len(share_EK) + 3.0)), height=4.2)
    bottom_E = [0.0] * len(share_EK)
    for k, name in enumerate(names):
        share_E = [0.0 if math.isnan(row[k]) else row[k] for row in share_EK]
        color = colormaps["cividis"](k / max(1, len(names) - 1))
        axes.bar(range(len(share_EK)), share_E, bottom=bottom_E, color=color, width=0.8,
                 edgecolor="white", linewidth=0.6, label=name)  # fmt: skip
        bottom_E = [low + share for low, share in zip(bottom_E, share_E, strict=True)]
    axes.set(ylabel="samples answered in %", title=title, ylim=(0, 1))
    axes.set_xticks(_spaced(len(share_EK)))
    if labels is None:
        axes.set_xlabel("after experience")
    else:
        axes.set_xticks(range(len(share_EK)), labels)
    _percent(axes)
    _legend(axes, len(names), falling=True)
    return _drawn(figure)


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
) -> Picture:
    """A small heat map: similarity of each tap, overthinking; white where undefined.

    Numbers are drawn in, ``-`` where undefined, up to :data:`LARGEST_WITH_DIGITS` rows and columns.
    """
    import numpy as np

    _table(values_RC, columns, "values_RC")
    if len(rows) != len(values_RC):
        raise ClframeError(f"rows: {len(rows)} names for {len(values_RC)} rows; give one each")
    numbers_RC = np.asarray(values_RC, dtype=float)
    width, height = _heat_size(len(rows), len(columns))
    figure, axes = _axes(width=width, height=height)
    axes.set(title=title, ylabel=row_label, xlabel=column_label)
    _heat(axes, numbers_RC, rows=rows, columns=columns, lowest=lowest, highest=highest)
    return _drawn(figure)


def triangles_image(panels: Mapping[str, Sequence[Sequence[float]]]) -> Picture:
    """Heat maps of shares side by side: ``panels[title][i][j]`` of experience j after experience i, j up to i.

    Rows are the experiences, columns after which training experience, as in :func:`heat_image`.
    """
    import numpy as np
    from matplotlib.figure import Figure

    _some(panels, "panels")
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
    return _drawn(figure)


def png(picture: Picture) -> bytes:
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
    at_R, at_C = _spaced(len(rows), most=LARGEST_WITH_DIGITS), _spaced(len(columns), most=LARGEST_WITH_DIGITS)
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


def _rings(axes: Any, points: BudgetPoints, color: Any) -> None:
    """Budget points with their names; those that fall on one place share a ring."""
    from matplotlib.patheffects import withStroke

    halo = [withStroke(linewidth=2.5, foreground="white")]  # the names may stand on other lines
    names_at: dict[tuple[float, float], list[str]] = {}
    for point in points.points or ():
        if not math.isnan(point.accuracy):
            names_at.setdefault((point.cost, point.accuracy), []).append(point.name)
    for place, names in names_at.items():
        axes.plot(*place, "o", markersize=11, markerfacecolor="none", markeredgecolor=color,
                  markeredgewidth=1.4, zorder=4)  # fmt: skip
        axes.annotate(", ".join(names), place, xytext=(0, 9), textcoords="offset points", ha="center",
                      fontsize=8, color=color, path_effects=halo, zorder=5)  # fmt: skip


def _axes(*, width: float, height: float) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100)
    axes = figure.add_subplot()
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _drawn(figure: Figure) -> Picture:
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas: Any = FigureCanvasAgg(figure)
    figure.tight_layout()
    canvas.draw()
    return np.array(canvas.buffer_rgba(), dtype=np.uint8)[:, :, :3]


def _colors(count: int) -> list[Any]:
    from matplotlib import colormaps

    if count <= len(PALETTE):
        return list(PALETTE[:count])
    return [colormaps["viridis"](0.92 * n / (count - 1)) for n in range(count)]


def _legend(axes: Any, entries: int, *, falling: bool = False) -> None:
    """Beside the axes, never over the lines; every so many entries where there are too many to read."""
    handles, names = axes.get_legend_handles_labels()
    chosen = _spaced(entries, most=LONGEST_LEGEND)
    if falling:
        chosen.reverse()
    axes.legend([handles[n] for n in chosen], [names[n] for n in chosen], fontsize=8, frameon=False,
                loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)  # fmt: skip


def _percent(axes: Any) -> None:
    axes.yaxis.set_major_formatter(lambda share, _position: f"{100 * share:g}")


def _spaced(count: int, *, most: int = 20) -> list[int]:
    """At most about ``most`` of 0 .. count - 1, evenly spaced from 0."""
    return list(range(0, count, max(1, math.ceil(count / most))))


def _some(given: Mapping[str, object], where: str) -> None:
    if not given:
        raise ClframeError(f"{where}: none; give at least one")


def _table(rows: Sequence[Sequence[float]], names: Sequence[str], where: str) -> None:
    if not rows or any(len(row) != len(names) for row in rows) or not names:
        raise ClframeError(
            f"{where}: rows of {sorted({len(row) for row in rows})} numbers for {len(names)} names; give one for each"
        )
