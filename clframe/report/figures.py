"""Figures of a report: accuracy, forgetting, losses, exits, cost, and comparisons of groups."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from clframe.exits.diagnostics import all_exit_metrics
from clframe.exits.failure import LABELS
from clframe.metrics.continual import Matrix, average_seen_accuracy, forgetting
from clframe.metrics.statistics import NAN, deviation, mean, pareto_front
from clframe.plotting.images import draw_heat_map
from clframe.plotting.style import (
    GRID,
    HEIGHT,
    MUTED,
    PAPER,
    SERIES,
    Picture,
    annotate_apart,
    counts,
    finite,
    integer_ticks,
    label,
    legend,
    percent,
    series_style,
)
from clframe.report.comparison import WHOLE, Group, mean_points, record_points
from clframe.report.loading import Run
from clframe.report.shown_metrics import heading

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Series = tuple[str, Sequence[Sequence[float]]]
"""A name, and one curve per seed."""

LARGEST_WITH_DIGITS = 10
"""Rows and columns up to which a heat map of the page has its numbers drawn in."""
MOST_EXPERIENCE_LINES = 30
"""Experiences up to which their ends are marked in the figure of losses."""
MOST_GROUPS = 12
"""Entries of a legend."""
FAILURE_PANELS = ("ece", "brier", "auroc", "aurc", "fpr95", "eefp")
"""Metrics of calibration and failure prediction that are drawn; their table has all of them."""


def curve(matrices: Sequence[Matrix], score: Callable[[Matrix], float]) -> list[list[float]]:
    """Compute for each seed ``score`` of the first i + 1 rows of its accuracy matrix, for every i."""
    return [[score(matrix[: i + 1]) for i in range(len(matrix))] for matrix in matrices]


def average_curve(matrices: Sequence[Matrix]) -> list[list[float]]:
    """Compute the mean accuracy over the experiences seen, after each."""
    return curve(matrices, lambda rows: average_seen_accuracy(rows).value)


def forgetting_curve(matrices: Sequence[Matrix]) -> list[list[float]]:
    """Compute forgetting after each experience; NaN after the first, where it is undefined."""
    return curve(matrices, lambda rows: forgetting(rows).value)


def run_pictures(runs: Sequence[Run], *, prefix: str = "") -> list[Picture]:
    """List the figures of one group, or of one unfinished run; those without data are omitted."""
    matrices = [run.accuracy_matrix for run in runs]
    aware = [run.accuracy_matrix_task_aware for run in runs]
    pictures = []
    if matrices[0] and len(matrices[0][0]) > 1:  # over one experience there is one number
        rows = len(matrices[0])
        height = min(6.0, max(HEIGHT, 1.0 + 0.34 * rows)) if rows <= LARGEST_WITH_DIGITS else 4.2
        averages = [("all classes", average_curve(matrices)), ("task-aware", average_curve(aware))]
        lost = [("forgetting", forgetting_curve(matrices))]
        pictures += [
            Picture("average_accuracy", f"Average accuracy on the experiences seen so far. {_band(runs)}",
                    partial(draw_curves, averages, ylabel="accuracy, %")),
            Picture("accuracy_matrix", "Accuracy in %, after each experience (rows) on each experience (columns).",
                    partial(draw_matrix, matrices), height),
            Picture("forgetting", "Forgetting: best accuracy so far minus the present one, mean over earlier "
                    f"experiences. {_band(runs)}", partial(draw_curves, lost, ylabel="forgetting, %")),
        ]  # fmt: skip
    if any(row.name.startswith("loss/") for run in runs for row in run.logged):
        caption = "Loss terms during training; vertical lines separate experiences."
        caption += " One line per seed." if len(runs) > 1 else ""
        pictures.append(Picture("losses", caption, partial(draw_losses, runs)))
    return [Picture(f"{prefix}{p.name}", p.caption.strip(), p.draw, p.height) for p in pictures]


def exit_pictures(runs: Sequence[Run], *, prefix: str = "") -> list[Picture]:
    """List the figures of the exits of one group, or of one unfinished run; none for networks with one exit."""
    if not runs[0].exits or len(runs[0].exit_names) < 2:
        return []
    names = runs[0].exit_names
    alone = [
        (label(name, most=20), [[record.accuracy_K[k] for record in run.exits] for run in runs])
        for k, name in enumerate(names)
    ]
    pictures = [
        Picture("accuracy_cost", "Accuracy against cost: the line sweeps one threshold on test samples, dots are "
                "single exits, rings are budgets with thresholds from validation samples.",
                partial(draw_accuracy_cost, runs)),
        Picture("exit_accuracy", "Accuracy of each exit on the samples of all experiences so far. " + _band(runs),
                partial(draw_curves, alone, ylabel="accuracy, %")),
    ]  # fmt: skip
    if all(run.exits[-1].share_PK for run in runs):
        caption = "Exit usage: the share of samples that each exit predicts, by budget."
        pictures.insert(1, Picture("exit_usage", caption, partial(draw_exit_usage, runs)))
    rules = [rule for rule in runs[0].exits[-1].static if all(rule in r.static for run in runs for r in run.exits)]
    if rules:
        decisions = [(rule, [[record.static[rule] for record in run.exits] for run in runs]) for rule in rules]
        caption = "Accuracy of decisions that use every exit; overthinking is the oracle minus the last exit."
        pictures.append(Picture("exit_decisions", f"{caption} {_band(runs)}".strip(),
                                partial(draw_curves, decisions, ylabel="accuracy, %")))  # fmt: skip
    if all(record.similarity_K for run in runs for record in run.exits):
        similar = [
            (label(name, most=20), [[record.similarity_K[k] for record in run.exits] for run in runs])
            for k, name in enumerate(names)
        ]
        caption = "Similarity (linear CKA) of each exit's tap to itself after the first experience."
        pictures.append(Picture("exit_similarity", f"{caption} {_band(runs)}".strip(),
                                partial(draw_curves, similar, ylabel="CKA, %")))  # fmt: skip
    panels = [name for name in all_exit_metrics() if all(name in run.exits[-1].metrics for run in runs)]
    failure = [name for name in panels if name in FAILURE_PANELS]
    for picture, what, shown in (
        ("exit_metrics", "Metrics per exit", [name for name in panels if name not in LABELS]),
        ("exit_failure_prediction", "Calibration and failure prediction per exit", failure),
    ):
        if shown:
            caption = f"{what} after the last experience, exits in order of depth. {_band(runs)}"
            pictures.append(Picture(picture, caption.strip(), partial(draw_exit_metrics, runs, shown),
                                    0.4 + 1.5 * math.ceil(len(shown) / 2)))  # fmt: skip
    return [Picture(f"{prefix}{p.name}", p.caption.strip(), p.draw, p.height) for p in pictures]


def group_pictures(groups: Sequence[Group], *, comparable: bool = True) -> list[Picture]:
    """List the figures that show all groups; without a Pareto front where groups are not comparable."""
    named = best_groups(groups)
    curves = [(label(g.label), average_curve([r.accuracy_matrix for r in g.results])) for g in named]
    height = HEIGHT + 0.2 * len(named)
    few = f" The {len(named)} most accurate of {len(groups)} groups are named." if len(named) < len(groups) else ""
    caption = f"Average accuracy on the experiences seen so far. Bands: ± sample standard deviation over seeds.{few}"
    pictures = []
    if any(len(run.accuracy_matrix[0]) > 1 for group in groups for run in group.runs):
        draw = partial(draw_curves, curves, ylabel="accuracy, %")
        pictures.append(Picture("groups_average_accuracy", caption, draw, height))
    if any(group.points for group in groups):
        front = "The line is the Pareto front." if comparable else "No front: the groups are not comparable."
        caption = (
            "Accuracy on all test samples against mean MACs per prediction: the whole network, each budget, and the "
            f"run's own exit policy. {front}{few}"
        )
        pictures.append(Picture("pareto", caption, partial(draw_pareto, groups, front=comparable), height))
    return pictures


def best_groups(groups: Sequence[Group]) -> list[Group]:
    """Return the groups that a figure can name, in their order: those of the highest final average accuracy."""
    final = [mean(list(group.metric("final_average_accuracy").values())) for group in groups]
    ranked = sorted(range(len(groups)), key=lambda n: (math.isnan(final[n]), -final[n], n))
    return [groups[n] for n in sorted(ranked[:MOST_GROUPS])]


def _band(runs: Sequence[Run]) -> str:
    return f"Band: ± sample standard deviation over {len(runs)} seeds." if len(runs) > 1 else ""


def draw_curves(series: Sequence[Series], figure: Figure, *, ylabel: str) -> None:
    """Draw means over seeds after each experience, with bands of one sample standard deviation."""
    axes: Any = figure.add_subplot()
    longest = 0
    for n, (name, curves_S) in enumerate(series):
        by_experience = list(zip(*curves_S, strict=True))
        center, spread = [mean(values) for values in by_experience], [deviation(values) for values in by_experience]
        axes.plot(range(len(center)), center, label=name, **series_style(n))
        low, high = ([c + sign * s for c, s in zip(center, spread, strict=True)] for sign in (-1, 1))
        if finite(low):
            axes.fill_between(range(len(center)), low, high, color=series_style(n)["color"], alpha=0.16, linewidth=0)
        longest = max(longest, len(center))
    axes.set(xlabel="after experience", ylabel=ylabel)
    integer_ticks(axes.xaxis, longest)
    axes.margins(y=0.12)
    percent(axes.yaxis)
    legend(figure, axes)


def draw_matrix(matrices: Sequence[Matrix], figure: Figure) -> None:
    """Draw a heat map of the mean over seeds, with its numbers where they fit; ``-`` where undefined."""
    rows, columns = len(matrices[0]), len(matrices[0][0])
    values_RC = [[mean([m[i][j] for m in matrices]) for j in range(columns)] for i in range(rows)]
    axes: Any = figure.add_subplot()
    draw_heat_map(
        axes, values_RC, rows=_numbers(rows), columns=_numbers(columns), percent=True, most=LARGEST_WITH_DIGITS
    )
    axes.set(xlabel="on experience", ylabel="after experience")


def _numbers(count: int) -> list[str]:
    return [str(n) for n in range(count)]


def draw_losses(runs: Sequence[Run], figure: Figure) -> None:
    """Draw every loss term of metrics.csv over batches, one line per seed."""
    axes: Any = figure.add_subplot()
    names = sorted({row.name for run in runs for row in run.logged if row.name.startswith("loss/")})
    for n, name in enumerate(names):
        style = {**series_style(n), "marker": ""}
        for s, run in enumerate(runs):
            rows = [row for row in run.logged if row.name == name]
            values = [row.value if math.isfinite(row.value) else NAN for row in rows]
            text = label(name.removeprefix("loss/")) if s == 0 else None
            axes.plot([row.step for row in rows], values, label=text, linewidth=1.8 if len(runs) == 1 else 1.0, **style)
    starts: dict[int, int] = {}
    for row in runs[0].logged:
        starts[row.experience] = max(row.step, starts.get(row.experience, 0))
    if len(starts) <= MOST_EXPERIENCE_LINES:
        for end in sorted(starts.values())[:-1]:
            axes.axvline(end, color=GRID, linewidth=0.9, zorder=0)
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="batches", ylabel="loss" if len(names) > 1 else label(names[0]))
    legend(figure, axes)


def draw_accuracy_cost(runs: Sequence[Run], figure: Figure) -> None:
    """Draw accuracy against cost after the last experience, one line per seed; exits and budgets as means."""
    axes: Any = figure.add_subplot()
    records = [run.exits[-1] for run in runs]
    for n, record in enumerate(records):
        axes.plot(record.curve.costs, record.curve.accuracies, color=SERIES[0], alpha=1.0 if len(runs) == 1 else 0.45,
                  linewidth=1.8 if len(runs) == 1 else 1.1, label="threshold sweep" if n == 0 else None)  # fmt: skip
    costs, accuracies = (
        [mean(values) for values in zip(*(getattr(r.curve, field) for r in records), strict=True)]
        for field in ("exit_costs", "exit_accuracies")
    )
    axes.plot(costs, accuracies, "o", color=SERIES[2], markersize=5, label="single exit")
    points = mean_points([record_points(record) for record in records])
    names_at: dict[tuple[float, float], list[str]] = {}
    scale = mean([record.backbone_macs for record in records])
    for point in points:
        if point.name != WHOLE:
            names_at.setdefault((point.cost / scale, point.accuracy), []).append(point.name)
    for n, position in enumerate(names_at):
        axes.plot(*position, "o", markersize=10, markerfacecolor="none", markeredgecolor=SERIES[1], markeredgewidth=1.5,
                  label="budget" if n == 0 else None)  # fmt: skip
    axes.axvline(1.0, color=MUTED, linestyle=":", linewidth=1)
    axes.set(xlabel="mean cost, % of the bare backbone", ylabel="accuracy, %", xlim=(0, None))
    axes.margins(y=0.14)
    percent(axes.xaxis)
    percent(axes.yaxis)
    legend(figure, axes)
    texts = {position: ", ".join(names).replace("%", " %") for position, names in names_at.items()}
    annotate_apart(figure, axes, texts, color=SERIES[1])


def draw_exit_usage(runs: Sequence[Run], figure: Figure) -> None:
    """Draw a stacked bar per budget: the share that each exit predicts, mean over seeds; early exits are palest."""
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
    axes.set(xlabel="exit usage, % of samples", ylabel="budget", xlim=(0, 1))
    percent(axes.xaxis)
    legend(figure, axes)


def draw_exit_metrics(runs: Sequence[Run], names: Sequence[str], figure: Figure) -> None:
    """Draw one panel per metric: its value at each exit, mean over seeds with a band of one standard deviation."""
    panels: Any = figure.subplots(math.ceil(len(names) / 2), 2, squeeze=False, sharex=True)
    for axes, name in itertools.zip_longest(panels.flat, names):
        if name is None:
            axes.set_visible(False)
            continue
        metric = all_exit_metrics()[name]
        by_exit = list(zip(*(run.exits[-1].metrics[name] for run in runs), strict=True))
        center, spread = [mean(values) for values in by_exit], [deviation(values) for values in by_exit]
        axes.plot(range(len(center)), center, **series_style(0))
        low, high = ([c + sign * s for c, s in zip(center, spread, strict=True)] for sign in (-1, 1))
        if finite(low):
            axes.fill_between(range(len(center)), low, high, color=SERIES[0], alpha=0.16, linewidth=0)
        axes.set_title(heading(metric), fontsize=8.5)
        integer_ticks(axes.xaxis, len(center), most=7)
        axes.margins(y=0.2)
        if metric.kind == "percent":
            percent(axes.yaxis)
    figure.supxlabel("exit", fontsize=9, color=MUTED)


def draw_pareto(groups: Sequence[Group], figure: Figure, *, front: bool) -> None:
    """Draw the operating points of every group, gray without a name, and the Pareto front of all of them."""
    axes: Any = figure.add_subplot()
    every = []
    named = best_groups(groups)
    for group in groups:
        points = sorted(group.points)
        every += points
        costs, accuracies = [p.cost for p in points], [p.accuracy for p in points]
        if group in named:
            style = {**series_style(named.index(group)), "linestyle": ":", "linewidth": 1.1}
            axes.plot(costs, accuracies, label=label(group.label), markersize=6, **style)
        else:
            axes.plot(costs, accuracies, "o", color=GRID, markersize=4, zorder=1)
    if front:
        best = pareto_front(every)
        axes.plot([p.cost for p in best], [p.accuracy for p in best], color=MUTED, linewidth=5, alpha=0.28, zorder=0,
                  solid_capstyle="round", drawstyle="steps-post")  # fmt: skip
    axes.set(xlabel="MACs per prediction", ylabel="accuracy, %", xlim=(0, None))
    counts(axes.xaxis)
    axes.margins(y=0.12)
    percent(axes.yaxis)
    legend(figure, axes)
