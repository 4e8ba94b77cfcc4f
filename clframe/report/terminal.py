"""Tables for the terminal: plain text, never wider than :data:`WIDTH` columns but for paths."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence

from clframe.metrics.continual import average_seen_accuracy
from clframe.results import Result, aggregate

WIDTH = 100
"""Columns of a terminal that a table may take."""

SEEDS_COLUMNS = (
    ("final", "final_average_accuracy"),
    ("task-aware", "final_average_accuracy_task_aware"),
    ("incremental", "average_incremental_accuracy"),
    ("forgetting", "forgetting"),
    ("backward", "backward_transfer"),
)
"""Heading and metric of each column of :func:`seeds_table`."""


def accuracy_table(result: Result, *, task_aware: bool = False) -> str:
    """The accuracy matrix in percent, with each row's average over the experiences seen by then.

    ``-`` marks what was not evaluated. Where one decimal does not fit, whole percents are shown, and where
    these do not fit either, every n-th experience and the last; averages are over all experiences seen.
    """
    matrix = result.accuracy_matrix_task_aware if task_aware else result.accuracy_matrix
    kind = "task-aware" if task_aware else "task-agnostic"
    decimals, every = next(
        (decimals, every)
        for every in range(1, len(matrix[0]) + 1)
        for decimals in (1, 0)
        if len(_heading(_every(len(matrix[0]), every), decimals)) <= WIDTH
    )
    columns = _every(len(matrix[0]), every)
    heading = _heading(columns, decimals)
    lines = [f"accuracy in %, {kind} (rows: after experience i; columns: on test experience j)"]
    if every > 1:
        lines.append(f"(one in {every} of {len(matrix[0])} experiences and the last; results.json has all)")
    lines += [heading, "-" * len(heading)]
    for i in _every(len(matrix), every):
        cells = "".join(f"{_percent(matrix[i][j], decimals):>{_cell(columns, decimals)}}" for j in columns)
        seen = _percent(average_seen_accuracy(matrix[: i + 1]).value, 1)
        lines.append(f"{i:<5} |{cells} | {seen:>5}")
    return "\n".join(lines)


def summary(result: Result) -> str:
    """The scalar metrics, what the run cost and where it is, one item a line."""
    rows = [
        ("run", f"{result.name}, seed {result.seed}"),
        ("strategy", f"{result.strategy} on {result.benchmark}, {result.backbone}"),
        *((name, _metric(result, field)) for name, field in (
            ("final average accuracy", "final_average_accuracy"),
            ("  task-aware", "final_average_accuracy_task_aware"),
            ("  weighted by samples", "final_weighted_accuracy"),
            ("average incremental accuracy", "average_incremental_accuracy"),
            ("learning accuracy", "learning_accuracy"),
            ("forgetting", "forgetting"),
            ("backward transfer", "backward_transfer"),
            ("forward transfer", "forward_transfer"),
        )),
        ("parameters", f"{result.parameters:,}"),
        ("MACs per sample", "not counted" if result.macs is None else f"{result.macs:,}"),
        ("training", f"{result.train_seconds:.1f} s, {result.steps:,} steps"),
        ("state", ", ".join(f"{name} {_bytes(size)}" for name, size in result.state_bytes.items()) or "none"),
    ]  # fmt: skip
    indent = 2 + max(len(name) for name, _ in rows)
    lines = [line for name, text in rows for line in _item(name, text, indent)]
    return "\n".join([*lines, f"{'run folder':<{indent}}{result.run_folder}"])  # a path stays in one piece


def exits_table(result: Result) -> str:
    """What each exit knows and costs at the end of a run, and what stopping early comes to; empty for one exit."""
    if len(result.exit_names) < 2:
        return ""
    record = result.exits[-1]
    diagnostics, width = record.diagnostics, max(5, *map(len, result.exit_names))
    lines = [
        "exits after the last experience, in % (cost: MACs of the bare backbone; unique: no other exit is right)",
        f"{'exit':<{width}} {'cost':>7} {'accuracy':>9} {'forgetting':>11} {'unique':>7}",
    ]
    for k, name in enumerate(result.exit_names):
        cells = (record.macs_K[k] / record.backbone_macs, diagnostics.accuracy_K[k], result.exit_forgetting[k],
                 diagnostics.unique_accuracy_K[k])  # fmt: skip
        cost, *rest = (_percent(cell, 1) for cell in cells)
        lines.append(f"{name:<{width}} {cost:>7} {rest[0]:>9} {rest[1]:>11} {rest[2]:>7}")
    rules = ", ".join(f"{rule} {_percent(accuracy, 1)}" for rule, accuracy in record.static.items())
    lines += textwrap.wrap(f"decisions of all exits: {rules}", WIDTH)
    if record.points.points is None:
        return "\n".join([*lines, f"stopping early: {record.points.undefined}; set benchmark.validation=0.1"])
    lines.append("stopping early, thresholds from validation data (budget: accuracy at the cost it came to)")
    for point in record.points.points:
        found = point.undefined or f"{_percent(point.accuracy, 1):>5} % at {_percent(point.cost, 1)} % of the cost"
        lines.append(f"  {point.name:>5}: {found}")
    return "\n".join(lines)


def seeds_table(results: Sequence[Result]) -> str:
    """Mean ± sample standard deviation over seeds in percent, one row per strategy (benchmark, backbone).

    Raises :class:`clframe.errors.ClframeError` for no results and for a seed that is there twice.
    """
    if not results:
        aggregate(results)  # raises, and says so
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.strategy, result.benchmark, result.backbone), []).append(result)
    labels = _labels(list(groups))
    rows = [["seeds", *(heading for heading, _ in SEEDS_COLUMNS)]]
    for group in groups.values():
        total = aggregate(group)
        cells = (_mean_deviation(total.mean[metric], total.deviation[metric]) for _, metric in SEEDS_COLUMNS)
        rows.append([str(len(group)), *cells])
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    texts = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    room = WIDTH - 2 - len(texts[0])
    left = min(room, max(len(label) for label in labels))
    lines = ["mean ± sample standard deviation over seeds, in %", f"{'':<{left}}  {texts[0]}"]
    for label, text in zip(labels, texts[1:], strict=True):
        *above, beside = textwrap.wrap(label, left) or [""]
        lines += [*above, f"{beside:<{left}}  {text}"]
    return "\n".join(lines)


def _heading(columns: Sequence[int], decimals: int) -> str:
    return "after |" + "".join(f"{j:>{_cell(columns, decimals)}}" for j in columns) + " |  seen"


def _cell(columns: Sequence[int], decimals: int) -> int:
    """Width of a cell: a blank, and room for "100" or "100.0" or the largest number of an experience."""
    return 1 + max(3 + decimals + (decimals > 0), len(str(columns[-1])))


def _every(count: int, step: int) -> list[int]:
    """Every ``step``-th number below ``count``, and the last."""
    return sorted({*range(0, count, step), count - 1})


def _percent(ratio: float, decimals: int) -> str:
    if math.isnan(ratio):
        return "-"
    return f"{round(100 * ratio, decimals) + 0.0:.{decimals}f}"  # + 0.0 turns a rounded -0.0 into 0.0


def _metric(result: Result, field: str) -> str:
    value = float(getattr(result, field))
    if math.isnan(value):
        return f"undefined: {result.undefined.get(field, 'no reason given')}"
    return f"{_percent(value, 1)} %"


def _mean_deviation(mean: float, deviation: float) -> str:
    if math.isnan(mean):
        return "-"
    return _percent(mean, 1) if math.isnan(deviation) else f"{_percent(mean, 1)} ± {_percent(deviation, 1)}"


def _labels(groups: Sequence[tuple[str, str, str]]) -> list[str]:
    """Each group's strategy, with the benchmark and the backbone where these differ between groups."""
    telling = [0, *(k for k in (1, 2) if len({group[k] for group in groups}) > 1)]
    return [", ".join(group[k] for k in telling) for group in groups]


def _item(name: str, text: str, indent: int) -> Iterable[str]:
    first, *more = textwrap.wrap(text, WIDTH - indent) or [""]
    return [f"{name:<{indent}}{first}", *(" " * indent + line for line in more)]


def _bytes(size: int) -> str:
    """A size for people, in powers of 1024.

    >>> _bytes(512), _bytes(1536), _bytes(3 * 1024**3)
    ('512 B', '1.5 KiB', '3.0 GiB')
    """
    if size < 1024:
        return f"{size} B"
    power = min(int(math.log2(size)) // 10, 4)
    return f"{size / 1024**power:.1f} {('KiB', 'MiB', 'GiB', 'TiB')[power - 1]}"
