"""Tables of a report: metrics, differences between groups, exits and budgets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from clframe.exits.curves import wilson_interval
from clframe.exits.diagnostics import ExitMetric, ExitRecord, all_exit_metrics
from clframe.exits.failure import LABELS, undefined_reason
from clframe.functional.language import perplexity
from clframe.metrics.continual import average_seen_accuracy
from clframe.metrics.registry import OWN_METRICS, TOKEN_METRICS, Kind, Metric, all_metrics
from clframe.metrics.statistics import NAN, Difference, Point, cost_at, deviation, mean, paired
from clframe.report.comparison import Group, mean_points, mismatch, operating_points
from clframe.report.loading import Run
from clframe.results import Result
from clframe.tables import Cell, Quantity, Table, over_seeds

NEVER: Final = "never stops early"
"""Row of the whole network among budgets."""
ACCURACY: Final = "final_average_accuracy"
"""Metric of gains; with one experience the accuracy."""


def shown_metrics(results: Sequence[Result]) -> dict[str, Metric]:
    """Return the metrics to show for runs, by name.

    For runs with one experience, where all averages over experiences are equal, and forgetting and transfer undefined,
    these are the accuracy and the metrics of other packages. For language models they are perplexity and nats per token
    instead of accuracies.
    """
    every = all_metrics()
    if results and all(result.nll_matrix for result in results):
        text = {ACCURACY: replace(every[ACCURACY], label="next-token accuracy", compared=False)}
        every = {**TOKEN_METRICS, **text, **_of_others(every)}
    else:
        every = {name: metric for name, metric in every.items() if not metric.per_token}
    if not results or not all(map(trained_once, results)):
        return every
    first = "final_perplexity" if "final_perplexity" in every else ACCURACY
    label = "perplexity" if first in TOKEN_METRICS else "accuracy"
    return {first: replace(every[first], label=label), **_of_others(every)}


def _of_others(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    return {name: m for name, m in metrics.items() if name not in OWN_METRICS and name not in TOKEN_METRICS}


def _compared(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Name and heading of the metrics that groups are compared by."""
    metrics = shown_metrics([result for group in groups for result in group.results])
    return [
        (name, f"{metric.label}, %" if metric.kind == "percent" else metric.label)
        for name, metric in metrics.items() if metric.compared
    ]  # fmt: skip


def metric_over_seeds(results: Sequence[Result], name: str) -> Quantity:
    """Return a metric over the seeds of a group, with the reason of the first run in which it is undefined."""
    scores = {result.seed: result.score(name) for result in results}
    reason = next((score.undefined for score in scores.values() if score.undefined), "")
    kind = all_metrics()[name].kind if name in all_metrics() else "percent"
    return over_seeds({seed: score.value for seed, score in scores.items()}, kind=kind, reason=reason)


def macs_over_seeds(results: Sequence[Result]) -> Quantity:
    """Return the MACs of one prediction by the whole network."""
    values = {result.seed: NAN if result.macs is None else result.macs for result in results}
    return over_seeds(values, kind="whole", reason="not counted")


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
    columns = ("group", "seeds", *(heading for _, heading in compared), "MACs per prediction", "state, bytes",
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
        for name, heading in _compared(groups):
            found = paired(base.metric(name), group.metric(name))
            kind = all_metrics()[name].kind
            rows.append((group.label, heading.removesuffix(", %"), *_difference_cells(found, why, kind)))
    shares = all(heading.endswith(", %") for _, heading in _compared(groups))
    percent, points = (", %", ", points") if shares else ("", "")
    columns = ("group", "metric", "seeds", f"{base.label}{percent}", f"difference{points}", f"95 % CI from{points}",
               f"to{points}", "excludes 0", "relative change, %")  # fmt: skip
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
    columns = ("group", "seeds", "target accuracy, %", f"MACs of {base.label}", "MACs needed", "share, %")
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
        (f"{metric.label}, %" if metric.kind == "percent" else metric.label, metric_over_seeds(results, name))
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
        cells = [_seed_mean([m[i][j] for m in matrices]) for j in range(len(matrices[0][0]))]
        seen = _seed_mean([average_seen_accuracy(m[: i + 1]).value for m in matrices])
        rows.append((f"after {i}", *cells, seen))
    columns = ("", *(f"on {j}, %" for j in range(len(matrices[0][0]))), "so far, %")
    note = _over(len(runs))
    return Table(name="accuracy_matrix", title="Accuracy matrix", note=note, columns=columns, rows=tuple(rows))


def perplexity_table(results: Sequence[Result]) -> Table:
    """Make the perplexity matrix of language models, averaged over seeds: after domain i (rows), on domain j.

    ``so far`` is the exponential of the mean nats per token over the domains learned by then.
    """
    first = results[0]
    domains = _domains(first)
    rows: list[tuple[Cell, ...]] = []
    for i, row in enumerate(first.nll_matrix):
        cells = [_decimal_mean([r.perplexity_matrix[i][j] for r in results]) for j in range(len(row))]
        seen = [perplexity(mean(list(r.nll_matrix[i][: i + 1]))) for r in results]
        rows.append((f"after {domains[i]}", *cells, _decimal_mean(seen)))
    title = "Perplexity: after each domain (rows), on each domain (columns)"
    return Table(
        name="perplexity_matrix", title=title, note=_over(len(results)), columns=("", *domains, "so far"),
        rows=tuple(rows),
    )  # fmt: skip


def perplexity_tables(results: Sequence[Result]) -> list[Table]:
    """List the perplexity matrix and, with several exits, those of each exit after the last domain.

    Empty for results of classifiers.
    """
    first = results[0]
    if not all(result.nll_matrix for result in results):
        return []
    if len(first.exit_names) < 2:
        return [perplexity_table(results)]
    domains = _domains(first)
    rows: list[tuple[Cell, ...]] = []
    for k, exit in enumerate(first.exit_names):
        final = [result.exits[-1].nll_KE[k] for result in results]
        cells = [_decimal_mean([perplexity(nll_E[j]) for nll_E in final]) for j in range(len(domains))]
        lost = over_seeds({r.seed: r.exit_forgetting_nats[k] for r in results}, kind="fine", reason="one domain")
        rows.append((exit, *cells, lost))
    each = Table(
        name="exit_perplexity", title="Perplexity of each exit after the last domain", note=_over(len(results)),
        columns=("exit", *domains, "forgetting, nats per token"), rows=tuple(rows),
    )  # fmt: skip
    return [perplexity_table(results), each]


def _domains(result: Result) -> list[str]:
    """Name of each experience of a language model: its domains."""
    return [", ".join(result.class_label(c) for c in brought) for brought in result.experiences]


def _decimal_mean(values: Sequence[float]) -> Quantity:
    return over_seeds(dict(enumerate(values)), kind="decimal", reason="not evaluated")


def trained_once(result: Result) -> bool:
    """Whether a run has one experience: training on independent samples, without anything to forget."""
    return len(result.accuracy_matrix) == 1 and len(result.accuracy_matrix[0]) == 1


def exits_table(results: Sequence[Result]) -> Table:
    """Make one row per exit: its cost, metrics, forgetting and similarity after the last experience.

    Metrics of calibration and failure prediction are in :func:`failure_table`.
    """
    last, names = [result.exits[-1] for result in results], results[0].exit_names
    metrics = {name: m for name, m in _recorded(last).items() if name not in LABELS}
    once = all(map(trained_once, results))
    rows: list[tuple[Cell, ...]] = []
    for k, exit in enumerate(names):
        lost = {r.seed: r.exit_forgetting[k] if r.exit_forgetting else NAN for r in results}
        rows.append((
            exit, Quantity(mean([record.macs_K[k] for record in last]), kind="whole"),
            _seed_mean([record.macs_K[k] / record.backbone_macs for record in last]),
            *(_seed_mean([_value(record, name, k) for record in last], "undefined for this exit", metric.kind)
              for name, metric in metrics.items()),
            *(() if once else (
                over_seeds(lost, reason="needs two experiences"),
                _seed_mean([record.similarity_K[k] if record.similarity_K else NAN for record in last],
                           "not measured", "fine"),
            )),
        ))  # fmt: skip
    continual = () if once else ("forgetting, %", "CKA")
    columns = ("exit", "MACs up to it", "share of the backbone, %", *_headings(metrics), *continual)
    similarity = "" if once else "CKA: similarity of the exit's tap to itself after the first experience. "
    note = f"{_static_note(last)} {similarity}{_over(len(results))}".strip()
    return Table(name="exits", title="Each exit after the last experience", note=note, columns=columns,
                 rows=tuple(rows))  # fmt: skip


def failure_table(results: Sequence[Result]) -> Table | None:
    """Make one row per exit: calibration and failure prediction after the last experience.

    None for runs of older versions, which did not record any.
    """
    last, names = [result.exits[-1] for result in results], results[0].exit_names
    metrics = {name: m for name, m in _recorded(last).items() if name in LABELS}
    if not metrics:
        return None
    rows: list[tuple[Cell, ...]] = []
    for k, exit in enumerate(names):
        cells = []
        for name, metric in metrics.items():
            values = [_value(record, name, k) for record in last]
            without = next((record for record, value in zip(last, values, strict=True) if math.isnan(value)), None)
            recorded = without is not None and name in without.metrics
            reason = undefined_reason(name, without.metrics, exit=k) if without and recorded else "not recorded"
            cells.append(_seed_mean(values, reason, metric.kind))
        rows.append((exit, *cells))
    higher = [metric.label for metric in metrics.values() if metric.better == "higher"]
    note = (
        f"Confidence is the largest probability; docs/analysis.md defines the metrics. Higher is better for "
        f"{', '.join(higher)}, lower for the others. {_over(len(results))}"
    ).strip()
    return Table(name="exit_failure_prediction", title="Calibration and failure prediction by exit", note=note,
                 columns=("exit", *_headings(metrics)), rows=tuple(rows))  # fmt: skip


def _recorded(last: Sequence[ExitRecord]) -> dict[str, ExitMetric]:
    """Return the metrics per exit that any of the records has."""
    return {name: m for name, m in all_exit_metrics().items() if any(name in record.metrics for record in last)}


def _headings(metrics: Mapping[str, ExitMetric]) -> list[str]:
    return [f"{metric.label}, %" if metric.kind == "percent" else metric.label for metric in metrics.values()]


def _value(record: ExitRecord, name: str, k: int) -> float:
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


def budgets_table(results: Sequence[Result]) -> Table:
    """Make one row per budget: realized cost, accuracy, and exit usage; and one for the whole network."""
    last, names = [result.exits[-1] for result in results], results[0].exit_names
    single = len(last) == 1  # over several seeds the deviation shows the spread
    columns = ("budget", "realized cost, %", "accuracy, %", *(("95 % CI, %",) if single else ()),
               *(f"usage of {name}, %" for name in names))  # fmt: skip
    note = "Thresholds are chosen on validation samples; cost and accuracy are of test samples. Costs are shares of " \
           "the bare backbone's MACs."  # fmt: skip
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
                point.name.replace("%", " %"), _seed_mean([found.cost for found in at], reason),
                _seed_mean([found.accuracy for found in at], reason),
                *((_interval(at[0].accuracy_low, at[0].accuracy_high),) if single else ()),
                *(_seed_mean([record.share_PK[p][k] for record in last], reason) for k in range(len(names))),
            ))  # fmt: skip
    whole = [record.macs_K[-1] / record.backbone_macs for record in last]
    usage = (Quantity(float(k == len(names) - 1)) for k in range(len(names)))
    accuracies, samples = [record.accuracy_K[-1] for record in last], sum(results[0].test_samples)
    interval = (_interval(*wilson_interval(round(accuracies[0] * samples), samples)),) if single and samples else ()
    rows.append((NEVER, _seed_mean(whole), _seed_mean(accuracies), *interval, *usage))
    counts = sorted({record.points.validation_samples for record in last} - {0})
    if counts:
        note += f" Validation samples: {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))}."
    if any(record.points.rule == "one_standard_error" for record in last):
        note += " Thresholds: the highest within one standard error of the best validation accuracy."
    simulated = next((record.simulated for record in last if record.simulated), "")
    if simulated:
        note += f" Simulated: {simulated}, so dynamic inference cannot skip computation."
    note = f"{note} {_over(len(results))}".strip()
    return Table(name="budgets", title="Accuracy within a budget", note=note, columns=columns, rows=tuple(rows))


def _interval(low: float, high: float) -> Cell:
    return Quantity(NAN, undefined="not recorded") if math.isnan(low) else f"{100 * low:.1f} to {100 * high:.1f}"


def _seed_mean(values: Sequence[float], reason: str = "", kind: Kind = "percent") -> Quantity:
    return Quantity(mean(values), deviation=deviation(values), kind=kind, undefined=reason or "not evaluated")


def seeds_text(seeds: Sequence[int]) -> str:
    """Format seeds as the command line accepts them.

    >>> seeds_text([0, 1, 2]), seeds_text([0, 3]), seeds_text([])
    ('0..2', '0, 3', 'none')
    """
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}..{seeds[-1]}"
    return ", ".join(map(str, seeds)) or "none"


def _over(seeds: int) -> str:
    return f"Mean ± sample standard deviation over {seeds} seeds." if seeds > 1 else ""
