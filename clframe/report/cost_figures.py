"""Figures of the cost of predictions and of whole runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from clframe.accounting import PHASES
from clframe.metrics.statistics import NAN
from clframe.plotting.style import (
    HEIGHT,
    PAPER,
    SERIES,
    Picture,
    counts,
    integer_ticks,
    label,
    legend,
    series_style,
    spaced_indices,
)
from clframe.report.figures import Series, draw_curves
from clframe.report.loading import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


LARGEST_LEGEND = 12
"""Layers that get a line in a figure."""


def cost_pictures(runs: Sequence[Run], *, prefix: str = "") -> list[Picture]:
    """List the cost figures of one group; costs are those of its first run."""
    first, pictures = runs[0], list[Picture]()
    if first.stage_macs:
        height = min(7.0, max(2.0, 0.9 + 0.26 * len(first.stage_macs)))
        pictures.append(Picture("cost", "MACs of one prediction by stage.", partial(draw_stages, first), height))
    if first.ledger is not None and first.ledger.predictions.products():
        roles = len(first.ledger.predictions.by_role())
        caption = "MACs per sample by role, dense (pale) and effective (dark), that is without products with zeros."
        pictures.append(Picture("products", caption, partial(draw_products, first), max(2.0, 1.2 + 0.34 * roles)))
    if first.ledger is not None and first.ledger.entries:
        pictures.append(Picture("run_cost", "MACs of the run by experience and phase.", partial(draw_run_cost, first)))
    if first.timings is not None:
        pictures.append(Picture("latency", f"Median latency against MACs, measured on {first.timings.setting.device}.",
                                partial(draw_latency, first)))  # fmt: skip
    for name, caption, draw in _activity(runs):
        pictures.append(Picture(name, caption, draw, HEIGHT + 0.3))
    return [Picture(f"{prefix}{p.name}", p.caption, p.draw, p.height) for p in pictures]


def draw_stages(run: Run, figure: Figure) -> None:
    """Draw a bar per stage, heads of exits in another color."""
    axes: Any = figure.add_subplot()
    names, values = list(run.stage_macs), list(run.stage_macs.values())
    colors = [SERIES[1] if name.startswith("exit/") else SERIES[0] for name in names]
    axes.barh(range(len(names)), values, color=colors, height=0.72)
    axes.set_yticks(range(len(names)), [label(name, most=24) for name in names])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="MACs")
    counts(axes.xaxis)


def draw_products(run: Run, figure: Figure) -> None:
    """Draw dense and effective MACs per role, one bar over the other."""
    assert run.ledger is not None
    dense = run.ledger.predictions.by_role()
    effective = run.ledger.predictions.by_role(count="effective")
    axes: Any = figure.add_subplot()
    places = range(len(dense))
    axes.barh(places, dense.values(), height=0.72, color=SERIES[0], alpha=0.3, label="dense")
    axes.barh(places, [effective[role] for role in dense], height=0.72, color=SERIES[0], label="effective")
    axes.set_yticks(places, [label(role, most=24) for role in dense])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="MACs per sample")
    counts(axes.xaxis)
    legend(figure, axes)


def draw_run_cost(run: Run, figure: Figure) -> None:
    """Draw a stacked bar per experience."""
    assert run.ledger is not None
    ledger = run.ledger
    indices = [index for index in ledger.by_experience() if index is not None]
    axes: Any = figure.add_subplot()
    bottom = [0.0] * len(indices)
    for n, phase in enumerate(phase for phase in PHASES if phase in ledger.by_phase()):
        values = [float(ledger.by_phase(experience=index).get(phase, 0)) for index in indices]
        axes.bar(indices, values, bottom=bottom, width=0.8, color=series_style(n)["color"], edgecolor=PAPER,
                 linewidth=0.6, label=phase)  # fmt: skip
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="experience", ylabel="MACs")
    integer_ticks(axes.xaxis, max(indices, default=0) + 1)
    counts(axes.yaxis)
    legend(figure, axes)


def draw_latency(run: Run, figure: Figure) -> None:
    """Draw a line per batch size over exits, or a point for a network with one exit; the exit policy as a ring."""
    assert run.timings is not None
    axes: Any = figure.add_subplot()
    for n, size in enumerate(run.timings.batches):
        rows = [row for row in run.timings.rows if row.batch == size]
        early = any(row.way.startswith("exit/") for row in rows)
        exits = [(row.macs, 1e3 * row.p50) for row in rows if row.way.startswith("exit/") or not early]
        style = series_style(n)
        axes.plot([macs for macs, _ in exits], [p50 for _, p50 in exits], label=f"batch {size}", **style)
        policy = [(row.macs, 1e3 * row.p50) for row in rows if row.way == "policy"]
        for macs, p50 in policy:
            axes.plot(macs, p50, "o", markersize=10, markerfacecolor="none", markeredgecolor=style["color"],
                      markeredgewidth=1.5, label="policy" if n == 0 else None)  # fmt: skip
    axes.set(xlabel="MACs per sample", ylabel="median latency, ms", xlim=(0, None), ylim=(0, None))
    counts(axes.xaxis)
    axes.margins(y=0.12)
    legend(figure, axes)


def _activity(runs: Sequence[Run]) -> list[tuple[str, str, Any]]:
    """List name, caption and drawing of the sparsity of every layer and of experts per token."""
    if not all(run.activity for run in runs):
        return []
    found: list[tuple[str, str, Any]] = []
    layers = list(dict.fromkeys(name for record in runs[0].activity for name in record.layers))
    experts = list(dict.fromkeys(name for record in runs[0].activity for name in record.experts))
    if layers:
        shown = [(label(name, most=20), [_over(run, name, "layers", "sparsity") for run in runs]) for name in layers]
        caption = "Inactive hidden neurons by layer, after each experience."
        found.append(("sparsity", caption, partial(draw_curves, _few(shown), ylabel="inactive neurons, %")))
    if experts:
        shown = [(label(name, most=20), [_over(run, name, "experts", "per_token") for run in runs]) for name in experts]
        caption = "Experts per token by layer, after each experience."
        found.append(("experts_per_token", caption, partial(draw_expert_use, _few(shown))))
    return found


def draw_expert_use(series: Sequence[Series], figure: Figure) -> None:
    """Draw curves as :func:`~clframe.report.figures.draw_curves` does, in experts instead of percent."""
    draw_curves(series, figure, ylabel="experts per token")
    figure.axes[0].yaxis.set_major_formatter(lambda value, _position: f"{value:g}")


def _over(run: Run, layer: str, kind: str, field: str) -> list[float]:
    """Return a number of one layer after each experience; NaN where the layer did not exist."""
    return [
        float(getattr(layers[layer], field)) if layer in (layers := getattr(record, kind)) else NAN
        for record in run.activity
    ]


def _few(series: Sequence[Series]) -> list[Series]:
    """Return at most as many series as a legend holds, evenly spaced over the depth."""
    return [series[n] for n in spaced_indices(len(series), most=LARGEST_LEGEND)]
