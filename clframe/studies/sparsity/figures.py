"""What the figures of a study of sparsity show."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from clframe.analysis import Curve
from clframe.reporting.report.drawing import (
    GRID,
    HEIGHT,
    INK,
    MUTED,
    PAPER,
    SERIES,
    Picture,
    label,
    legend,
    look,
    percent,
    whole_ticks,
)
from clframe.studies.sparsity.study import Experiences, SparsityStudy
from clframe.studies.sparsity.tables import role_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST_WITH_DIGITS = 10
MOST_LAYERS = 8
"""Layers that get a line each in the figure of experiences."""


def pictures(study: SparsityStudy) -> list[Picture]:
    """Curves and layers of each rule; overlap and sparsity of experiences of a run."""
    found = []
    for rule in dict.fromkeys(curve.kind for curve in study.report.curves):
        curves = [curve for curve in study.report.curves if curve.kind == rule]
        found += [
            Picture(f"curves_{rule}", f"{study.score} against achieved sparsity, {rule}",
                    partial(draw_curves, study, curves), HEIGHT + 0.4),
            Picture(f"layers_{rule}", f"sparsity by layer at the critical point, {rule}",
                    partial(draw_layers, curves), HEIGHT + 0.3),
        ]  # fmt: skip
    if study.experiences is not None:
        height = max(HEIGHT, 1.2 + 0.3 * min(len(study.experiences), 14))
        found += [
            Picture("overlap", "Jaccard overlap of active neurons, and forgetting",
                    partial(draw_overlap, study.experiences), height),
            Picture("experiences", "sparsity by experience", partial(draw_experiences, study.experiences)),
        ]  # fmt: skip
    return found


def draw_curves(study: SparsityStudy, curves: Sequence[Curve], figure: Figure) -> None:
    """The score against achieved sparsity, and against a Gaussian vector's, dashed; rings are critical points."""
    axes: Any = figure.add_subplot()
    least = study.share * study.report.dense
    for n, curve in enumerate(curves):
        color = look(n)["color"]
        points = sorted(zip(curve.achieved, curve.scores, strict=True))
        axes.plot(*zip(*points, strict=True), label=role_name(curve), **{**look(n), "markersize": 3})
        dashed = sorted(zip(curve.gaussian, curve.scores, strict=True))
        axes.plot(*zip(*dashed, strict=True), color=color, linestyle=(0, (2, 2)), linewidth=1.0, alpha=0.7)
        axes.plot([curve.critical], [least], "o", markersize=9, markerfacecolor="none", markeredgecolor=color)
    axes.axhline(least, color=MUTED, linewidth=0.9)
    axes.plot([], [], color=MUTED, linestyle=(0, (2, 2)), linewidth=1.0, label="Gaussian vector")
    axes.set(xlabel="achieved sparsity, %", ylabel=f"{study.score}, %", xlim=(-0.02, 1.02))
    axes.set_ylim(bottom=0)
    percent(axes.xaxis)
    percent(axes.yaxis)
    legend(figure, axes)


def draw_layers(curves: Sequence[Curve], figure: Figure) -> None:
    """Sparsity of each layer at the critical point; the Gaussian's dashed."""
    axes: Any = figure.add_subplot()
    alone = [curve for curve in curves if not any("/" in name for name in curve.layers)] or curves
    for n, curve in enumerate(alone):
        places = range(len(curve.critical_layers))
        axes.plot(places, list(curve.critical_layers.values()), label=role_name(curve), **look(n))
        axes.plot(places, list(curve.critical_gaussian_layers.values()), color=look(n)["color"],
                  linestyle=(0, (2, 2)), linewidth=1.0, alpha=0.7)  # fmt: skip
    axes.plot([], [], color=MUTED, linestyle=(0, (2, 2)), linewidth=1.0, label="Gaussian vector")
    axes.set(xlabel="layer", ylabel="sparsity, %", ylim=(0, 1.02))
    whole_ticks(axes.xaxis, max(len(curve.layers) for curve in alone))
    percent(axes.yaxis)
    legend(figure, axes)


def draw_overlap(found: Experiences, figure: Figure) -> None:
    """The mean overlap over layers between experiences, and beside it what each of them has lost."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    count, values = len(found), found.mean_overlap
    axes, bars = figure.subplots(1, 2, width_ratios=(3, 1), sharey=True)
    color = to_rgb(SERIES[0])
    shades = LinearSegmentedColormap.from_list("shades", [(*color, 0.05), (*color, 1.0)])
    low = min(min(row) for row in values)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.pcolormesh(values, vmin=min(low, 0.99), vmax=1, cmap=shades, edgecolors=PAPER, linewidth=1.2)
    axes.set_xticks([place + 0.5 for place in range(count)], [str(place) for place in range(count)])
    axes.set_yticks([place + 0.5 for place in range(count)], [str(place) for place in range(count)])
    axes.tick_params(length=0)
    axes.set(xlabel="experience", ylabel="experience", title="overlap, %")
    if count <= LARGEST_WITH_DIGITS:
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                dark = (value - low) / max(1 - low, 1e-9) > 0.55
                axes.text(j + 0.5, i + 0.5, f"{100 * value:.0f}", ha="center", va="center", fontsize=8,
                          color=PAPER if dark else INK)  # fmt: skip
    bars.barh([place + 0.5 for place in range(count)], [lost or 0.0 for lost in found.forgetting], height=0.6,
              color=SERIES[1])  # fmt: skip
    bars.axvline(0, color=MUTED, linewidth=0.8)
    bars.set(title="forgetting, %" if any(v is not None for v in found.forgetting) else "not finished")
    percent(bars.xaxis)
    bars.tick_params(axis="y", length=0)
    axes.invert_yaxis()


def draw_experiences(found: Experiences, figure: Figure) -> None:
    """The share of inactive neurons on each experience: the mean over layers, and layers in gray."""
    axes: Any = figure.add_subplot()
    places = range(len(found))
    for name, values in list(found.sparsity.items())[:MOST_LAYERS]:
        axes.plot(places, values, color=GRID, linewidth=1.2)
        axes.annotate(label(name, most=18), (places[-1], values[-1]), fontsize=7, color=MUTED, xytext=(4, 0),
                      textcoords="offset points", va="center")  # fmt: skip
    axes.plot(places, found.mean_sparsity, label="mean over layers", **look(0))
    axes.axhline(found.gaussian, color=MUTED, linestyle=(0, (2, 2)), linewidth=1.0, label="Gaussian vector")
    axes.set(xlabel="experience", ylabel="inactive neurons, %")
    whole_ticks(axes.xaxis, len(found))
    percent(axes.yaxis)
    legend(figure, axes)
