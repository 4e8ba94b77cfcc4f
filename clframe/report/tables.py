"""Tables of groups of runs: metrics, paired differences, cost at equal accuracy, accuracy matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

from clframe.metrics.continual import average_seen_accuracy
from clframe.metrics.registry import Kind, all_metrics
from clframe.metrics.statistics import NAN, Difference, Point, cost_at, mean, paired
from clframe.report.comparison import Group, mean_points, mismatch, operating_points
from clframe.report.loading import Run
from clframe.report.shown_metrics import (
    heading,
    macs_over_seeds,
    metric_over_seeds,
    seed_mean,
    seeds_text,
    shown_metrics,
    spread_note,
)
from clframe.tables import Cell, Quantity, Table, over_seeds


def _compared(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Name and heading of the metrics that groups are compared by."""
    metrics = shown_metrics([result for group in groups for result in group.results])
    return [(name, heading(metric)) for name, metric in metrics.items() if metric.compared]


def groups_table(groups: Sequence[Group]) -> Table:
    """Make one row per group: means over its seeds."""
    compared = _compared(groups)
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (
            group.label, seeds_text(group.seeds), *(metric_over_seeds(group.results, name) for name, _ in compared),
            macs_over_seeds(group.results),
            over_seeds(group.by_seed(lambda r: sum(r.state_bytes.values())), kind="whole"),
            over_seeds(group.by_seed(lambda r: r.train_seconds), kind="decimal"),
        )
        for group in groups
    )  # fmt: skip
    columns = ("group", "seeds", *(title for _, title in compared), "MACs per prediction", "state, bytes",
               "training, s")  # fmt: skip
    note = "Mean ± sample standard deviation over seeds. MACs are of the whole network; FLOPs = 2 x MACs."
    return Table(name="groups", title="Groups of runs", note=note, columns=columns, rows=rows)


def differences_table(groups: Sequence[Group], base: Group) -> Table:
    """Make one row per metric and group: its paired difference from ``base``, one of the groups."""
    rows = []
    for group in groups:
        if group is base:
            continue
        why = mismatch(base, group)
        for name, label in _compared(groups):
            found = paired(base.metric(name), group.metric(name))
            kind = all_metrics()[name].kind
            rows.append((group.label, label.removesuffix(", %"), *_difference_cells(found, why, kind)))
    shares = all(title.endswith(", %") for _, title in _compared(groups))
    percent, points = (", %", ", points") if shares else ("", "")
    columns = ("group", "metric", "common seeds", f"{base.label}{percent}", f"difference{points}",
               f"95 % CI from{points}", f"to{points}", "excludes 0", "relative change, %")  # fmt: skip
    metrics = shown_metrics([result for group in groups for result in group.results])
    lower = [metric.label for metric in metrics.values() if metric.compared and metric.better == "lower"]
    note = (
        f"Each group minus '{base.label}', seed by seed, over common seeds, with Student's 95 % confidence interval. "
        f"Relative change: the difference over the mean of '{base.label}'. Lower is better for {', '.join(lower)}."
    )
    title = f"Paired differences from {base.label}"
    return Table(name="differences", title=title, note=note, columns=columns, rows=tuple(rows))


def _difference_cells(found: Difference, why: str, kind: Kind) -> tuple[Cell, ...]:
    change: Kind = "points" if kind == "percent" else kind
    why = why or found.undefined
    seeds = seeds_text(found.seeds)
    if why:
        return (seeds, Quantity(NAN, undefined=why), *("-" for _ in range(5)))
    low, high = (found.mean + sign * found.half_width for sign in (-1, 1))
    excludes = "-" if math.isnan(low) else "yes" if low > 0 or high < 0 else "no"
    ends = (Quantity(end, kind=change, undefined="one seed in common") for end in (low, high))
    return (seeds, Quantity(found.base, kind=kind), Quantity(found.mean, kind=change), *ends, excludes,
            Quantity(found.relative, kind="points", undefined="the mean it is relative to is 0"))  # fmt: skip


def equal_accuracy_table(groups: Sequence[Group], base: Group) -> Table:
    """Make one row per group: MACs needed for the accuracy of the whole network of ``base``, over common seeds."""
    rows = []
    for group in groups:
        if group is base:
            continue
        seeds = sorted(set(base.seeds) & set(group.seeds))
        why = mismatch(base, group) or ("" if seeds else "no seed in common")
        target, cost, needed = equal_cost(base, group, seeds) if not why else (NAN, NAN, NAN)
        unmet = why or ("not counted" if math.isnan(target) else f"it reaches {reached_at_most(group, seeds)} at most")
        rows.append((
            group.label, seeds_text(seeds), Quantity(target, undefined=why or "no number"),
            Quantity(cost, kind="whole", undefined=why or "not counted"),
            Quantity(needed, kind="whole", undefined=unmet), Quantity(needed / cost if cost else NAN, undefined=unmet),
        ))  # fmt: skip
    columns = ("group", "common seeds", "target accuracy, %", f"MACs of {base.label}", "MACs needed", "share, %")
    note = (
        f"The target is the accuracy of the whole network of '{base.label}' on all test samples. Operating points: "
        f"the whole network, budgets with thresholds chosen on validation samples, and the run's own exit policy; "
        f"between two points, samples are assigned to either at random."
    )
    return Table(name="equal_accuracy", title="Cost at equal accuracy", note=note, columns=columns, rows=tuple(rows))


def equal_cost(base: Group, group: Group, seeds: Sequence[int]) -> tuple[float, float, float]:
    """Return accuracy and MACs of the whole network of ``base``, and the MACs with which ``group`` reaches them."""
    whole = [operating_points(run)[-1] for run in base.runs if run.seed in seeds]
    target, cost = mean([point.accuracy for point in whole]), mean([point.cost for point in whole])
    return target, cost, cost_at(_points(group, seeds), target)


def _points(group: Group, seeds: Sequence[int]) -> list[Point]:
    return mean_points([operating_points(run) for run in group.runs if run.seed in seeds])


def reached_at_most(group: Group, seeds: Sequence[int]) -> str:
    """Return the highest accuracy of a group's operating points as text."""
    return f"{100 * max((p.accuracy for p in _points(group, seeds)), default=NAN):.1f} %"


def summary_table(group: Group) -> Table:
    """Make a table of every scalar of a group's runs."""
    results = group.results
    rows: list[tuple[Cell, ...]] = [
        (heading(metric), metric_over_seeds(results, name))
        for name, metric in shown_metrics(results).items()
    ]
    rows += [
        ("MACs per prediction, whole network", macs_over_seeds(results)),
        ("parameters", over_seeds(group.by_seed(lambda r: r.parameters), kind="whole")),
        ("training, s", over_seeds(group.by_seed(lambda r: r.train_seconds), kind="decimal")),
        ("optimizer steps", over_seeds(group.by_seed(lambda r: r.steps), kind="whole")),
    ]
    names = sorted({name for result in results for name in result.state_bytes})
    rows += [
        (f"state of {name}, bytes", over_seeds({r.seed: r.state_bytes.get(name, NAN) for r in results}, kind="whole"))
        for name in names
    ]
    return Table(name="summary", title="All metrics", columns=("metric", "value"), rows=tuple(rows))


def matrix_table(runs: Sequence[Run]) -> Table:
    """Make the accuracy matrix, averaged over seeds, with each row's average over the experiences so far."""
    matrices = [run.accuracy_matrix for run in runs]
    rows: list[tuple[Cell, ...]] = []
    for i in range(len(matrices[0])):
        cells = [seed_mean([m[i][j] for m in matrices]) for j in range(len(matrices[0][0]))]
        seen = seed_mean([average_seen_accuracy(m[: i + 1]).value for m in matrices])
        rows.append((f"after {i}", *cells, seen))
    columns = ("", *(f"on {j}, %" for j in range(len(matrices[0][0]))), "so far, %")
    note = spread_note(len(runs))
    return Table(name="accuracy_matrix", title="Accuracy matrix", note=note, columns=columns, rows=tuple(rows))
