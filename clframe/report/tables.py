"""What the tables of a report hold; ``table.py`` says how they are written."""

from __future__ import annotations

import math
from collections.abc import Sequence

from clframe.metrics.continual import average_seen_accuracy
from clframe.metrics.statistics import NAN, Difference, Point, cost_at, deviation, mean, paired
from clframe.report.comparison import Group, mean_points, mismatch, operating_points
from clframe.report.loading import Run
from clframe.tables import Cell, Quantity, Table, over_seeds

HEADLINES = (
    ("final accuracy, %", "final_average_accuracy"),
    ("incremental accuracy, %", "average_incremental_accuracy"),
    ("forgetting, %", "forgetting"),
)
"""Heading and metric of what groups are compared by."""

_SCALARS = (
    ("final average accuracy", "final_average_accuracy"),
    ("final average accuracy, task-aware", "final_average_accuracy_task_aware"),
    ("final accuracy over all samples", "final_weighted_accuracy"),
    ("average incremental accuracy", "average_incremental_accuracy"),
    ("learning accuracy", "learning_accuracy"),
    ("forgetting", "forgetting"),
    ("backward transfer", "backward_transfer"),
    ("forward transfer", "forward_transfer"),
)


def metric(group: Group, name: str) -> Quantity:
    """A scalar metric over the seeds of a group, with the run's own reason where there is none."""
    reasons = [result.undefined[name] for result in group.results if name in result.undefined]
    return over_seeds(group.metric(name), reason=reasons[0] if reasons else "")


def macs(group: Group) -> Quantity:
    """MACs of one prediction by the whole network."""
    return over_seeds(group.by_seed(lambda r: NAN if r.macs is None else r.macs), kind="whole", reason="not counted")


def groups_table(groups: Sequence[Group]) -> Table:
    """One row a group: means over its seeds."""
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (
            group.label, seeds_text(group.seeds), *(metric(group, name) for _, name in HEADLINES), macs(group),
            over_seeds(group.by_seed(lambda r: sum(r.state_bytes.values())), kind="whole"),
            over_seeds(group.by_seed(lambda r: r.train_seconds), kind="decimal"),
        )
        for group in groups
    )  # fmt: skip
    headings = [heading for heading, _ in HEADLINES]
    columns = ("group", "seeds", *headings, "MACs a prediction", "state, bytes", "training, s")
    note = "Mean ± sample standard deviation over seeds. MACs are of the whole network; FLOPs = 2 x MACs."
    return Table(name="groups", title="Runs by what differs in their configs", note=note, columns=columns, rows=rows)


def differences_table(groups: Sequence[Group]) -> Table:
    """Every group against the first, metric by metric."""
    base, rows = groups[0], []
    for group in groups[1:]:
        why = mismatch(base, group)
        for heading, name in HEADLINES:
            found = paired(base.metric(name), group.metric(name))
            rows.append((group.label, heading.removesuffix(", %"), *_difference_cells(found, why)))
    columns = ("group", "metric", "seeds", f"{base.label}, %", "difference, points", "95 % from, points", "to, points",
               "leaves out 0", "relative gain, %")  # fmt: skip
    note = (
        f"Each group minus '{base.label}', seed by seed, over common seeds; the 95 % confidence interval is "
        f"Student's. Relative gain is the difference over the mean of '{base.label}'. Less forgetting is better."
    )
    title = f"Paired differences from {base.label}"
    return Table(name="differences", title=title, note=note, columns=columns, rows=tuple(rows))


def _difference_cells(found: Difference, why: str) -> tuple[Cell, ...]:
    why = why or found.undefined
    seeds = seeds_text(found.seeds)
    if why:
        return (seeds, Quantity(NAN, undefined=why), *("-" for _ in range(5)))
    low, high = (found.mean + sign * found.half_width for sign in (-1, 1))
    sure = "-" if math.isnan(low) else "yes" if low > 0 or high < 0 else "no"
    ends = (Quantity(end, kind="points", undefined="one seed in common") for end in (low, high))
    return (seeds, Quantity(found.base), Quantity(found.mean, kind="points"), *ends, sure,
            Quantity(found.relative, kind="points", undefined="the mean it is relative to is 0"))  # fmt: skip


def equal_accuracy_table(groups: Sequence[Group]) -> Table:
    """What each group needs to reach the whole first network's accuracy, over their common seeds."""
    base, rows = groups[0], []
    for group in groups[1:]:
        seeds = sorted(set(base.seeds) & set(group.seeds))
        why = mismatch(base, group) or ("" if seeds else "no seed in common")
        target, cost, needed = _equal_cost(base, group, seeds) if not why else (NAN, NAN, NAN)
        unmet = why or (f"it reaches {_best(group, seeds)} at most" if not math.isnan(target) else "not counted")
        rows.append((
            group.label, seeds_text(seeds), Quantity(target, undefined=why or "no number"),
            Quantity(cost, kind="whole", undefined=why or "not counted"),
            Quantity(needed, kind="whole", undefined=unmet), Quantity(needed / cost if cost else NAN, undefined=unmet),
        ))  # fmt: skip
    columns = ("group", "seeds", "accuracy to reach, %", f"MACs of {base.label}", "MACs needed", "share, %")
    note = (
        f"The accuracy to reach is that of the whole network of '{base.label}' on all test samples. Operating points: "
        f"the whole network, stopping early with thresholds chosen on validation samples, and by its own policy; "
        f"between two points, samples are sent to either by lot."
    )
    return Table(name="equal_accuracy", title="Cost at equal accuracy", note=note, columns=columns, rows=tuple(rows))


def _equal_cost(base: Group, group: Group, seeds: Sequence[int]) -> tuple[float, float, float]:
    whole = [operating_points(run)[-1] for run in base.runs if run.seed in seeds]
    target, cost = mean([point.accuracy for point in whole]), mean([point.cost for point in whole])
    return target, cost, cost_at(_points(group, seeds), target)


def _points(group: Group, seeds: Sequence[int]) -> list[Point]:
    return mean_points([operating_points(run) for run in group.runs if run.seed in seeds])


def _best(group: Group, seeds: Sequence[int]) -> str:
    return f"{100 * max((p.accuracy for p in _points(group, seeds)), default=NAN):.1f} %"


def summary_table(group: Group) -> Table:
    """Every scalar of a group's runs."""
    rows: list[tuple[Cell, ...]] = [(f"{said}, %", metric(group, name)) for said, name in _SCALARS]
    rows += [
        ("MACs a prediction, whole network", macs(group)),
        ("parameters", over_seeds(group.by_seed(lambda r: r.parameters), kind="whole")),
        ("training, s", over_seeds(group.by_seed(lambda r: r.train_seconds), kind="decimal")),
        ("optimizer steps", over_seeds(group.by_seed(lambda r: r.steps), kind="whole")),
    ]
    results = group.results
    names = sorted({name for result in results for name in result.state_bytes})
    rows += [
        (f"state of {name}, bytes", over_seeds({r.seed: r.state_bytes.get(name, NAN) for r in results}, kind="whole"))
        for name in names
    ]
    return Table(name="summary", title="In numbers", columns=("what", "value"), rows=tuple(rows))


def matrix_table(runs: Sequence[Run]) -> Table:
    """The accuracy matrix, averaged over seeds, with each row's average over the experiences so far."""
    matrices = [run.accuracy_matrix for run in runs]
    rows: list[tuple[Cell, ...]] = []
    for i in range(len(matrices[0])):
        cells = [_cell([m[i][j] for m in matrices]) for j in range(len(matrices[0][0]))]
        seen = _cell([average_seen_accuracy(m[: i + 1]).value for m in matrices])
        rows.append((f"after {i}", *cells, seen))
    columns = ("", *(f"on {j}, %" for j in range(len(matrices[0][0]))), "so far, %")
    return Table(name="accuracy_matrix", title="Accuracy matrix", note=_over(runs), columns=columns, rows=tuple(rows))


def exits_table(group: Group) -> Table:
    """What each exit costs, knows and forgets at the end."""
    results, names = group.results, group.results[0].exit_names
    rows = []
    for k, name in enumerate(names):
        last = [result.exits[-1] for result in results]
        lost = {r.seed: r.exit_forgetting[k] if r.exit_forgetting else NAN for r in results}
        rows.append((
            name, Quantity(mean([record.macs_K[k] for record in last]), kind="whole"),
            _cell([record.macs_K[k] / record.backbone_macs for record in last]),
            _cell([record.diagnostics.accuracy_K[k] for record in last]),
            over_seeds(lost, reason="needs two experiences"),
            _cell([record.diagnostics.unique_accuracy_K[k] for record in last]),
        ))  # fmt: skip
    columns = ("exit", "MACs up to it", "share of the backbone, %", "accuracy, %", "forgetting, %",
               "only this one right, %")  # fmt: skip
    title, note = "Each exit alone, at the end", _over(group.runs)
    return Table(name="exits", title=title, note=note, columns=columns, rows=tuple(rows))


def points_table(group: Group) -> Table:
    """Accuracy at 25, 50, 75 and 100 % of the cost and at most, and who answers there."""
    last, names = [result.exits[-1] for result in group.results], group.results[0].exit_names
    columns = ("budget", "cost it came to, %", "accuracy, %", *(f"answered by {name}, %" for name in names))
    title, note = (
        "Stopping early",
        "Thresholds are chosen on validation samples; cost and accuracy are on test samples.",
    )
    missing = next((record.points.undefined for record in last if record.points.points is None), None)
    if missing is not None:
        rows: list[tuple[Cell, ...]] = [
            ("any", *(Quantity(NAN, undefined=f"{missing}; set benchmark.validation=0.1") for _ in columns[1:]))
        ]
        return Table(name="budgets", title=title, note=note, columns=columns, rows=tuple(rows))
    rows = []
    for p, point in enumerate(last[0].points.points or ()):
        at = [(record.points.points or ())[p] for record in last]
        reason = next((found.undefined for found in at if found.undefined), "")
        rows.append((
            point.name, _cell([found.cost for found in at], reason), _cell([found.accuracy for found in at], reason),
            *(_cell([record.share_PK[p][k] for record in last], reason) for k in range(len(names))),
        ))  # fmt: skip
    note = f"{note} {_over(group.runs)}".strip()
    return Table(name="budgets", title=title, note=note, columns=columns, rows=tuple(rows))


def stages_table(run: Run) -> Table:
    """MACs of one prediction, stage by stage."""
    total = sum(run.stage_macs.values())
    entries = [*run.stage_macs.items(), ("total", total)]
    rows = [
        (name, Quantity(n, kind="whole"), Quantity(n / total if total else NAN, undefined="nothing was counted"))
        for name, n in entries
    ]
    note = "From ledger.json: one multiply-add counts 1; FLOPs = 2 x MACs."
    return Table(name="cost", title="Cost of a prediction by stage", note=note, columns=("stage", "MACs", "share, %"),
                 rows=tuple(rows))  # fmt: skip


def phases_table(run: Run) -> Table:
    """MACs of the whole run, phase by phase."""
    total = sum(run.phase_macs.values())
    rows: list[tuple[Cell, ...]] = [
        (name, Quantity(n, kind="whole"), Quantity(n / total if total else NAN, undefined="nothing was counted"))
        for name, n in [*run.phase_macs.items(), ("total", total)]
    ]
    note = f"Of the run with seed {run.seed}, from ledger.json."
    return Table(name="run_cost", title="Cost of the whole run by phase", note=note,
                 columns=("phase", "MACs", "share, %"), rows=tuple(rows))  # fmt: skip


def _cell(values: Sequence[float], reason: str = "") -> Quantity:
    return Quantity(mean(values), deviation=deviation(values), undefined=reason or "not evaluated")


def seeds_text(seeds: Sequence[int]) -> str:
    """Seeds as the command line takes them.

    >>> seeds_text([0, 1, 2]), seeds_text([0, 3]), seeds_text([])
    ('0..2', '0, 3', 'none')
    """
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}..{seeds[-1]}"
    return ", ".join(map(str, seeds)) or "none"


def _over(runs: Sequence[Run]) -> str:
    return f"Mean ± sample standard deviation over {len(runs)} seeds." if len(runs) > 1 else ""
