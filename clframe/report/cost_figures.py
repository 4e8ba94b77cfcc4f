"""Figures of what a prediction costs and what a run took."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from clframe.accounting import PHASES
from clframe.metrics.statistics import NAN
from clframe.plotting.style import HEIGHT, PAPER, SERIES, Picture, label, legend, look, whole_ticks
from clframe.report.figures import Series, draw_curves, short_count
from clframe.report.loading import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure


LARGEST_LEGEND = 12


def cost_pictures(runs: Sequence[Run], *, prefix: str = "") -> list[Picture]:
    """The figures for one group; of costs, those of its first run."""
    first, pictures = runs[0], list[Picture]()
    if first.ledger is not None and first.ledger.predictions.products():
        roles = len(first.ledger.predictions.by_role())
        said = "MACs of a sample by role: all in pale, in dark without products of a zero and experts that rest."
        pictures.append(Picture("products", said, partial(draw_products, first), max(2.0, 1.2 + 0.34 * roles)))
    if first.ledger is not None and first.ledger.entries:
        pictures.append(Picture("run_cost", "MACs of the run by experience and phase.", partial(draw_run_cost, first)))
    if first.timings is not None:
        pictures.append(Picture("latency", f"Median latency beside MACs, measured on {first.timings.setting.device}.",
                                partial(draw_latency, first)))  # fmt: skip
    for name, said, series in _activity(runs):
        pictures.append(Picture(name, said, series, HEIGHT + 0.3))
    return [Picture(f"{prefix}{p.name}", p.caption, p.draw, p.height) for p in pictures]


def draw_products(run: Run, figure: Figure) -> None:
    """Two bars a role, one over the other."""
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
    axes.set(xlabel="MACs a sample")
    axes.xaxis.set_major_formatter(lambda value, _position: short_count(value))
    legend(figure, axes)


def draw_run_cost(run: Run, figure: Figure) -> None:
    """A stacked bar an experience."""
    assert run.ledger is not None
    ledger = run.ledger
    indices = [index for index in ledger.by_experience() if index is not None]
    axes: Any = figure.add_subplot()
    bottom = [0.0] * len(indices)
    for n, phase in enumerate(phase for phase in PHASES if phase in ledger.by_phase()):
        values = [float(ledger.by_phase(experience=index).get(phase, 0)) for index in indices]
        axes.bar(indices, values, bottom=bottom, width=0.8, color=look(n)["color"], edgecolor=PAPER, linewidth=0.6,
                 label=phase)  # fmt: skip
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="experience", ylabel="MACs")
    whole_ticks(axes.xaxis, max(indices, default=0) + 1)
    axes.yaxis.set_major_formatter(lambda value, _position: short_count(value))
    legend(figure, axes)


def draw_latency(run: Run, figure: Figure) -> None:
    """A series a size of batch, exits in order of depth, or the network where it has none; the policy apart."""
    assert run.timings is not None
    axes: Any = figure.add_subplot()
    for n, size in enumerate(run.timings.batches):
        rows = [row for row in run.timings.rows if row.batch == size]
        early = any(row.way.startswith("exit/") for row in rows)
        exits = [(row.macs, 1e3 * row.p50) for row in rows if row.way.startswith("exit/") or not early]
        style = look(n)
        axes.plot([macs for macs, _ in exits], [p50 for _, p50 in exits], label=f"batch {size}", **style)
        policy = [(row.macs, 1e3 * row.p50) for row in rows if row.way == "policy"]
        for macs, p50 in policy:
            axes.plot(macs, p50, "o", markersize=10, markerfacecolor="none", markeredgecolor=style["color"],
                      markeredgewidth=1.5, label="policy" if n == 0 else None)  # fmt: skip
    axes.set(xlabel="MACs a sample", ylabel="p50 of a call, ms", xlim=(0, None), ylim=(0, None))
    axes.xaxis.set_major_formatter(lambda value, _position: short_count(value))
    axes.margins(y=0.12)
    legend(figure, axes)


def _activity(runs: Sequence[Run]) -> list[tuple[str, str, Any]]:
    """Sparsity of every layer, and experts a token, after each experience."""
    if not all(run.activity for run in runs):
        return []
    found: list[tuple[str, str, Any]] = []
    layers = list(dict.fromkeys(name for record in runs[0].activity for name in record.layers))
    experts = list(dict.fromkeys(name for record in runs[0].activity for name in record.experts))
    if layers:
        shown = [(label(name, most=20), [_over(run, name, "layers", "sparsity") for run in runs]) for name in layers]
        said = "Inactive hidden neurons by layer, after each experience."
        found.append(("sparsity", said, partial(draw_curves, _few(shown), said="inactive neurons, %")))
    if experts:
        shown = [(label(name, most=20), [_over(run, name, "experts", "per_token") for run in runs]) for name in experts]
        said = "Experts that run for a token, by layer, after each experience."
        found.append(("experts_a_token", said, partial(draw_expert_use, _few(shown))))
    return found


def draw_expert_use(series: Sequence[Series], figure: Figure) -> None:
    """As :func:`~clframe.report.figures.draw_curves`, in experts."""
    draw_curves(series, figure, said="experts a token")
    figure.axes[0].yaxis.set_major_formatter(lambda value, _position: f"{value:g}")


def _over(run: Run, layer: str, kind: str, field: str) -> list[float]:
    """A number of one layer after each experience; NaN where there was no such layer."""
    return [
        float(getattr(layers[layer], field)) if layer in (layers := getattr(record, kind)) else NAN
        for record in run.activity
    ]


def _few(series: Sequence[Series]) -> list[Series]:
    """At most as many as a legend holds, evenly over the depth."""
    step = math.ceil(len(series) / LARGEST_LEGEND)
    return list(series[::step])
