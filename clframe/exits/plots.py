"""Figures of exits: accuracy against cost, accuracy by experience, and exit usage.

Shape suffixes: E experiences, K exits in order of depth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clframe.exits.curves import BudgetPoints, Curve
from clframe.exits.diagnostics import ExitRecord
from clframe.plotting.images import (
    MARKERS,
    PALETTE,
    WIDEST,
    add_legend,
    heat_image,
    make_axes,
    percent_axis,
    render,
    require_some,
    require_table,
    series_colors,
    spaced_indices,
)

if TYPE_CHECKING:
    from clframe.plotting.images import PixelArray


def curve_image(
    curves: Mapping[str, Curve], *, points: Mapping[str, BudgetPoints] | None = None, title: str = "accuracy and cost"
) -> PixelArray:
    """Accuracy against cost, one line per experience or run.

    Small marks, left out where there are more lines than colors, are the exits when they answer everything; large
    rings are the budget points, where the test samples put them. A dotted line marks the cost of the bare backbone.
    """
    require_some(curves, "curves")
    figure, axes = make_axes(width=7.0, height=4.6)
    colors = series_colors(len(curves))
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
    percent_axis(axes)
    add_legend(axes, len(curves))
    return render(figure)


def exit_accuracy_image(
    accuracy_EK: Sequence[Sequence[float]], *, names: Sequence[str], title: str = "accuracy of each exit"
) -> PixelArray:
    """One line per exit over the experiences trained on: ``accuracy_EK[e][k]`` after experience e; NaN is a gap."""
    require_table(accuracy_EK, names, "accuracy_EK")
    figure, axes = make_axes(width=7.0, height=4.2)
    for k, color in enumerate(series_colors(len(names))):
        axes.plot(range(len(accuracy_EK)), [row[k] for row in accuracy_EK], color=color,
                  marker=MARKERS[k % len(MARKERS)], markersize=5, linewidth=1.6, label=names[k])  # fmt: skip
    axes.set(xlabel="after experience", ylabel="accuracy in %", title=title)
    axes.set_xticks(spaced_indices(len(accuracy_EK)))
    percent_axis(axes)
    add_legend(axes, len(names))
    return render(figure)


def who_answers_image(
    share_EK: Sequence[Sequence[float]],
    *,
    names: Sequence[str],
    labels: Sequence[str] | None = None,
    title: str = "who answers",
) -> PixelArray:
    """One stacked bar per experience (or per budget, see ``labels``): the share that each exit answers.

    Exits run from dark to light with depth, so that deeper answers stand higher and lighter; a row of NaN leaves its
    place empty.
    """
    require_table(share_EK, names, "share_EK")
    from matplotlib import colormaps

    figure, axes = make_axes(width=min(WIDEST, max(4.5, 0.45 * len(share_EK) + 3.0)), height=4.2)
    bottom_E = [0.0] * len(share_EK)
    for k, name in enumerate(names):
        share_E = [0.0 if math.isnan(row[k]) else row[k] for row in share_EK]
        color = colormaps["cividis"](k / max(1, len(names) - 1))
        axes.bar(range(len(share_EK)), share_E, bottom=bottom_E, color=color, width=0.8,
                 edgecolor="white", linewidth=0.6, label=name)  # fmt: skip
        bottom_E = [low + share for low, share in zip(bottom_E, share_E, strict=True)]
    axes.set(ylabel="samples answered in %", title=title, ylim=(0, 1))
    axes.set_xticks(spaced_indices(len(share_EK)))
    if labels is None:
        axes.set_xlabel("after experience")
    else:
        axes.set_xticks(range(len(share_EK)), labels)
    percent_axis(axes)
    add_legend(axes, len(names), falling=True)
    return render(figure)


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


MOST_CURVES = 5
"""Curves of earlier experiences drawn beside the newest one's."""


def exit_images(records: Sequence[ExitRecord], *, names: Sequence[str]) -> dict[str, PixelArray]:
    """Pictures (height, width, 3) by name, given the records after every training experience so far.

    ``curve``: accuracy against cost after the newest experience and some before it; ``accuracy``: each exit alone,
    over experiences; ``who_answers``: the share of each exit at each budget, after the newest; ``similarity``:
    each exit's tap compared with itself after the first experience.
    """
    experiences = [f"{i}" for i in range(len(records))]
    step = -(-len(records) // MOST_CURVES)
    drawn = [i for i in range(len(records)) if (len(records) - 1 - i) % step == 0]
    curves = {f"after experience {i}": records[i].curve for i in drawn}
    newest = f"after experience {len(records) - 1}"
    images = {
        "curve": curve_image(curves, points={newest: records[-1].points}),
        "accuracy": exit_accuracy_image([record.diagnostics.accuracy_K for record in records], names=names),
        "similarity": heat_image(
            [[record.similarity_K[k] for record in records] for k in range(len(names))],
            rows=names, columns=experiences, title="similarity of each exit's tap (CKA)",
        ),
    }  # fmt: skip
    if records[-1].share_PK:
        labels = [point.name for point in records[-1].points.points or ()]
        images["who_answers"] = who_answers_image(records[-1].share_PK, names=names, labels=labels)
    return images
