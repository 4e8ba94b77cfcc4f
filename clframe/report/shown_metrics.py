"""Metrics that a report shows, and the cells of its tables: means over the seeds of a group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from clframe.exits.diagnostics import ExitMetric
from clframe.metrics.registry import OWN_METRICS, TOKEN_METRICS, Kind, Metric, all_metrics
from clframe.metrics.statistics import NAN, deviation, mean
from clframe.results import Result
from clframe.tables import Quantity, over_seeds

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


def heading(metric: Metric | ExitMetric) -> str:
    """Return a metric's label with its unit."""
    return f"{metric.label}, %" if metric.kind == "percent" else metric.label


def trained_once(result: Result) -> bool:
    """Whether a run has one experience: training on independent samples, without anything to forget."""
    return len(result.accuracy_matrix) == 1 and len(result.accuracy_matrix[0]) == 1


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


def seed_mean(values: Sequence[float], reason: str = "", kind: Kind = "percent") -> Quantity:
    """Return mean and sample standard deviation of one value per seed, ``reason`` where the mean is undefined."""
    return Quantity(mean(values), deviation=deviation(values), kind=kind, undefined=reason or "not evaluated")


def seeds_text(seeds: Sequence[int]) -> str:
    """Format seeds as the command line accepts them.

    >>> seeds_text([0, 1, 2]), seeds_text([0, 3]), seeds_text([])
    ('0..2', '0, 3', 'none')
    """
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}..{seeds[-1]}"
    return ", ".join(map(str, seeds)) or "none"


def spread_note(seeds: int) -> str:
    """Return the sentence that explains means over several seeds; empty for one seed."""
    return f"Mean ± sample standard deviation over {seeds} seeds." if seeds > 1 else ""
