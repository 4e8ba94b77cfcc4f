"""Text that ``clframe run`` prints: accuracy matrix, exits, summary, and the table over seeds."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from clframe.errors import ClframeError
from clframe.exits.failure import LABELS, mean_over_exits, undefined_reason
from clframe.metrics.continual import average_seen_accuracy
from clframe.metrics.registry import all_metrics
from clframe.report.exit_tables import budgets_table, exits_table
from clframe.report.expert_costs import expert_costs
from clframe.report.language_tables import perplexity_tables
from clframe.report.shown_metrics import metric_over_seeds, shown_metrics, trained_once
from clframe.results import Result, aggregate
from clframe.run_folder import RunFolder
from clframe.tables import WIDTH, Cell, Quantity, Table, to_text

_CELL = {"percent": 5, "whole": 3}
"""Characters of 100 % in each format."""


def accuracy_text(result: Result, *, task_aware: bool = False) -> str:
    """Render the accuracy matrix in percent, with each row's average over the experiences seen by then.

    ``-`` marks what was not evaluated. Where one decimal does not fit, whole percents are shown, and where these do
    not fit either, every n-th experience and the last; averages are over all experiences seen.
    """
    matrix = result.accuracy_matrix_task_aware if task_aware else result.accuracy_matrix
    count = len(matrix[0])
    decimal, step = next(
        (decimal, step)
        for step in range(1, count + 1)
        for decimal in (True, False)
        if _matrix_width(count, step, cell=_CELL["percent" if decimal else "whole"]) <= WIDTH
    )
    columns = _every(count, step)
    rows: list[tuple[Cell, ...]] = []
    for i in _every(len(matrix), step):
        seen = Quantity(average_seen_accuracy(matrix[: i + 1]).value)
        rows.append((str(i), *(_percent(matrix[i][j], decimal=decimal) for j in columns), seen))
    kind = "task-aware" if task_aware else "task-agnostic"
    note = "Rows: after experience i; columns: on test experience j."
    if step > 1:
        note += f" One in {step} of {count} experiences and the last; results.json has all."
    return to_text(
        Table(name="accuracy_matrix", title=f"Accuracy in %, {kind}", note=note,
              columns=("after", *map(str, columns), "so far"), rows=tuple(rows)), gap=1,
    )  # fmt: skip


def result_text(result: Result) -> str:
    """Render a finished run: accuracy matrix, exits, summary; without a matrix where it has one experience."""
    matrix = accuracy_text(result) if not result.nll_matrix else "\n\n".join(map(to_text, perplexity_tables([result])))
    matrix = "" if trained_once(result) else matrix
    return "\n\n".join(filter(None, (matrix, exits_text(result), summary_text(result))))


def exits_text(result: Result) -> str:
    """Render every exit and every budget after the last experience; empty for a network with one exit.

    Calibration and failure prediction by exit are left to the report and ``clframe analyze exits``: their columns
    are too many for a terminal.
    """
    if len(result.exit_names) < 2:
        return ""
    return "\n\n".join(to_text(table) for table in (exits_table([result]), budgets_table([result])))


def summary_text(result: Result) -> str:
    """Render the metrics, see :func:`~.tables.shown_metrics`, what the run cost and its folder, one item a line."""
    rows = [
        ("run", f"{result.name}, seed {result.seed}"),
        ("strategy", f"{result.strategy} on {result.benchmark}, {result.backbone}"),
        *(("diverged", line) for line in result.diverged),
        *((("skipped updates", skipped_text(result)),) if any(result.skipped_updates) else ()),
        *((metric.label, _metric(result, name)) for name, metric in shown_metrics([result]).items()),
        *((f"mean {LABELS[name]} of the exits", _mean_over_exits(result, name)) for name in _exit_means(result)),
        ("parameters", f"{result.parameters:,}"),
        *_macs_rows(result),
        *(("hint", text) for text in (_heads_hint(result), _experts_hint(result)) if text),
        ("training", f"{result.train_seconds:.1f} s, {_steps(result)}"),
        ("state", ", ".join(f"{name} {format_bytes(size)}" for name, size in result.state_bytes.items()) or "none"),
    ]  # fmt: skip
    indent = 2 + max(len(name) for name, _ in rows)
    lines = [line for name, text in rows for line in _item(name, text, indent)]
    return "\n".join([*lines, f"{'run folder':<{indent}}{result.run_folder}"])  # a path is not wrapped, to be copied


def skipped_text(result: Result) -> str:
    """Render the updates that were skipped, by experience.

    >>> from types import SimpleNamespace
    >>> skipped_text(SimpleNamespace(skipped_updates=(0, 3, 1)))
    '4, as losses or gradients were not finite (3 in experience 2, 1 in experience 3)'
    """
    counts = [f"{count} in experience {i}" for i, count in enumerate(result.skipped_updates, 1) if count]
    return f"{sum(result.skipped_updates)}, as losses or gradients were not finite ({', '.join(counts)})"


def _steps(result: Result) -> str:
    """Optimizer steps, and the batches where an update took several of them or was skipped."""
    batches = "" if result.batches in (None, result.steps) else f" on {result.batches:,} batches"
    return f"{result.steps:,} optimizer steps{batches}"


def _macs_rows(result: Result) -> list[tuple[str, str]]:
    """Costs of a prediction: of the whole network and, where exits or experts decide, the mean over the test samples.

    Experts are compared with the dense network, which has no routers: they may cost more than the experts save.
    """
    whole = "not counted" if result.macs is None else f"{result.macs:,}"
    experts = expert_costs(Path(result.run_folder))
    if experts is not None:
        mean = f"{experts.mean:,.0f} on average{experts.counted}, {experts.share}"
        return [("MACs per prediction", mean), ("MACs of the dense network", f"{experts.dense:,.0f}")]
    exits = RunFolder(Path(result.run_folder)).mean_prediction_macs()
    if exits is None or result.macs is None:
        return [("MACs per prediction", whole)]
    share = f"{100 * exits / result.macs:.1f} % of the whole network"
    return [("MACs per prediction", f"{exits:,.0f} on average, {share}"), ("MACs of the whole network", whole)]


def _experts_hint(result: Result) -> str:
    """Advise where predictions cost more than those of the dense network without experts; empty elsewhere."""
    costs = expert_costs(Path(result.run_folder))
    if costs is None or costs.mean <= costs.dense:
        return ""
    return (
        f"the routers cost more than the experts save, predictions take {costs.share}; use narrower routers "
        f"(components.moe.router_width), a lower setting of the gate (components.moe.tau or k), or no experts"
    )


def _heads_hint(result: Result) -> str:
    """Advise where predictions cost more than those of the backbone without exits; empty elsewhere."""
    mean = RunFolder(Path(result.run_folder)).mean_prediction_macs()
    if mean is None or len(result.exit_names) < 2 or not result.exits or mean < result.exits[-1].backbone_macs:
        return ""
    share = 100 * mean / result.exits[-1].backbone_macs
    return (
        f"the heads cost more than early exit saves, predictions take {share:.1f} % of the backbone's MACs without "
        f"exits; use fewer exits (components.exits.at), smaller heads (components.exits.head) or a lower budget"
    )


def seeds_table(results: Sequence[Result]) -> str:
    """Render mean ± sample standard deviation over seeds, one row per strategy (benchmark, backbone).

    Raises:
        ClframeError: No results, or a seed that is given twice.
    """
    if not results:
        raise ClframeError("aggregate: no results; give at least one")
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.strategy, result.benchmark, result.backbone), []).append(result)
    by_token = all(result.nll_matrix for result in results)
    columns = {name: metric for name, metric in all_metrics().items() if metric.column}
    shown = {name: metric.column for name, metric in columns.items() if metric.per_token == by_token}
    rows: list[tuple[Cell, ...]] = []
    for label, group in zip(_labels(list(groups)), groups.values(), strict=True):
        aggregate(group)  # refuses a seed that is given twice
        cells = [metric_over_seeds(group, name) for name in shown]
        # Undefined metrics are "-" without the reason: the summary of each run has it.
        plain = [Quantity(cell.value, deviation=cell.deviation, kind=cell.kind) for cell in cells]
        rows.append((label, Quantity(len(group), kind="whole"), *plain))
    return to_text(Table(
        name="seeds", title=f"Mean ± sample standard deviation over seeds{_unit(results)}",
        columns=("", "seeds", *shown.values()), rows=tuple(rows),
    ))  # fmt: skip


def _unit(results: Sequence[Result]) -> str:
    return "; forgetting and backward transfer in nats per token" if results[0].nll_matrix else ", in %"


def _matrix_width(count: int, step: int, *, cell: int) -> int:
    """Characters of a line of the matrix: a blank and a cell per column, as wide as the largest number above it."""
    return len("after") + len(_every(count, step)) * (1 + max(cell, len(str(count - 1)))) + 1 + len("so far")


def _every(count: int, step: int) -> list[int]:
    """Return every ``step``-th number below ``count``, and the last."""
    return sorted({*range(0, count, step), count - 1})


def _percent(share: float, *, decimal: bool) -> Quantity:
    return Quantity(share) if decimal else Quantity(100 * share, kind="whole")


def _metric(result: Result, name: str) -> str:
    found = metric_over_seeds([result], name)
    return f"{found} %" if found.kind == "percent" and not math.isnan(found.value) else str(found)


def _exit_means(result: Result) -> list[str]:
    """Return the metrics per exit whose mean is part of the summary: none for one exit or for an older run."""
    recorded = result.exits[-1].metrics if result.exits and len(result.exit_names) > 1 else {}
    return [name for name in ("eefp", "aurc") if name in recorded]


def _mean_over_exits(result: Result, name: str) -> str:
    metrics = result.exits[-1].metrics
    found = mean_over_exits(metrics[name])  # EEFP is undefined at the last exit: its mean is over the others
    text = str(Quantity(found, undefined=undefined_reason(name, metrics, exit=0)))
    return text if math.isnan(found) else f"{text} %"


def _labels(groups: Sequence[tuple[str, str, str]]) -> list[str]:
    """Return each group's strategy, with the benchmark and the backbone where these differ between groups."""
    differing = [0, *(k for k in (1, 2) if len({group[k] for group in groups}) > 1)]
    return [", ".join(group[k] for k in differing) for group in groups]


def _item(name: str, text: str, indent: int) -> Iterable[str]:
    first, *more = textwrap.wrap(text, WIDTH - indent) or [""]
    return [f"{name:<{indent}}{first}", *(" " * indent + line for line in more)]


def format_bytes(size: int) -> str:
    """Format a size in powers of 1024.

    >>> format_bytes(512), format_bytes(1536), format_bytes(3 * 1024**3)
    ('512 B', '1.5 KiB', '3.0 GiB')
    """
    if size < 1024:
        return f"{size} B"
    power = min(int(math.log2(size)) // 10, 4)
    return f"{size / 1024**power:.1f} {('KiB', 'MiB', 'GiB', 'TiB')[power - 1]}"
