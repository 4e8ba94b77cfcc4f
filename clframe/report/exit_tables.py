"""Tables of exits: costs and metrics, budgets, calibration, and over experiences decisions, unique accuracy and CKA."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

from clframe.exits.curves import wilson_interval
from clframe.exits.diagnostics import MOST_TOKENS, ExitMetric, ExitRecord, all_exit_metrics
from clframe.exits.failure import LABELS, undefined_reason
from clframe.metrics.statistics import NAN, mean
from clframe.report.shown_metrics import heading, seed_mean, spread_note, trained_once
from clframe.results import Result
from clframe.tables import Cell, Quantity, Table, over_seeds

NEVER: Final = "never stops early"
"""Row of the whole network among budgets."""


def exits_table(results: Sequence[Result]) -> Table:
    """Make one row per exit: its cost, metrics, forgetting and similarity after the last experience.

    Metrics of calibration and failure prediction are in :func:`failure_table`.
    """
    last, names = [result.exits[-1] for result in results], results[0].exit_names
    metrics = {name: m for name, m in _recorded_metrics(last).items() if name not in LABELS}
    once = all(map(trained_once, results))
    rows: list[tuple[Cell, ...]] = []
    for k, exit in enumerate(names):
        lost = {r.seed: r.exit_forgetting[k] if r.exit_forgetting else NAN for r in results}
        rows.append((
            exit, Quantity(mean([record.macs_K[k] for record in last]), kind="whole"),
            seed_mean([record.macs_K[k] / record.backbone_macs for record in last]),
            *(seed_mean([_metric_at(record, name, k) for record in last], "nothing to count at this exit", metric.kind)
              for name, metric in metrics.items()),
            *(() if once else (
                over_seeds(lost, reason="needs two experiences"),
                seed_mean([record.similarity_K[k] if record.similarity_K else NAN for record in last],
                           "not measured", "fine"),
            )),
        ))  # fmt: skip
    continual = () if once else ("forgetting, %", "CKA")
    columns = ("exit", "MACs up to it", "share of the backbone, %", *map(heading, metrics.values()), *continual)
    similarity = "" if once else "CKA: similarity of the exit's tap to itself after the first experience. "
    note = f"{_static_note(last)} {similarity}{_token_note(results[0])}{spread_note(len(results))}".strip()
    return Table(name="exits", title="Each exit after the last experience", note=note, columns=columns,
                 rows=tuple(rows))  # fmt: skip


def failure_table(results: Sequence[Result]) -> Table | None:
    """Make one row per exit: calibration and failure prediction after the last experience.

    None for runs of older versions, which did not record any.
    """
    last, names = [result.exits[-1] for result in results], results[0].exit_names
    metrics = {name: m for name, m in _recorded_metrics(last).items() if name in LABELS}
    if not metrics:
        return None
    rows: list[tuple[Cell, ...]] = []
    for k, exit in enumerate(names):
        cells = []
        for name, metric in metrics.items():
            values = [_metric_at(record, name, k) for record in last]
            without = next((record for record, value in zip(last, values, strict=True) if math.isnan(value)), None)
            recorded = without is not None and name in without.metrics
            reason = undefined_reason(name, without.metrics, exit=k) if without and recorded else "not recorded"
            cells.append(seed_mean(values, reason, metric.kind))
        rows.append((exit, *cells))
    higher = [metric.label for metric in metrics.values() if metric.better == "higher"]
    note = (
        f"Confidence is the largest probability; docs/analysis.md defines the metrics. Higher is better for "
        f"{', '.join(higher)}, lower for the others. {spread_note(len(results))}"
    ).strip()
    return Table(name="exit_failure_prediction", title="Calibration and failure prediction by exit", note=note,
                 columns=("exit", *map(heading, metrics.values())), rows=tuple(rows))  # fmt: skip


def budgets_table(results: Sequence[Result]) -> Table:
    """Make one row per budget: realized cost, accuracy, and exit usage; and one for the whole network."""
    last, names = [result.exits[-1] for result in results], results[0].exit_names
    single = len(last) == 1  # over several seeds the deviation shows the spread
    columns = ("budget", "realized cost, %", "accuracy, %", *(("95 % CI, %",) if single else ()),
               *(f"usage of {name}, %" for name in names))  # fmt: skip
    note = "Thresholds are chosen on validation samples; cost and accuracy are of test samples. Costs are shares of " \
           f"the bare backbone's MACs. {_token_note(results[0])}".rstrip()  # fmt: skip
    rows: list[tuple[Cell, ...]] = []
    missing = next((record.points.undefined for record in last if record.points.points is None), None)
    if missing is not None:
        reason = f"{missing}; set benchmark.validation=0.1"
        rows.append(("any", *(Quantity(NAN, undefined=reason) for _ in columns[1:])))
    else:
        for p, point in enumerate(last[0].points.points or ()):
            at = [(record.points.points or ())[p] for record in last]
            reason = next((found.undefined for found in at if found.undefined), "")
            rows.append((
                point.name.replace("%", " %"), seed_mean([found.cost for found in at], reason),
                seed_mean([found.accuracy for found in at], reason),
                *((_interval(at[0].accuracy_low, at[0].accuracy_high),) if single else ()),
                *(seed_mean([record.share_PK[p][k] for record in last], reason) for k in range(len(names))),
            ))  # fmt: skip
    whole = [record.macs_K[-1] / record.backbone_macs for record in last]
    usage = (Quantity(float(k == len(names) - 1)) for k in range(len(names)))
    accuracies, samples = [record.accuracy_K[-1] for record in last], _compared_samples(results[0])
    interval = (_interval(*wilson_interval(round(accuracies[0] * samples), samples)),) if single and samples else ()
    rows.append((NEVER, seed_mean(whole), seed_mean(accuracies), *interval, *usage))
    counts = sorted({record.points.validation_samples for record in last} - {0})
    if counts:
        note += f" Validation samples: {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))}."
    if any(record.points.rule == "one_standard_error" for record in last):
        note += " Thresholds: the highest within one standard error of the best validation accuracy."
    simulated = next((record.simulated for record in last if record.simulated), "")
    if simulated:
        note += f" Simulated: {simulated}, so dynamic inference cannot skip computation."
    note = f"{note} {spread_note(len(results))}".strip()
    return Table(name="budgets", title="Accuracy within a budget", note=note, columns=columns, rows=tuple(rows))


def _recorded_metrics(last: Sequence[ExitRecord]) -> dict[str, ExitMetric]:
    """Return the metrics per exit that any of the records has."""
    return {name: m for name, m in all_exit_metrics().items() if any(name in record.metrics for record in last)}


def _metric_at(record: ExitRecord, name: str, k: int) -> float:
    """Return a metric of exit k; NaN where an older run has not computed it."""
    return record.metrics[name][k] if name in record.metrics else NAN


def _static_note(last: Sequence[ExitRecord]) -> str:
    """Return the accuracy of decisions that use every exit, and overthinking."""
    rules = [(f"{rule} exit" if rule == "last" else rule, [r.static.get(rule, NAN) for r in last])
             for rule in last[0].static]  # fmt: skip
    decisions = ", ".join(f"{rule} {100 * mean(values):.1f} %" for rule, values in rules)
    overthinking = mean([record.overthinking for record in last])
    extra = "" if math.isnan(overthinking) else f"; overthinking (oracle minus last exit) {100 * overthinking:.1f} %"
    return f"Decisions that use every exit: {decisions}{extra}."


def _compared_samples(result: Result) -> int:
    """Test samples on which exits were compared: of a language model the first tokens of each domain only."""
    return sum(min(count, MOST_TOKENS) if result.nll_matrix else count for count in result.test_samples)


def _token_note(result: Result) -> str:
    """Return which tokens of a language model these are, if not all; empty elsewhere."""
    if _compared_samples(result) == sum(result.test_samples):
        return ""
    return f"Accuracies are those of the first {MOST_TOKENS:,} test tokens of each domain, not of all tokens. "


def _interval(low: float, high: float) -> Cell:
    return Quantity(NAN, undefined="not recorded") if math.isnan(low) else f"{100 * low:.1f} to {100 * high:.1f}"


def decisions_table(results: Sequence[Result]) -> Table | None:
    """Make one row per experience: accuracy of decisions that use every exit, and overthinking.

    None for runs that did not record them.
    """
    rules = [rule for rule in results[0].exits[-1].static if all(rule in e.static for r in results for e in r.exits)]
    if not rules:
        return None
    names = {"last": "last exit", "confident": "most confident exit", "mean": "mean of probabilities", "vote": "vote"}
    columns = [(names.get(rule, rule), _static(rule)) for rule in rules]
    columns.append(("overthinking", lambda record: record.overthinking))
    note = "Oracle: share of samples that any exit classifies correctly. Overthinking: oracle minus last exit."
    return _by_experience("exit_decisions", "Decisions that use every exit", note, results, columns)


def _static(rule: str) -> Callable[[ExitRecord], float]:
    return lambda record: record.static[rule]


def unique_table(results: Sequence[Result]) -> Table | None:
    """Make one row per experience: the share of samples that each exit alone classifies correctly; None if missing."""
    if not all("unique_accuracy" in record.metrics for result in results for record in result.exits):
        return None
    columns = [(name, _metric("unique_accuracy", k)) for k, name in enumerate(results[0].exit_names)]
    note = "Share of the samples of all experiences so far that this exit classifies correctly and no other one does."
    return _by_experience("unique_accuracy", "Unique accuracy", note, results, columns)


def _metric(name: str, k: int) -> Callable[[ExitRecord], float]:
    return lambda record: record.metrics[name][k]


def similarity_table(results: Sequence[Result]) -> Table | None:
    """Make one row per experience: linear CKA of each exit's tap with itself after the first; None if missing."""
    if not all(record.similarity_K for result in results for record in result.exits):
        return None
    columns = [(name, _similarity(k)) for k, name in enumerate(results[0].exit_names)]
    note = "Unbiased linear CKA of each exit's tap with itself after the first experience, on its test samples."
    return _by_experience("cka", "Similarity of representations (CKA)", note, results, columns)


def _similarity(k: int) -> Callable[[ExitRecord], float]:
    return lambda record: record.similarity_K[k]


def _by_experience(
    name: str, title: str, note: str, results: Sequence[Result],
    columns: Sequence[tuple[str, Callable[[ExitRecord], float]]],
) -> Table:  # fmt: skip
    """Make a table with a row per experience, means over seeds; columns are headings and numbers of a record."""
    rows: list[tuple[Cell, ...]] = []
    for i in range(len(results[0].exits)):
        records = [result.exits[i] for result in results]
        cells = (seed_mean([value(record) for record in records], "not recorded") for _, value in columns)
        rows.append((f"after {i}", *cells))
    note = f"{note} {spread_note(len(results))}".strip()
    headings = ("", *(f"{name}, %" for name, _ in columns))
    return Table(name=name, title=title, note=note, columns=headings, rows=tuple(rows))
