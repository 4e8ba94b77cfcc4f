"""Figures of a sparsity study, and the image of neuron activity for TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from clframe.plotting.images import draw_heat_map, triangles_image
from clframe.plotting.style import (
    GRID,
    HEIGHT,
    MUTED,
    SERIES,
    Picture,
    integer_ticks,
    label,
    legend,
    percent,
    series_style,
)
from clframe.sparsity.activity import ActivityRecord
from clframe.sparsity.analysis import SparsityCurve
from clframe.sparsity.output import role_name
from clframe.sparsity.part_activity import Domains, Experiences
from clframe.sparsity.study import SparsityStudy
from clframe.sparsity.union import PAYS, ActiveUnion

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from clframe.plotting.style import PixelArray

LARGEST_WITH_DIGITS = 10
"""Rows up to which the cells of a heat map have numbers."""
MOST_LAYERS = 8
"""Layers with a line in the figure of experiences."""


def activity_image(records: Sequence[ActivityRecord]) -> PixelArray | None:
    """Draw the overlaps of active neurons, means over layers, from the records so far.

    Left, each experience's active neurons compared with those when it was learned; right, those of each experience,
    when it was learned, with those of earlier ones at that time. None before the second experience and for a network
    without hidden neurons.
    """
    if len(records) < 2 or not records[-1].layers:
        return None
    return triangles_image(
        {
            "active neurons kept since learned": [record.kept_E for record in records],
            "active neurons shared with the newest": [record.overlap_E for record in records],
        }
    )


def short_layer_name(layer: str, *, most: int = 28) -> str:
    """Shorten a layer's name to its end; the whole model has an empty name.

    >>> short_layer_name("backbone.stages.3.mlp", most=12), short_layer_name("")
    ('..ages.3.mlp', 'model')
    """
    if not layer:
        return "model"
    return layer if len(layer) <= most else f"..{layer[2 - most:]}"


def pictures(study: SparsityStudy) -> list[Picture]:
    """List the figures: curves and layers of each rule; overlap and sparsity of experiences of a run."""
    found = []
    for rule in dict.fromkeys(curve.kind for curve in study.report.curves):
        curves = [curve for curve in study.report.curves if curve.kind == rule]
        found += [
            Picture(f"curves_{rule}", f"{study.score} against achieved sparsity, {rule}",
                    partial(draw_curves, study, curves), HEIGHT + 0.4),
            Picture(f"layers_{rule}", f"sparsity by layer at the critical point, {rule}",
                    partial(draw_layers, curves), HEIGHT + 0.3),
        ]  # fmt: skip
    found.append(Picture("union", "active neurons by batch size", partial(draw_union, study.union)))
    if study.experiences is not None:
        height = max(HEIGHT, 1.2 + 0.3 * min(len(study.experiences), 14))
        found += [
            Picture("overlap", "Jaccard overlap of active neurons, and forgetting",
                    partial(draw_overlap, study.experiences), height),
            Picture("experiences", "sparsity by experience", partial(draw_experiences, study.experiences)),
        ]  # fmt: skip
    if study.domains is not None:
        height = max(HEIGHT, 1.2 + 0.3 * len(study.domains.names))
        text = "Jaccard overlap of active neurons between domains"
        found.append(Picture("domains", text, partial(draw_domains, study.domains), height))
    return found


def draw_curves(study: SparsityStudy, curves: Sequence[SparsityCurve], figure: Figure) -> None:
    """Draw the score against sparsity, and against a Gaussian vector's (dashed); rings are critical points."""
    axes: Any = figure.add_subplot()
    least, lower = study.limit_score, study.score == "perplexity"
    for n, curve in enumerate(curves):
        color = series_style(n)["color"]
        points = sorted(zip(curve.achieved, curve.scores, strict=True))
        axes.plot(*zip(*points, strict=True), label=role_name(curve), **{**series_style(n), "markersize": 3})
        dashed = sorted(zip(curve.gaussian, curve.scores, strict=True))
        axes.plot(*zip(*dashed, strict=True), color=color, linestyle=(0, (2, 2)), linewidth=1.0, alpha=0.7)
        axes.plot([curve.critical], [least], "o", markersize=9, markerfacecolor="none", markeredgecolor=color)
    axes.axhline(least, color=MUTED, linewidth=0.9)
    axes.plot([], [], color=MUTED, linestyle=(0, (2, 2)), linewidth=1.0, label="Gaussian vector")
    axes.set(xlabel="achieved sparsity, %", ylabel=study.score if lower else f"{study.score}, %", xlim=(-0.02, 1.02))
    percent(axes.xaxis)
    if lower:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
        percent(axes.yaxis)
    legend(figure, axes)


def draw_layers(curves: Sequence[SparsityCurve], figure: Figure) -> None:
    """Draw the sparsity of each layer at the critical point; a Gaussian vector's dashed."""
    axes: Any = figure.add_subplot()
    alone = [curve for curve in curves if not any("/" in name for name in curve.layers)] or curves
    for n, curve in enumerate(alone):
        indices = range(len(curve.critical_layers))
        axes.plot(indices, list(curve.critical_layers.values()), label=role_name(curve), **series_style(n))
        axes.plot(indices, list(curve.critical_gaussian_layers.values()), color=series_style(n)["color"],
                  linestyle=(0, (2, 2)), linewidth=1.0, alpha=0.7)  # fmt: skip
    axes.plot([], [], color=MUTED, linestyle=(0, (2, 2)), linewidth=1.0, label="Gaussian vector")
    axes.set(xlabel="layer", ylabel="sparsity, %", ylim=(0, 1.02))
    integer_ticks(axes.xaxis, max(len(curve.layers) for curve in alone))
    percent(axes.yaxis)
    legend(figure, axes)


def draw_union(union: ActiveUnion, figure: Figure) -> None:
    """Draw the share of neurons that a batch activates: means over layers of tokens and samples, and layers in gray."""
    axes: Any = figure.add_subplot()
    for shares in list(union.tokens.values())[:MOST_LAYERS]:
        axes.plot(union.sizes[: len(shares)], shares, color=GRID, linewidth=1.2)
    for n, (name, shares) in enumerate({"tokens": union.mean_tokens, "samples": union.mean_samples}.items()):
        if shares:
            axes.plot(union.sizes[: len(shares)], shares, label=f"batch of {name}", **series_style(n))
    axes.axhline(1 - PAYS, color=MUTED, linestyle=(0, (2, 2)), linewidth=1.0, label=f"{100 * PAYS:g} % saved")
    axes.set(xlabel="batch size", ylabel="active neurons, %", ylim=(0, 1.02))
    axes.set_xscale("log", base=2)
    percent(axes.yaxis)
    legend(figure, axes)


def draw_overlap(found: Experiences, figure: Figure) -> None:
    """Draw the mean overlap over layers between experiences, and the forgetting of each."""
    count, values = len(found), found.mean_overlap
    axes, bars = figure.subplots(1, 2, width_ratios=(3, 1), sharey=True)
    names = [str(n) for n in range(count)]
    draw_heat_map(
        axes, values, rows=names, columns=names, lowest=min(0.99, *map(min, values)), percent=True,
        most=LARGEST_WITH_DIGITS,
    )  # fmt: skip
    axes.set(xlabel="experience", ylabel="experience", title="overlap, %")
    bars.barh([n + 0.5 for n in range(count)], [lost or 0.0 for lost in found.forgetting], height=0.6,
              color=SERIES[1])  # fmt: skip
    bars.axvline(0, color=MUTED, linewidth=0.8)
    bars.set(title="forgetting, %" if any(v is not None for v in found.forgetting) else "not finished")
    percent(bars.xaxis)
    bars.tick_params(axis="y", length=0)


def draw_experiences(found: Experiences, figure: Figure) -> None:
    """Draw the share of inactive neurons on each experience: the mean over layers, and layers in gray."""
    axes: Any = figure.add_subplot()
    indices = range(len(found))
    for name, values in list(found.sparsity.items())[:MOST_LAYERS]:
        axes.plot(indices, values, color=GRID, linewidth=1.2)
        axes.annotate(label(name, most=18), (indices[-1], values[-1]), fontsize=7, color=MUTED, xytext=(4, 0),
                      textcoords="offset points", va="center")  # fmt: skip
    axes.plot(indices, found.mean_sparsity, label="mean over layers", **series_style(0))
    axes.axhline(found.gaussian, color=MUTED, linestyle=(0, (2, 2)), linewidth=1.0, label="Gaussian vector")
    axes.set(xlabel="experience", ylabel="inactive neurons, %")
    integer_ticks(axes.xaxis, len(found))
    percent(axes.yaxis)
    legend(figure, axes)


def draw_domains(found: Domains, figure: Figure) -> None:
    """Draw the mean overlap over layers between domains."""
    values = found.mean_overlap
    axes = figure.subplots()
    names = [label(name, most=18) for name in found.names]
    draw_heat_map(
        axes, values, rows=names, columns=names, lowest=min(0.99, *map(min, values)), percent=True,
        most=LARGEST_WITH_DIGITS,
    )  # fmt: skip
    axes.set(title="overlap, %")
