"""Tables, figures and JSON of a sparsity study, and the image of neuron activity for TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from clframe.metrics.statistics import NAN
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
from clframe.sparsity.analysis import ALL, SparsityCurve
from clframe.sparsity.study import ACTIVE, Domains, Experiences, SparsityStudy
from clframe.sparsity.union import PAYS, ActiveUnion
from clframe.tables import Cell, Quantity, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from clframe.plotting.style import PixelArray


SCHEMA_VERSION = 1
"""Version of ``sparsity.json``; raised when a field is removed or changes its meaning."""


def to_json(study: SparsityStudy, *, command: Sequence[str], versions: Mapping[str, str]) -> str:
    """Return the content of ``sparsity.json``; see ``docs/analysis.md``."""
    report, found = study.report, study.experiences
    content: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "command": list(command),
        "versions": dict(versions),
        **{
            name: getattr(study, name)
            for name in ("target", "kind", "origin", "part", "samples", "tokens", "score", "share", "tolerance")
        },
        "dense": report.dense,
        "language": None if study.language is None else asdict(study.language),
        "curves": [{**asdict(curve), "excess": curve.excess} for curve in report.curves],
        "effective_rank": report.ranks,
        "union": _union_tree(study.union),
        "experiences": None,
        "domains": None,
    }
    if found is not None:
        content["experiences"] = {
            "rule": "top_p", "value": ACTIVE, **asdict(found), "mean_sparsity": found.mean_sparsity,
            "mean_overlap": found.mean_overlap,
        }  # fmt: skip
    if study.domains is not None:
        content["domains"] = {
            "rule": "top_p", "value": ACTIVE, **asdict(study.domains), "mean_sparsity": study.domains.mean_sparsity,
            "mean_overlap": study.domains.mean_overlap,
        }  # fmt: skip
    for curve in content["curves"]:  # a perplexity may exceed the range of a float
        curve["scores"] = [score if math.isfinite(score) else None for score in curve["scores"]]
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def tables(study: SparsityStudy) -> tuple[Table, ...]:
    """Make all tables: critical sparsity by role and by layer; by kind of tokens and by experience; every sweep."""
    found = [critical_table(study), layers_table(study)]
    if any(len(curve.parts) > 1 for curve in study.report.curves):
        found.append(parts_table(study))
    if study.experiences is not None:
        found.append(experiences_table(study))
    if study.domains is not None:
        found.append(domains_table(study.domains))
    return (*found, union_table(study.union), points_table(study))


def describe_study(study: SparsityStudy) -> str:
    """Describe the target, its score and the data in one line."""
    tokens = "" if study.tokens is None else f", {study.tokens:,} tokens"
    on = f"on {study.samples:,} {study.part} samples{tokens}"
    percent = f"{100 * study.report.dense:.2f} %"
    if study.score == "agreement":
        found = f"agreement with the dense model of the dense model {percent}"
    elif study.score.startswith("choices"):
        by = " per character" if study.score == "choices_normalized" else ""
        found = f"questions whose right choice has the highest log-likelihood{by} under the dense model {percent}"
    elif study.language is None:
        found = f"accuracy of the dense model {percent}"
    else:
        scores = [f"perplexity of the dense model {study.language.perplexity:,.4g}",
                  f"accuracy of the next token {100 * study.language.accuracy:.2f} %"]  # fmt: skip
        found = " and ".join(scores if study.score == "perplexity" else scores[::-1])
    return f"{study.target}: {found} {on}"


def describe_limit(study: SparsityStudy) -> str:
    """State the tolerated loss of the score."""
    if study.score == "perplexity":
        return f"has a perplexity of at most {study.limit_score:,.5g}, {100 * study.tolerance:g} % above the dense one"
    return f"keeps {100 * study.share:g} % of the dense score"


def critical_table(study: SparsityStudy) -> Table:
    """Make a row per rule and role: critical sparsity, and that of a Gaussian vector."""
    rows = [
        (
            curve.kind, role_name(curve), f"{curve.critical_value:.4g}",
            *_with_gaussian(curve.critical, curve.critical_gaussian),
        )
        for curve in study.report.curves
    ]  # fmt: skip
    note = (
        f"The highest mean sparsity that {describe_limit(study)}, the sparsity of a dense "
        f"Gaussian vector under the same rule, and the excess over it. {describe_study(study)}."
    )
    columns = ("rule", "role", "at", "critical, %", "Gaussian, %", "excess, points")
    return Table(name="critical", title="Critical sparsity by role", note=note, columns=columns, rows=tuple(rows))


def layers_table(study: SparsityStudy) -> Table:
    """Make a row per rule, role and layer: sparsity at the critical point, and the effective rank."""
    rows: list[tuple[Cell, ...]] = []
    for curve in study.report.curves:
        for site, share in curve.critical_layers.items():
            layer, role = site.rsplit("/", 1) if curve.role == ALL else (site, curve.role)
            rank = study.report.ranks.get(role, {}).get(layer, NAN)
            rows.append((
                curve.kind, role_name(curve), site or "(model)",
                *_with_gaussian(share, curve.critical_gaussian_layers[site]),
                Quantity(rank, kind="decimal", undefined="measured for each role alone"),
            ))  # fmt: skip
    note = "At the value where all layers together reach the critical sparsity; effective rank of dense activations."
    columns = ("rule", "role", "layer", "sparsity, %", "Gaussian, %", "excess, points", "effective rank")
    return Table(name="layers", title="Sparsity by layer at the critical point", note=note, columns=columns,
                 rows=tuple(rows))  # fmt: skip


def parts_table(study: SparsityStudy) -> Table:
    """Make a row per rule, role and kind of tokens: prompt and generated."""
    rows = [
        (curve.kind, role_name(curve), part, *_with_gaussian(share, curve.critical_gaussian))
        for curve in study.report.curves
        for part, share in curve.critical_parts.items()
    ]
    columns = ("rule", "role", "tokens", "sparsity, %", "Gaussian, %", "excess, points")
    return Table(name="parts", title="Sparsity by kind of tokens at the critical point", columns=columns,
                 rows=tuple(rows))  # fmt: skip


def experiences_table(study: SparsityStudy) -> Table:
    """Make a row per experience: sparsity, overlap and forgetting, means over layers."""
    found = study.experiences
    assert found is not None
    rows = []
    for e, (sparse, overlaps, lost) in enumerate(
        zip(found.mean_sparsity, found.mean_overlap, found.forgetting, strict=True)
    ):
        later = overlaps[e + 1 :]
        rows.append((
            f"{e}", *_with_gaussian(sparse, found.gaussian),
            Quantity((sum(overlaps) - overlaps[e]) / (len(found) - 1)),
            Quantity(sum(later) / len(later) if later else NAN, undefined="the last experience"),
            Quantity(NAN if lost is None else lost, kind="points",
                     undefined="the last experience" if e == len(found) - 1 else "the run is not finished"),
        ))  # fmt: skip
    note = (
        f"Neurons of the final model on test data of each experience, means over layers; active if kept by top-p "
        f"{ACTIVE}. Overlap: Jaccard index of the rates of activity."
    )
    columns = ("experience", "sparsity, %", "Gaussian, %", "excess, points", "overlap with the others, %",
               "with later ones, %", "forgetting, points")  # fmt: skip
    return Table(name="experiences", title="Active neurons by experience", note=note, columns=columns, rows=tuple(rows))


def domains_table(found: Domains) -> Table:
    """Make a row per domain: sparsity, and the overlap of its active neurons with those of every domain."""
    rows: list[tuple[Cell, ...]] = [
        (name, *_with_gaussian(sparse, found.gaussian), *map(Quantity, overlaps))
        for name, sparse, overlaps in zip(found.names, found.mean_sparsity, found.mean_overlap, strict=True)
    ]
    note = (
        f"Neurons on each text file, means over layers; active if kept by top-p {ACTIVE}. Overlap: Jaccard index of "
        f"the rates of activity."
    )
    columns = ("domain", "sparsity, %", "Gaussian, %", "excess, points",
               *(f"overlap with {name}, %" for name in found.names))  # fmt: skip
    return Table(name="domains", title="Active neurons by domain", note=note, columns=columns, rows=tuple(rows))


def points_table(study: SparsityStudy) -> Table:
    """Make a row per point of every sweep."""
    lower = study.score == "perplexity"
    rows = [
        (
            curve.kind, role_name(curve), f"{value:.6g}",
            Quantity(score, kind="fine" if lower else "percent", undefined="not finite"), *_with_gaussian(share, gauss),
        )
        for curve in study.report.curves
        for value, score, share, gauss in zip(curve.values, curve.scores, curve.achieved, curve.gaussian, strict=True)
    ]  # fmt: skip
    score_column = study.score if lower else f"{study.score}, %"
    columns = ("rule", "role", "value", score_column, "achieved, %", "Gaussian, %", "excess, points")
    return Table(name="points", title="All points of the sweeps", note=f"{describe_study(study)}.", columns=columns,
                 rows=tuple(rows))  # fmt: skip


def union_table(union: ActiveUnion) -> Table:
    """Make a row per batch size: neurons that a batch activates, and the share of the cost that is saved."""
    rows: list[tuple[Cell, ...]] = []
    for at, size in enumerate(union.sizes):
        cells: list[Cell] = [f"{size:,}"]
        for shares in (union.mean_tokens, union.mean_samples):
            share = shares[at] if at < len(shares) else NAN
            cells += [Quantity(share, undefined="not so many"), Quantity(1 - share, undefined="not so many")]
        rows.append(tuple(cells))
    found = [union.largest_that_pays(shares) for shares in (union.mean_tokens, union.mean_samples)]
    tokens, samples = ("none" if size is None else f"{size:,}" for size in found)
    note = (
        f"Neurons that at least one token of a random batch activates (kept by top-p {union.value:.4g}), mean over "
        f"layers; the others need not be computed, which saves that share of the layers' cost. Largest batch that "
        f"saves {100 * PAYS:g} %: {tokens} (tokens), {samples} (samples)."
    )
    columns = ("batch size", "active by tokens, %", "saved by tokens, %", "active by samples, %", "saved by samples, %")
    return Table(name="union", title="Active neurons by batch size", note=note, columns=columns, rows=tuple(rows))


def role_name(curve: SparsityCurve) -> str:
    """Return the name of a curve's role in tables."""
    return "input + intermediate" if curve.role == ALL else curve.role


def _union_tree(union: ActiveUnion) -> dict[str, Any]:
    return {
        "rule": "top_p", **asdict(union), "mean_tokens": union.mean_tokens, "mean_samples": union.mean_samples,
        "largest_that_pays": {
            "least": PAYS, "tokens": union.largest_that_pays(union.mean_tokens),
            "samples": union.largest_that_pays(union.mean_samples),
        },
    }  # fmt: skip


def _with_gaussian(share: float, gaussian: float) -> tuple[Quantity, Quantity, Quantity]:
    return Quantity(share), Quantity(gaussian), Quantity(share - gaussian, kind="points")


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


LARGEST_WITH_DIGITS = 10
MOST_LAYERS = 8
"""Layers with a line in the figure of experiences."""


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
