"""Tables and figures of activation sparsity."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from clframe.metrics.statistics import NAN
from clframe.plotting.images import triangles_image
from clframe.plotting.style import (
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
from clframe.sparsity.activity import ActivityRecord
from clframe.sparsity.analysis import ALL, Curve
from clframe.sparsity.study import ACTIVE, Experiences, SparsityStudy
from clframe.tables import Cell, Quantity, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from clframe.plotting.images import PixelArray


SCHEMA_VERSION = 1
"""Of ``sparsity.json``; raised when a field is removed or changes its meaning."""


def to_json(study: SparsityStudy, *, command: Sequence[str], versions: Mapping[str, str]) -> str:
    """``sparsity.json``, which ``docs/analysis.md`` describes."""
    report, found = study.report, study.experiences
    content: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "command": list(command),
        "versions": dict(versions),
        **{name: getattr(study, name) for name in ("target", "kind", "part", "samples", "tokens", "score", "share")},
        "dense": report.dense,
        "curves": [{**asdict(curve), "excess": curve.excess} for curve in report.curves],
        "effective_rank": report.ranks,
        "experiences": None,
    }
    if found is not None:
        content["experiences"] = {
            "rule": "top_p", "value": ACTIVE, **asdict(found), "mean_sparsity": found.mean_sparsity,
            "mean_overlap": found.mean_overlap,
        }  # fmt: skip
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def tables(study: SparsityStudy) -> tuple[Table, ...]:
    """The critical sparsity by role, then by layer; by part and by experience where there are any; and all points."""
    found = [critical_table(study), layers_table(study)]
    if any(len(curve.parts) > 1 for curve in study.report.curves):
        found.append(parts_table(study))
    if study.experiences is not None:
        found.append(experiences_table(study))
    return (*found, points_table(study))


def said(study: SparsityStudy) -> str:
    """What was measured on what, in a sentence."""
    tokens = "" if study.tokens is None else f", {study.tokens:,} tokens"
    of = "agreement with the dense model" if study.score == "agreement" else "accuracy"
    if study.kind == "causal" and study.score == "accuracy":
        of = "accuracy of the next token"
    return (
        f"{study.target}: {of} of the dense model {100 * study.report.dense:.2f} % on {study.samples:,} {study.part} "
        f"samples{tokens}"
    )


def critical_table(study: SparsityStudy) -> Table:
    """By rule and role: the highest sparsity that keeps the score, beside a Gaussian vector's."""
    rows = [
        (curve.kind, role_name(curve), f"{curve.critical_value:.4g}", *_beside(curve.critical, curve.critical_gaussian))
        for curve in study.report.curves
    ]
    note = (
        f"The highest achieved mean sparsity that keeps {100 * study.share:g} % of the dense score, what a dense "
        f"Gaussian vector gives by the same rule, and the excess over it. {said(study)}."
    )
    columns = ("rule", "role", "at", "critical, %", "Gaussian, %", "excess, points")
    return Table(name="critical", title="Critical sparsity by role", note=note, columns=columns, rows=tuple(rows))


def layers_table(study: SparsityStudy) -> Table:
    """The same by layer, with its effective rank."""
    rows: list[tuple[Cell, ...]] = []
    for curve in study.report.curves:
        for site, share in curve.critical_layers.items():
            layer, role = site.rsplit("/", 1) if curve.role == ALL else (site, curve.role)
            rank = study.report.ranks.get(role, {}).get(layer, NAN)
            rows.append((
                curve.kind, role_name(curve), site or "(model)",
                *_beside(share, curve.critical_gaussian_layers[site]),
                Quantity(rank, kind="decimal", undefined="of each role alone"),
            ))  # fmt: skip
    note = "Where all layers together reach the critical sparsity; the effective rank is of the dense activations."
    columns = ("rule", "role", "layer", "sparsity, %", "Gaussian, %", "excess, points", "effective rank")
    return Table(name="layers", title="Sparsity by layer at the critical point", note=note, columns=columns,
                 rows=tuple(rows))  # fmt: skip


def parts_table(study: SparsityStudy) -> Table:
    """Prompt and generated tokens apart."""
    rows = [
        (curve.kind, role_name(curve), part, *_beside(share, curve.critical_gaussian))
        for curve in study.report.curves
        for part, share in curve.critical_parts.items()
    ]
    columns = ("rule", "role", "tokens", "sparsity, %", "Gaussian, %", "excess, points")
    return Table(name="parts", title="Sparsity by kind of tokens at the critical point", columns=columns,
                 rows=tuple(rows))  # fmt: skip


def experiences_table(study: SparsityStudy) -> Table:
    """Sparsity, overlap and forgetting of each experience, means over layers."""
    found = study.experiences
    assert found is not None
    rows = []
    for e, (sparse, overlaps, lost) in enumerate(
        zip(found.mean_sparsity, found.mean_overlap, found.forgetting, strict=True)
    ):
        later = overlaps[e + 1 :]
        rows.append((
            f"{e}", *_beside(sparse, found.gaussian),
            Quantity((sum(overlaps) - overlaps[e]) / (len(found) - 1)),
            Quantity(sum(later) / len(later) if later else NAN, undefined="it is the last"),
            Quantity(NAN if lost is None else lost, kind="points",
                     undefined="it is the last" if e == len(found) - 1 else "the run is not finished"),
        ))  # fmt: skip
    note = (
        f"Neurons of the final model on test data of each experience, means over layers; active where top-p {ACTIVE} "
        f"keeps them. Overlap: Jaccard of the rates at which neurons are active."
    )
    columns = ("experience", "sparsity, %", "Gaussian, %", "excess, points", "overlap with the others, %",
               "with later ones, %", "forgetting, points")  # fmt: skip
    return Table(name="experiences", title="Active neurons by experience", note=note, columns=columns, rows=tuple(rows))


def points_table(study: SparsityStudy) -> Table:
    """Every point of every sweep."""
    rows = [
        (curve.kind, role_name(curve), f"{value:.6g}", Quantity(score), *_beside(share, gauss))
        for curve in study.report.curves
        for value, score, share, gauss in zip(curve.values, curve.scores, curve.achieved, curve.gaussian, strict=True)
    ]
    columns = ("rule", "role", "value", f"{study.score}, %", "achieved, %", "Gaussian, %", "excess, points")
    return Table(name="points", title="All points of the sweeps", note=f"{said(study)}.", columns=columns,
                 rows=tuple(rows))  # fmt: skip


def role_name(curve: Curve) -> str:
    """The role as tables call it."""
    return "input + intermediate" if curve.role == ALL else curve.role


def _beside(share: float, gaussian: float) -> tuple[Quantity, Quantity, Quantity]:
    return Quantity(share), Quantity(gaussian), Quantity(share - gaussian, kind="points")


def activity_image(records: Sequence[ActivityRecord]) -> PixelArray | None:
    """Which active neurons stay and which are shared, means over layers, given the records so far.

    Left, each experience's active neurons compared with those when it was learnt; right, those of each experience, as
    it was learnt, with those of earlier ones at that time. None before the second experience and for a network without
    hidden neurons.
    """
    if len(records) < 2 or not records[-1].layers:
        return None
    return triangles_image(
        {
            "active neurons kept since learnt": [record.kept_E for record in records],
            "active neurons shared with the newest": [record.overlap_E for record in records],
        }
    )


def short(layer: str, *, most: int = 28) -> str:
    """A layer's name, its end where it is long; the whole model has none.

    >>> short("backbone.stages.3.mlp", most=12), short("")
    ('..ages.3.mlp', 'model')
    """
    if not layer:
        return "model"
    return layer if len(layer) <= most else f"..{layer[2 - most:]}"


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
