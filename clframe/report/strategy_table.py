"""Tables that compare groups: strategies in one table, and decisions of their exits in another."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

from clframe.exits.diagnostics import ExitRecord
from clframe.metrics.statistics import NAN, mean, paired
from clframe.report.comparison import Group, mismatch, operating_points
from clframe.report.families import BASE, Member
from clframe.report.shown_metrics import ACCURACY, metric_over_seeds, seed_mean, trained_once
from clframe.report.tables import equal_cost, reached_at_most
from clframe.tables import Cell, Quantity, Table, over_seeds

BUDGETS: Final = ("25%", "50%", "75%", "100%")
"""Names of the budgets that have a column."""


def strategies_table(rows: Sequence[Member], *, reference: Group | None = None) -> Table:
    """Make one row per strategy: parameters, accuracy and its gain, accuracy within budgets, cost, forgetting, seeds.

    The gain is the mean paired difference from the group's base with Student's 95 % interval, both over common seeds.
    """
    once = all(trained_once(result) for row in rows for result in row.group.results)
    accuracy = "accuracy" if once else "final average accuracy"
    columns = (
        "strategy", "kind", "number of seeds", "parameters", f"{accuracy}, %", "gain, points",
        "95 % CI from, points", "to, points", *(f"at {name.replace('%', ' %')} of the cost, %" for name in BUDGETS),
        "cost at equal accuracy, %", *(() if once else ("forgetting, %",)),
    )  # fmt: skip
    against = f"'{reference.label}'" if reference is not None else "the same strategy without exits (base)"
    note = (
        f"Mean ± sample standard deviation over seeds. Gain: {accuracy} minus that of {against}, paired "
        f"over common seeds, with Student's 95 % interval. At a share of the cost: accuracy on all test samples with "
        f"thresholds for this budget, a share of the bare backbone's MACs; a network with one exit always costs 100 %. "
        f"Cost at equal accuracy: MACs with which the exits reach the accuracy of the whole network of {against}, over "
        f"the MACs of that network."
    )
    return Table(name="strategies", title="Strategies", note=note, columns=columns,
                 rows=tuple(_row(row, once=once) for row in rows))  # fmt: skip


def _row(row: Member, *, once: bool) -> tuple[Cell, ...]:
    group = row.group
    return (
        group.label, row.kind, Quantity(len(group.seeds), kind="whole"),
        over_seeds(group.by_seed(lambda result: result.parameters), kind="whole"),
        metric_over_seeds(group.results, ACCURACY), *_gain(row), *(_at_budget(group, name) for name in BUDGETS),
        _equal_cost(row), *(() if once else (metric_over_seeds(group.results, "forgetting"),)),
    )  # fmt: skip


def _without_base(row: Member) -> str:
    """Return why a row has no base to compare with; "" where it has one, "-" for a base itself."""
    if row.base is row.group or (row.base is None and row.kind == BASE):
        return "-"
    return mismatch(row.base, row.group) if row.base is not None else "no run of its base"


def _gain(row: Member) -> tuple[Cell, Cell, Cell]:
    """Return the gain over the base, and the ends of its interval."""
    why = _without_base(row)
    if why == "-":
        return "-", "-", "-"
    if why or row.base is None:
        return Quantity(NAN, undefined=why), "-", "-"
    found = paired(row.base.metric(ACCURACY), row.group.metric(ACCURACY))
    if found.undefined:
        return Quantity(NAN, undefined=found.undefined), "-", "-"
    low, high = (
        Quantity(found.mean + sign * found.half_width, kind="points", undefined="one seed in common")
        for sign in (-1, 1)
    )
    return Quantity(found.mean, kind="points"), low, high


def _at_budget(group: Group, name: str) -> Cell:
    """Return the accuracy at a budget over the seeds of a group."""
    if not has_exits(group):
        if name != "100%":
            return "-"
        return over_seeds({run.seed: operating_points(run)[-1].accuracy for run in group.runs}, reason="not evaluated")
    records = _last_records(group)
    found = {seed: next((p for p in r.points.points or () if p.name == name), None) for seed, r in records.items()}
    reasons = [record.points.undefined for record in records.values()] + [p.undefined for p in found.values() if p]
    accuracies = {seed: NAN if point is None else point.accuracy for seed, point in found.items()}
    return over_seeds(accuracies, reason=next(filter(None, reasons), "not evaluated"))


def _equal_cost(row: Member) -> Cell:
    """Return the share of the base's MACs with which a group reaches the base's accuracy."""
    why = _without_base(row)
    if why == "-":
        return "-"
    seeds = sorted(set(row.base.seeds) & set(row.group.seeds)) if row.base is not None else []
    why = why or ("" if seeds else "no seed in common")
    if why or row.base is None:
        return Quantity(NAN, undefined=why)
    target, cost, needed = equal_cost(row.base, row.group, seeds)
    unmet = "not counted" if math.isnan(target) else f"it reaches {reached_at_most(row.group, seeds)} at most"
    return Quantity(needed / cost if cost else NAN, undefined=unmet)


def has_exits(group: Group) -> bool:
    """Whether every run of a group has a network with several exits and records of them."""
    return all(result.exits and len(result.exit_names) > 1 for result in group.results)


def _last_records(group: Group) -> dict[int, ExitRecord]:
    """Return the record of the exits at the end by seed."""
    return {result.seed: result.exits[-1] for result in group.results}


def exits_compared_table(rows: Sequence[Member]) -> Table | None:
    """Make one row per group with exits: oracle, overthinking, unique accuracy, calibration, similarity.

    None where no group has exits.
    """
    found: list[tuple[Cell, ...]] = []
    for row in rows:
        if not has_exits(row.group):
            continue
        records = list(_last_records(row.group).values())

        def over(value: Callable[[ExitRecord], float], reason: str, of: Sequence[ExitRecord] = records) -> Quantity:
            return seed_mean([value(record) for record in of], reason)

        found.append((
            row.group.label, row.kind, over(lambda r: r.static.get("last", NAN), "not recorded"),
            over(lambda r: r.static.get("oracle", NAN), "not recorded"),
            over(lambda r: r.overthinking, "not recorded"),
            over(lambda r: mean(r.metrics.get("unique_accuracy", ())[:-1]), "not recorded"),
            over(lambda r: r.metrics.get("ece", (NAN,))[-1], "not recorded"),
            over(lambda r: mean(r.similarity_K), "not measured"),
        ))  # fmt: skip
    if not found:
        return None
    note = (
        "After the last experience; mean ± sample standard deviation over seeds. Oracle: share of samples that any "
        "exit classifies correctly; overthinking: oracle minus last exit. Unique accuracy: share of samples that one "
        "early exit alone classifies correctly, mean over early exits. CKA: similarity of each exit's tap with itself "
        "after the first experience, mean over exits."
    )
    columns = ("strategy", "kind", "last exit, %", "oracle, %", "overthinking, %", "unique accuracy, %",
               "ECE of the last exit, %", "CKA, %")  # fmt: skip
    return Table(name="exits_compared", title="Overthinking, unique accuracy, calibration and similarity", note=note,
                 columns=columns, rows=tuple(found))  # fmt: skip
