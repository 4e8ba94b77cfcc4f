"""What the figures of a report show; ``drawing.py`` says how they look."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clframe.files import write_atomically
from clframe.metrics.continual import Matrix, average_seen_accuracy, forgetting
from clframe.metrics.statistics import NAN, deviation, mean, pareto_front
from clframe.plotting.style import (
    GRID,
    HEIGHT,
    INK,
    MUTED,
    PAPER,
    SERIES,
    Picture,
    finite,
    label,
    legend,
    look,
    percent,
    whole_ticks,
)
from clframe.report.comparison import WHOLE, Group, mean_points, record_points
from clframe.report.loading import Run
from clframe.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Series = tuple[str, Sequence[Sequence[float]]]
"""A name, and one curve a seed."""

LARGEST_WITH_DIGITS = 10
LARGEST_VECTOR = 30
MOST_GROUPS = 12
"""In a legend."""


def curve(matrices: Sequence[Matrix], score: Callable[[Matrix], float]) -> list[list[float]]:
    """For each seed, ``score`` of the first i + 1 rows of its accuracy matrix, for every i."""
    return [[score(matrix[: i + 1]) for i in range(len(matrix))] for matrix in matrices]


def average_curve(matrices: Sequence[Matrix]) -> list[list[float]]:
    """Mean accuracy over the experiences seen, after each."""
    return curve(matrices, lambda rows: average_seen_accuracy(rows).value)


def forgetting_curve(matrices: Sequence[Matrix]) -> list[list[float]]:
    """Forgetting after each experience; NaN after the first, where there is none."""
    return curve(matrices, lambda rows: forgetting(rows).value)


def run_pictures(runs: Sequence[Run], *, prefix: str = "") -> list[Picture]:
    """The figures of one group, or of one run that goes on; those without anything to show are left out."""
    matrices = [run.accuracy_matrix for run in runs]
    aware = [run.accuracy_matrix_task_aware for run in runs]
    pictures = []
    if matrices[0]:
        rows = len(matrices[0])
        height = min(6.0, max(HEIGHT, 1.0 + 0.34 * rows)) if rows <= LARGEST_WITH_DIGITS else 4.2
        averages = [("all classes", average_curve(matrices)), ("task-aware", average_curve(aware))]
        lost = [("forgetting", forgetting_curve(matrices))]
        pictures += [
            Picture("average_accuracy", f"Average accuracy on the experiences seen so far. {_band(runs)}",
                    partial(draw_curves, averages, said="accuracy, %")),
            Picture("accuracy_matrix", "Accuracy in %, after each experience (rows) on each experience (columns).",
                    partial(draw_matrix, matrices), height),
            Picture("forgetting", "Forgetting: best accuracy so far minus the present one, mean over earlier "
                    f"experiences. {_band(runs)}", partial(draw_curves, lost, said="forgetting, %")),
        ]  # fmt: skip
    if any(row.name.startswith("loss/") for run in runs for row in run.logged):
        said = "Loss terms while training; a vertical line is a new experience."
        said += " One line a seed." if len(runs) > 1 else ""
        pictures.append(Picture("losses", said, partial(draw_losses, runs)))
    if runs[0].exits and len(runs[0].exit_names) > 1:
        pictures += _exit_pictures(runs)
    if runs[0].stage_macs:
        height = min(7.0, max(2.0, 0.9 + 0.26 * len(runs[0].stage_macs)))
        pictures.append(Picture("cost", "MACs of one prediction by stage.", partial(draw_stages, runs[0]), height))
    return [Picture(f"{prefix}{p.name}", p.caption.strip(), p.draw, p.height) for p in pictures]


def _exit_pictures(runs: Sequence[Run]) -> list[Picture]:
    names = runs[0].exit_names
    alone = [
        (label(name, most=20), [[record.diagnostics.accuracy_K[k] for record in run.exits] for run in runs])
        for k, name in enumerate(names)
    ]
    pictures = [
        Picture("accuracy_cost", "Accuracy against cost: the line is one threshold going down on test samples, dots "
                "are exits alone, rings are budgets with thresholds from validation samples.",
                partial(draw_accuracy_cost, runs)),
        Picture("exit_accuracy", "Each exit alone, on the samples of all experiences so far. " + _band(runs),
                partial(draw_curves, alone, said="accuracy, %")),
    ]  # fmt: skip
    if all(run.exits[-1].share_PK for run in runs):
        said = "Who exits where: the share of samples that each exit answers, by budget."
        pictures.insert(1, Picture("who_exits", said, partial(draw_who_exits, runs)))
    return pictures


def group_pictures(groups: Sequence[Group], *, comparable: bool = True) -> list[Picture]:
    """Figures with all groups in them; without a Pareto front where they must not be compared."""
    curves = [(label(g.label), average_curve([r.accuracy_matrix for r in g.results])) for g in groups]
    height = HEIGHT + 0.2 * min(MOST_GROUPS, len(groups))
    said = "Average accuracy on the experiences seen so far. Bands: ± sample deviation over seeds."
    pictures = [Picture("groups_average_accuracy", said, partial(draw_curves, curves, said="accuracy, %"), height)]
    if any(group.points for group in groups):
        front = "The line is the Pareto front." if comparable else "No front: the groups are not comparable."
        said = (
            "Accuracy on all test samples against mean MACs of a prediction: the whole network, stopping early at each "
            f"budget, and by a policy of its own. {front}"
        )
        pictures.append(Picture("pareto", said, partial(draw_pareto, groups, front=comparable), height))
    return pictures


def _band(runs: Sequence[Run]) -> str:
    return f"Band: ± sample deviation over {len(runs)} seeds." if len(runs) > 1 else ""


def draw_curves(series: Sequence[Series], figure: Figure, *, said: str) -> None:
    """Means over seeds after each experience, with bands of a sample deviation."""
    axes: Any = figure.add_subplot()
    longest = 0
    for n, (name, curves_S) in enumerate(series):
        by_place = list(zip(*curves_S, strict=True))
        center, spread = [mean(values) for values in by_place], [deviation(values) for values in by_place]
        axes.plot(range(len(center)), center, label=name, **look(n))
        low, high = ([c + sign * s for c, s in zip(center, spread, strict=True)] for sign in (-1, 1))
        if finite(low):
            axes.fill_between(range(len(center)), low, high, color=look(n)["color"], alpha=0.16, linewidth=0)
        longest = max(longest, len(center))
    axes.set(xlabel="after experience", ylabel=said)
    whole_ticks(axes.xaxis, longest)
    axes.margins(y=0.12)
    percent(axes.yaxis)
    legend(figure, axes)


def draw_matrix(matrices: Sequence[Matrix], figure: Figure) -> None:
    """A heat map of the mean over seeds, with its numbers where they fit; ``-`` where undefined."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    rows, columns = len(matrices[0]), len(matrices[0][0])
    values = [[mean([m[i][j] for m in matrices]) for j in range(columns)] for i in range(rows)]
    axes: Any = figure.add_subplot()
    axes.grid(False)
    axes.spines[:].set_visible(False)
    color = to_rgb(SERIES[0])
    shades = LinearSegmentedColormap.from_list("shades", [(*color, 0.05), (*color, 1.0)])
    small = max(rows, columns) <= LARGEST_VECTOR
    axes.pcolormesh(values, vmin=0, vmax=1, cmap=shades, edgecolors=PAPER if small else "none",
                    linewidth=1.2 if small else 0, rasterized=not small)  # fmt: skip
    axes.invert_yaxis()
    for axis, count in ((axes.xaxis, columns), (axes.yaxis, rows)):
        places = range(0, count, max(1, math.ceil(count / 10)))
        axis.set_ticks([place + 0.5 for place in places], [str(place) for place in places])
    axes.tick_params(length=0)
    axes.set(xlabel="on experience", ylabel="after experience")
    if max(rows, columns) > LARGEST_WITH_DIGITS:
        return
    for i in range(rows):
        for j in range(columns):
            shown = "-" if math.isnan(values[i][j]) else f"{100 * values[i][j]:.0f}"
            axes.text(j + 0.5, i + 0.5, shown, ha="center", va="center", color=PAPER if values[i][j] > 0.55 else INK)


def draw_losses(runs: Sequence[Run], figure: Figure) -> None:
    """Every loss term of metrics.csv over steps, a thin line a seed."""
    axes: Any = figure.add_subplot()
    names = sorted({row.name for run in runs for row in run.logged if row.name.startswith("loss/")})
    for n, name in enumerate(names):
        style = {**look(n), "marker": ""}
        for s, run in enumerate(runs):
            rows = [row for row in run.logged if row.name == name]
            values = [row.value if math.isfinite(row.value) else NAN for row in rows]
            said = label(name.removeprefix("loss/")) if s == 0 else None
            axes.plot([row.step for row in rows], values, label=said, linewidth=1.8 if len(runs) == 1 else 1.0, **style)
    starts: dict[int, int] = {}
    for row in runs[0].logged:
        starts[row.experience] = max(row.step, starts.get(row.experience, 0))
    if len(starts) <= LARGEST_VECTOR:
        for end in sorted(starts.values())[:-1]:
            axes.axvline(end, color=GRID, linewidth=0.9, zorder=0)
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="step", ylabel="loss" if len(names) > 1 else label(names[0]))
    legend(figure, axes)


def draw_accuracy_cost(runs: Sequence[Run], figure: Figure) -> None:
    """Accuracy against cost after the last experience, a line a seed; exits and budgets as means over seeds."""
    axes: Any = figure.add_subplot()
    records = [run.exits[-1] for run in runs]
    for n, record in enumerate(records):
        axes.plot(record.curve.costs, record.curve.accuracies, color=SERIES[0], alpha=1.0 if len(runs) == 1 else 0.45,
                  linewidth=1.8 if len(runs) == 1 else 1.1, label="one threshold" if n == 0 else None)  # fmt: skip
    costs, accuracies = (
        [mean(values) for values in zip(*(getattr(r.curve, field) for r in records), strict=True)]
        for field in ("exit_costs", "exit_accuracies")
    )
    axes.plot(costs, accuracies, "o", color=SERIES[2], markersize=5, label="exit alone")
    points = mean_points([record_points(record) for record in records])
    at: dict[tuple[float, float], list[str]] = {}
    scale = mean([record.backbone_macs for record in records])
    for point in points:
        if point.name != WHOLE:
            at.setdefault((point.cost / scale, point.accuracy), []).append(point.name)
    for n, (place, names) in enumerate(at.items()):
        axes.plot(*place, "o", markersize=10, markerfacecolor="none", markeredgecolor=SERIES[1], markeredgewidth=1.5,
                  label="budget" if n == 0 else None)  # fmt: skip
        axes.annotate(", ".join(names), place, xytext=(5, -5), textcoords="offset points", ha="left", va="top",
                      fontsize=8.5, color=SERIES[1])  # fmt: skip
    axes.axvline(1.0, color=MUTED, linestyle=":", linewidth=1)
    axes.set(xlabel="mean cost, % of the bare backbone", ylabel="accuracy, %", xlim=(0, None))
    axes.margins(y=0.14)
    percent(axes.xaxis)
    percent(axes.yaxis)
    legend(figure, axes)


def draw_who_exits(runs: Sequence[Run], figure: Figure) -> None:
    """A stacked bar a budget: the share that each exit answers, mean over seeds; early exits are the palest."""
    axes: Any = figure.add_subplot()
    names, first = runs[0].exit_names, runs[0].exits[-1]
    labels = [point.name for point in first.points.points or ()]
    left = [0.0] * len(labels)
    for k, name in enumerate(names):
        shares = [mean([run.exits[-1].share_PK[p][k] for run in runs]) for p in range(len(labels))]
        shares = [0.0 if math.isnan(share) else share for share in shares]
        axes.barh(range(len(labels)), shares, left=left, height=0.72, color=SERIES[0], edgecolor=PAPER, linewidth=1,
                  alpha=0.25 + 0.75 * (k + 1) / len(names), label=label(name, most=20))  # fmt: skip
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="samples answered, %", ylabel="budget", xlim=(0, 1))
    percent(axes.xaxis)
    legend(figure, axes)


def draw_stages(run: Run, figure: Figure) -> None:
    """A bar a stage, heads of exits in another color."""
    axes: Any = figure.add_subplot()
    names, values = list(run.stage_macs), list(run.stage_macs.values())
    colors = [SERIES[1] if name.startswith("exit/") else SERIES[0] for name in names]
    axes.barh(range(len(names)), values, color=colors, height=0.72)
    axes.set_yticks(range(len(names)), [label(name, most=24) for name in names])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="MACs")
    axes.xaxis.set_major_formatter(lambda value, _position: short_count(value))


def draw_pareto(groups: Sequence[Group], figure: Figure, *, front: bool) -> None:
    """Operating points of every group, and the front of all of them."""
    axes: Any = figure.add_subplot()
    every = []
    for n, group in enumerate(groups):
        points = sorted(group.points)
        every += points
        axes.plot([p.cost for p in points], [p.accuracy for p in points], label=label(group.label), markersize=6,
                  **{**look(n), "linestyle": ":", "linewidth": 1.1})  # fmt: skip
    if front:
        best = pareto_front(every)
        axes.plot([p.cost for p in best], [p.accuracy for p in best], color=MUTED, linewidth=5, alpha=0.28, zorder=0,
                  solid_capstyle="round", drawstyle="steps-post")  # fmt: skip
    axes.set(xlabel="MACs a prediction", ylabel="accuracy, %", xlim=(0, None))
    axes.xaxis.set_major_formatter(lambda value, _position: short_count(value))
    axes.margins(y=0.12)
    percent(axes.yaxis)
    legend(figure, axes)


def short_count(value: float) -> str:
    """A count for an axis.

    >>> short_count(0), short_count(350_000), short_count(1.8e9)
    ('0', '350 k', '1.8 G')
    """
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g} {letter}"
    return f"{value:g}"


def write_figures(result: Result, folder: Path) -> None:
    """``accuracy_matrix.png``; of several experiences ``neurons.png``; of more than one exit ``exits_*.png``.

    The matrix has rows after experience i, columns on test experience j.
    """
    from clframe.exits.plots import exit_images  # here, because training brings Avalanche with it
    from clframe.plotting.images import matrix_image, png
    from clframe.sparsity.output import activity_image

    folder.mkdir(exist_ok=True)
    pictures = {"accuracy_matrix": matrix_image(result.accuracy_matrix)}
    neurons = activity_image(result.activity) if result.activity else None
    if neurons is not None:
        pictures["neurons"] = neurons
    if len(result.exit_names) > 1:
        images = exit_images(result.exits, names=result.exit_names)
        pictures.update({f"exits_{name}": image for name, image in images.items()})
    for name, picture in pictures.items():
        write_atomically(folder / f"{name}.png", png(picture))
