"""Figures of exits: accuracy against cost, accuracy by experience, and exit usage.

Shape suffixes: E experiences, K exits in order of depth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from clframe.exits.curves import AccuracyCostCurve, BudgetPoints
from clframe.exits.diagnostics import ExitRecord
from clframe.plotting.images import WIDEST, heat_image, make_axes, require_some, require_table
from clframe.plotting.style import (
    MUTED,
    PAPER,
    SERIES,
    annotate_apart,
    integer_ticks,
    legend,
    percent,
    render_pixels,
    series_style,
    shades,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from clframe.plotting.style import PixelArray


@styled()
def accuracy_cost_image(
    curves: Mapping[str, AccuracyCostCurve],
    *,
    points: Mapping[str, BudgetPoints] | None = None,
    title: str = "accuracy and cost",
) -> PixelArray:
    """Accuracy against cost, one line per experience or run.

    Small marks, omitted where there are more lines than colors, show each exit when it predicts every sample; large
    rings show the budget points on the test samples. A dotted line marks the cost of the bare backbone.
    """
    require_some(curves, "curves")
    figure, axes = make_axes(width=7.0, height=4.6)
    for n, (name, curve) in enumerate(curves.items()):
        style = series_style(n)
        axes.plot(curve.costs, curve.accuracies, label=name, zorder=2, **{**style, "marker": ""})
        if len(curves) <= len(SERIES):
            axes.plot(curve.exit_costs, curve.exit_accuracies, zorder=3, markeredgecolor=PAPER, markeredgewidth=0.6,
                      **{**style, "linestyle": ""})  # fmt: skip
    axes.axvline(1.0, color=MUTED, linestyle=":", linewidth=1)
    axes.set(xlabel="mean cost, % of the bare backbone", ylabel="accuracy, %", title=title, xlim=(0, None))
    axes.margins(y=0.12)
    percent(axes.xaxis)
    percent(axes.yaxis)
    legend(figure, axes)
    for n, name in enumerate(curves):
        if points and name in points:
            draw_budgets(figure, axes, points[name], color=series_style(n)["color"])
    return render_pixels(figure)


@styled()
def exit_accuracy_image(
    accuracy_EK: Sequence[Sequence[float]], *, names: Sequence[str], title: str = "accuracy of each exit"
) -> PixelArray:
    """One line per exit over experiences: ``accuracy_EK[e][k]`` after experience e; NaN leaves a gap."""
    require_table(accuracy_EK, names, "accuracy_EK")
    figure, axes = make_axes(width=7.0, height=4.2)
    for k, name in enumerate(names):
        axes.plot(range(len(accuracy_EK)), [row[k] for row in accuracy_EK], label=name, **series_style(k))
    axes.set(xlabel="after experience", ylabel="accuracy, %", title=title)
    integer_ticks(axes.xaxis, len(accuracy_EK))
    percent(axes.yaxis)
    legend(figure, axes)
    return render_pixels(figure)


@styled()
def exit_usage_image(
    share_EK: Sequence[Sequence[float]],
    *,
    names: Sequence[str],
    labels: Sequence[str] | None = None,
    title: str = "exit usage",
) -> PixelArray:
    """One stacked bar per experience, or per budget (``labels``): the share of samples that each exit predicts.

    Exits are colored from pale to dark with depth; a row of NaN leaves its bar empty.
    """
    require_table(share_EK, names, "share_EK")
    figure, axes = make_axes(width=min(WIDEST, max(4.5, 0.45 * len(share_EK) + 3.0)), height=4.2)
    bottom_E = [0.0] * len(share_EK)
    for k, name in enumerate(names):
        share_E = [0.0 if math.isnan(row[k]) else row[k] for row in share_EK]
        color = shades()((k + 1) / len(names))
        axes.bar(range(len(share_EK)), share_E, bottom=bottom_E, color=color, width=0.8,
                 edgecolor=PAPER, linewidth=0.6, label=name)  # fmt: skip
        bottom_E = [low + share for low, share in zip(bottom_E, share_E, strict=True)]
    axes.set(ylabel="exit usage, % of samples", title=title, ylim=(0, 1))
    axes.grid(axis="x", visible=False)
    integer_ticks(axes.xaxis, len(share_EK), most=20)
    if labels is None:
        axes.set_xlabel("after experience")
    else:
        axes.set_xticks(range(len(share_EK)), labels)
    percent(axes.yaxis)
    legend(figure, axes)
    return render_pixels(figure)


def draw_budgets(figure: Figure, axes: Any, points: BudgetPoints, *, color: str) -> None:
    """Draw budget points as rings with their names; points with the same coordinates share a ring."""
    names_at: dict[tuple[float, float], list[str]] = {}
    for point in points.points or ():
        if not math.isnan(point.accuracy):
            names_at.setdefault((point.cost, point.accuracy), []).append(point.name)
    for position in names_at:
        axes.plot(*position, "o", markersize=10, markerfacecolor="none", markeredgecolor=color, markeredgewidth=1.5,
                  zorder=4)  # fmt: skip
    texts = {position: ", ".join(names).replace("%", " %") for position, names in names_at.items()}
    annotate_apart(figure, axes, texts, color=color)


MOST_CURVES = 5
"""Largest number of curves in one figure."""


def exit_images(records: Sequence[ExitRecord], *, names: Sequence[str]) -> dict[str, PixelArray]:
    """Images (height, width, 3) by name, from the records after every training experience so far.

    ``curve``: accuracy against cost after the newest experience and some earlier ones; ``accuracy``: each exit over
    experiences; ``exit_usage``: the share of each exit at each budget, after the newest; ``similarity``: each exit's
    tap compared with itself after the first experience.
    """
    experiences = [f"{i}" for i in range(len(records))]
    step = -(-len(records) // MOST_CURVES)
    drawn = [i for i in range(len(records)) if (len(records) - 1 - i) % step == 0]
    curves = {f"after experience {i}": records[i].curve for i in drawn}
    newest = f"after experience {len(records) - 1}"
    images = {
        "curve": accuracy_cost_image(curves, points={newest: records[-1].points}),
        "accuracy": exit_accuracy_image([record.accuracy_K for record in records], names=names),
        "similarity": heat_image(
            [[r.similarity_K[k] if r.similarity_K else math.nan for r in records] for k in range(len(names))],
            rows=names, columns=experiences, title="similarity of each exit's tap (CKA)",
        ),
    }  # fmt: skip
    if records[-1].share_PK:
        labels = [point.name for point in records[-1].points.points or ()]
        images["exit_usage"] = exit_usage_image(records[-1].share_PK, names=names, labels=labels)
    return images
