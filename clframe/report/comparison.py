"""Runs grouped by the differences of their configs, and which groups are comparable."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from clframe.errors import ClframeError
from clframe.exits.diagnostics import ExitRecord
from clframe.metrics.statistics import NAN, Point, mean
from clframe.report.labels import labels_of
from clframe.report.loading import Run
from clframe.results import Result

TRAINING_ONLY = ("benchmark.augment",)
"""Keys of the benchmark that change training but not the samples."""

WHOLE = "whole network"
"""Name of the operating point without early exit."""
OWN = "exit policy"
"""Name of the operating point of the exit policy that the run was evaluated with."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Finished runs that differ only in their seed."""

    label: str
    runs: tuple[Run, ...]

    @property
    def results(self) -> list[Result]:
        """One per seed, in order of the seeds."""
        return [run.result for run in self.runs if run.result is not None]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds in ascending order."""
        return tuple(run.seed for run in self.runs)

    def by_seed(self, value: Callable[[Result], float]) -> dict[int, float]:
        """Return a number of each run by seed."""
        return {result.seed: value(result) for result in self.results}

    @property
    def points(self) -> list[Point]:
        """Operating points, means over seeds."""
        return mean_points([operating_points(run) for run in self.runs])

    def metric(self, name: str) -> dict[int, float]:
        """Return a metric, such as ``forgetting``, by seed."""
        return {result.seed: result.score(name).value for result in self.results}


def group_runs(runs: Sequence[Run]) -> tuple[list[Group], list[str]]:
    """Group runs that differ only in their seed; returns the groups, in the order given, and notices for the reader.

    Raises:
        ClframeError: Runs on different benchmarks, or one seed twice with different numbers.
    """
    names = sorted({run.settings["benchmark.name"] for run in runs})
    if len(names) > 1:
        raise ClframeError(f"report: runs on different benchmarks, {', '.join(names)}; report each benchmark alone")
    found: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        found.setdefault(tuple(sorted(run.settings.items())), []).append(run)
    notices: list[str] = []
    members = [_one_a_seed(group, notices) for group in found.values()]
    labels = labels_of([group[0].settings for group in members], written=[group[0].strategy for group in members])
    groups = [Group(label=label, runs=tuple(group)) for label, group in zip(labels, members, strict=True)]
    return groups, [*notices, *_inside(groups)]


def mismatch(first: Group, second: Group) -> str:
    """Return why two groups are not comparable; empty where they are."""
    a, b = first.runs[0].settings, second.runs[0].settings
    keys = sorted(key for key in {*a, *b} if key.startswith("benchmark.") and key not in TRAINING_ONLY)
    different = [key for key in keys if a.get(key) != b.get(key)]
    if different:
        return f"{', '.join(different)} {'differs' if len(different) == 1 else 'differ'}"
    others = {result.seed: result for result in second.results}
    for result in first.results:
        other = others.get(result.seed)
        if other is None:
            continue
        for field, name in (("experiences", "class orders"), ("class_order", "class orders"),
                            ("test_samples", "test splits")):  # fmt: skip
            if getattr(result, field) != getattr(other, field):
                return f"{name} of seed {result.seed} differ"
    return ""


def operating_points(run: Run) -> list[Point]:
    """List cost and accuracy of a run's model: at each budget, under its exit policy, and as a whole, which is last.

    Budgets exist where thresholds have been chosen, the exit policy where some samples exit early. Accuracy is over
    all test samples. With routed experts, the whole network costs the executed ones.
    """
    result = run.result
    assert result is not None
    if result.exits:
        *early, whole = record_points(result.exits[-1])
    else:
        early, whole = [], Point(NAN if result.macs is None else result.macs, result.final_weighted_accuracy, WHOLE)
    if run.ledger is None:
        return [*early, whole]
    predictions = run.ledger.predictions
    stopped = predictions.samples_by_exit()
    if any(count for name, count in stopped.items() if name != result.exit_names[-1]):
        early.append(Point(predictions.mean(), result.final_weighted_accuracy, OWN))
    spared = sum((row.dense_macs - row.macs) / row.samples for row in predictions.experts())
    return [*early, whole._replace(cost=predictions.whole() - spared) if predictions.experts() else whole]


def record_points(record: ExitRecord) -> list[Point]:
    """List the operating points of one exit record, whose thresholds were chosen on validation samples."""
    whole = Point(record.macs_K[-1], record.accuracy_K[-1], WHOLE)
    chosen = (record.points.points or ()) if len(record.macs_K) > 1 else ()
    return [*(Point(p.cost * record.backbone_macs, p.accuracy, p.name) for p in chosen if not p.undefined), whole]


def mean_points(points_S: Sequence[Sequence[Point]]) -> list[Point]:
    """Average operating points over seeds by name; a point that a seed lacks is omitted."""
    of = [{point.name: point for point in points} for points in points_S]
    shared = [name for name in of[0] if all(name in points for points in of)] if of else []
    means = [
        Point(mean([points[name].cost for points in of]), mean([points[name].accuracy for points in of]), name)
        for name in shared
    ]
    return [point for point in means if not math.isnan(point.cost) and not math.isnan(point.accuracy)]


def _one_a_seed(runs: Sequence[Run], notices: list[str]) -> list[Run]:
    kept: dict[int, Run] = {}
    for run in runs:
        other = kept.get(run.seed)
        if other is not None and _numbers(other) != _numbers(run):
            raise ClframeError(
                f"report: {other.path} and {run.path} have one config and one seed, {run.seed}, but different "
                f"numbers; give one of them"
            )
        if other is not None:
            notices.append(f"{run.path} repeats {other.path} exactly; it is counted once.")
            continue
        kept[run.seed] = run
    return [kept[seed] for seed in sorted(kept)]


def _numbers(run: Run) -> str:
    """Return the result without what differs between two runs of one config and seed: folder, time and versions."""
    assert run.result is not None
    return replace(run.result, run_folder="", train_seconds=0.0, versions={}).to_json()


def _inside(groups: Sequence[Group]) -> list[str]:
    """List inconsistencies within groups: different streams under one config, different versions."""
    notices = []
    for group in groups:
        shapes = {(len(r.accuracy_matrix), len(r.test_samples)) for r in group.results}
        if len(shapes) > 1:
            raise ClframeError(f"report: runs of '{group.label}' differ in their experiences; give runs of one kind")
        if len({r.exit_names for r in group.results}) > 1:
            raise ClframeError(f"report: runs of '{group.label}' differ in their exits; give runs of one kind")
    versions = [result.versions for group in groups for result in group.results]
    different = sorted({k for found in versions for k in found if len({v.get(k) for v in versions}) > 1})
    if different:
        notices.append(f"Runs differ in their versions of {', '.join(different)}.")
    return notices
