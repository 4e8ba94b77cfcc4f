"""Runs grouped by what differs in their configs, and what may be compared with what."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from clframe.errors import ClframeError
from clframe.exits.diagnostics import ExitRecord
from clframe.metrics.statistics import NAN, Point, mean
from clframe.report.loading import Run
from clframe.results import Result

TRAINING_ONLY = ("benchmark.augment",)
"""Keys of the benchmark that change what training does, not which samples there are."""

WHOLE = "whole network"
"""Name of the operating point that computes everything."""
OWN = "own policy"
"""Name of the operating point at which a run answered by a policy of its own."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Finished runs that differ in their seed only."""

    label: str
    runs: tuple[Run, ...]

    @property
    def results(self) -> list[Result]:
        """One a seed, in order of the seeds."""
        return [run.result for run in self.runs if run.result is not None]

    @property
    def seeds(self) -> tuple[int, ...]:
        """In rising order."""
        return tuple(run.seed for run in self.runs)

    def by_seed(self, value: Callable[[Result], float]) -> dict[int, float]:
        """A number of each run."""
        return {result.seed: value(result) for result in self.results}

    @property
    def points(self) -> list[Point]:
        """Operating points, means over seeds."""
        return mean_points([operating_points(run) for run in self.runs])

    def metric(self, name: str) -> dict[int, float]:
        """A field of every result, such as ``forgetting``, by seed."""
        return {result.seed: float(getattr(result, name)) for result in self.results}


def group_runs(runs: Sequence[Run]) -> tuple[list[Group], list[str]]:
    """``(groups in the order their first run was given, what a reader has to know)``.

    Raises:
        ClframeError: Runs on different benchmarks, or one seed twice with different numbers.
    """
    names = sorted({run.settings["benchmark.name"] for run in runs})
    if len(names) > 1:
        raise ClframeError(f"report: runs on different benchmarks, {', '.join(names)}; report each on its own")
    found: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        found.setdefault(tuple(sorted(run.settings.items())), []).append(run)
    notices: list[str] = []
    members = [_one_a_seed(group, notices) for group in found.values()]
    labels = labels_of([group[0].settings for group in members])
    groups = [Group(label=label, runs=tuple(group)) for label, group in zip(labels, members, strict=True)]
    return groups, [*notices, *_inside(groups), *_between(groups)]


def labels_of(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """One short name a group: the strategy if it differs, then every other key that does, the name last of all.

    A key counts where two groups have it with different values.

    >>> labels_of([{"strategy": "er", "er.memory": "50"}, {"strategy": "er", "er.memory": "200"}])
    ['er.memory=50', 'er.memory=200']
    >>> labels_of([{"strategy": "er", "er.memory": "50"}, {"strategy": "naive"}])
    ['er', 'naive']
    """
    keys = sorted({key for flat in settings for key in flat})
    telling = [key for key in keys if len({flat[key] for flat in settings if key in flat}) > 1]
    differs = "strategy" in telling
    telling = [key for key in telling if key not in ("strategy", "name")]
    short = {key: key.removeprefix("trainer.").removeprefix("benchmark.").removeprefix("optimizer.") for key in telling}
    labels = [
        ", ".join([flat["strategy"]] * differs + [f"{short[key]}={flat[key]}" for key in telling if key in flat])
        or flat["strategy"]
        for flat in settings
    ]
    if len(set(labels)) < len(labels):
        labels = [f"{flat.get('name', 'run')}: {label}" for label, flat in zip(labels, settings, strict=True)]
    return [label if labels.count(label) == 1 else f"{label} ({n + 1})" for n, label in enumerate(labels)]


def mismatch(first: Group, second: Group) -> str:
    """Why two groups must not be subtracted from each other; empty where they may."""
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
        for field, said in (("experiences", "class orders"), ("class_order", "class orders"),
                            ("test_samples", "test splits")):  # fmt: skip
            if getattr(result, field) != getattr(other, field):
                return f"{said} of seed {result.seed} differ"
    return ""


def operating_points(run: Run) -> list[Point]:
    """What a run's model can do: stop early at each budget, by a policy of its own, or not at all, which comes last.

    Budgets are there where thresholds have been chosen, the policy where some samples stop early. Accuracy is over all
    test samples. Where experts rest, the whole network costs those that run.
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
    """The same of one evaluation of the exits. Thresholds come from validation samples: nothing is picked on test."""
    whole = Point(record.macs_K[-1], record.diagnostics.accuracy_K[-1], WHOLE)
    chosen = (record.points.points or ()) if len(record.macs_K) > 1 else ()
    return [*(Point(p.cost * record.backbone_macs, p.accuracy, p.name) for p in chosen if not p.undefined), whole]


def mean_points(points_S: Sequence[Sequence[Point]]) -> list[Point]:
    """Operating points averaged over seeds, by name; a point that a seed lacks is left out."""
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
            notices.append(f"{run.path} repeats {other.path}, number for number; it is counted once.")
            continue
        kept[run.seed] = run
    return [kept[seed] for seed in sorted(kept)]


def _numbers(run: Run) -> str:
    """The result without what differs between two runs of one config and seed: place, time and versions."""
    assert run.result is not None
    return replace(run.result, run_folder="", train_seconds=0.0, versions={}).to_json()


def _inside(groups: Sequence[Group]) -> list[str]:
    """What is odd within a group: other streams under one config, other versions."""
    notices = []
    for group in groups:
        shapes = {(len(r.accuracy_matrix), len(r.test_samples)) for r in group.results}
        if len(shapes) > 1:
            raise ClframeError(f"report: runs of '{group.label}' differ in their experiences; give one kind of them")
        if len({r.exit_names for r in group.results}) > 1:
            raise ClframeError(f"report: runs of '{group.label}' differ in their exits; give one kind of them")
    versions = [result.versions for group in groups for result in group.results]
    different = sorted({k for found in versions for k in found if len({v.get(k) for v in versions}) > 1})
    if different:
        notices.append(f"Runs differ in their versions of {', '.join(different)}.")
    return notices


def _between(groups: Sequence[Group]) -> list[str]:
    notices = []
    every = sorted({seed for group in groups for seed in group.seeds})
    for group in groups:
        missing = [str(seed) for seed in every if seed not in group.seeds]
        if missing:
            notices.append(
                f"'{group.label}' has no seed {', '.join(missing)}: its means are over {len(group.seeds)} of "
                f"{len(every)} seeds. Differences are over common seeds only."
            )
    for group in groups[1:]:
        why = mismatch(groups[0], group)
        if why:
            notices.append(
                f"'{groups[0].label}' and '{group.label}' are not comparable: {why}. No difference is shown."
            )
    return notices
