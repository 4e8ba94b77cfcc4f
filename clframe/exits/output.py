"""Tables, figures and JSON of the study of a run's exits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import isnan
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from clframe.exits.failure import BINS, LABELS, mean_over_exits, undefined_reason
from clframe.exits.study import ExitStudy
from clframe.plotting.style import HEIGHT, MUTED, Picture, legend, percent, series_style
from clframe.records import to_plain
from clframe.tables import Cell, Quantity, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DECIMALS: Final = frozenset({"brier", "nll"})
HEADINGS: Final[Mapping[str, str]] = {
    "accuracy": "accuracy, %",
    **{name: label if name in DECIMALS else f"{label}, %" for name, label in LABELS.items()},
}
"""Column headings by metric; definitions in :mod:`clframe.exits.failure`."""

MOST_EXITS: Final = 8
"""Exits drawn in one figure, spread over the depth."""


def tables(study: ExitStudy) -> list[Table]:
    """Metrics of each exit, their intervals, the undecided samples, budgets, and metrics by experience."""
    found = [metrics_table(study), intervals_table(study), undecided_table(study), budgets_table(study)]
    return [*found, *([experiences_table(study)] if len(next(iter(study.by_experience.values()), ())) > 1 else [])]


def metrics_table(study: ExitStudy) -> Table:
    """One row per exit, and the mean over exits where it is defined."""
    rows: list[tuple[Cell, ...]] = [
        (name, *(_quantity(metric, study.metrics, k) for metric in study.metrics))
        for k, name in enumerate(study.exit_names)
    ]
    means = [
        _number(metric, mean_over_exits(values), "undefined at every exit") for metric, values in study.metrics.items()
    ]
    note = f"{study.samples} test samples; confidence is the largest probability. Mean over the exits that define it."
    return Table(
        name="exit_metrics", title="Calibration and failure prediction by exit", note=note,
        columns=("exit", *(HEADINGS[metric] for metric in study.metrics)), rows=(*rows, ("mean", *means)),
    )  # fmt: skip


def intervals_table(study: ExitStudy) -> Table:
    """Bootstrap intervals of the ranking metrics."""
    rows: list[tuple[Cell, ...]] = [
        (name, *(_interval(*limits[k]) for limits in study.intervals.values()))
        for k, name in enumerate(study.exit_names)
    ]
    note = "Percentile bootstrap, 1,000 resamples. ECE is biased upwards in resamples."
    return Table(
        name="exit_intervals", title="95 % intervals by exit", note=note,
        columns=("exit", *(HEADINGS[metric] for metric in study.intervals)), rows=tuple(rows),
    )  # fmt: skip


def undecided_table(study: ExitStudy) -> Table:
    """Metrics on the samples that reach each exit at the 50 % budget."""
    rows: list[tuple[Cell, ...]] = [
        (
            name, Quantity(float(study.undecided_samples[k]), kind="whole"),
            *(_quantity(metric, study.undecided, k) for metric in study.undecided),
        )
        for k, name in enumerate(study.exit_names)
    ]  # fmt: skip
    note = "Samples that no earlier exit stops at the threshold of the 50 % budget; all without a threshold."
    return Table(
        name="exit_metrics_undecided", title="The same on undecided samples", note=note,
        columns=("exit", "samples", *(HEADINGS[metric] for metric in study.undecided)), rows=tuple(rows),
    )  # fmt: skip


def budgets_table(study: ExitStudy) -> Table:
    """Accuracy realized on test data at budgets solved on validation data."""
    points = study.points
    last = Quantity(study.metrics["accuracy"][-1])
    rows: list[tuple[Cell, ...]] = [("never stops early", Quantity(study.cost_K[-1]), last, "-")]
    for point in points.points or ():
        accuracy = Quantity(point.accuracy, undefined=point.undefined)
        rows.append((
            point.name.replace("%", " %"), Quantity(point.cost, undefined=point.undefined), accuracy,
            _interval(point.accuracy_low, point.accuracy_high),
        ))  # fmt: skip
    note = points.undefined or f"Thresholds chosen on {points.validation_samples} validation samples ({points.rule})."
    return Table(
        name="exit_budgets", title="Accuracy at budgets", note=note,
        columns=("budget", "cost, % of the backbone", "accuracy, %", "95 % CI"), rows=tuple(rows),
    )  # fmt: skip


def experiences_table(study: ExitStudy) -> Table:
    """Accuracy, AURC and EEFP of each exit on the test data of each experience."""
    shown = ("accuracy", "aurc", "eefp")
    by_experience = [
        {metric: study.by_experience[metric][e] for metric in shown} for e in range(len(study.by_experience["aurc"]))
    ]
    rows: list[tuple[Cell, ...]] = [
        (f"{e}", name, *(_quantity(metric, values, k) for metric in shown))
        for e, values in enumerate(by_experience)
        for k, name in enumerate(study.exit_names)
    ]
    return Table(
        name="exit_metrics_by_experience", title="Failure prediction by experience",
        columns=("experience", "exit", *(HEADINGS[metric] for metric in shown)), rows=tuple(rows),
    )  # fmt: skip


def to_json(study: ExitStudy, *, command: Sequence[str], versions: Mapping[str, str]) -> dict[str, Any]:
    """The study as plain values; NaN is null."""
    content = {
        "schema_version": 1, "run": study.name, "command": list(command), "versions": dict(versions),
        "exit_names": list(study.exit_names), "cost": list(study.cost_K), "samples": study.samples,
        "validation_samples": study.validation_samples, "metrics": study.metrics, "intervals_95": study.intervals,
        "undecided": study.undecided, "undecided_samples": list(study.undecided_samples),
        "by_experience": study.by_experience, "budgets": study.points,
    }  # fmt: skip
    found: dict[str, Any] = to_plain(content)
    return found


def pictures(study: ExitStudy) -> list[Picture]:
    """Reliability, risk against coverage, and confidences of correct and wrong predictions."""
    return [
        Picture("reliability", f"Reliability: accuracy against confidence in {BINS} bins of equal width, test samples.",
                partial(draw_reliability, study), HEIGHT + 0.6),
        Picture("risk_coverage", "Risk-coverage: error rate among the most confident samples.",
                partial(draw_risk_coverage, study), HEIGHT + 0.4),
        Picture("confidences", "Confidence of correct and wrong predictions, by exit.",
                partial(draw_confidences, study), HEIGHT + 0.6),
    ]  # fmt: skip


def draw_reliability(study: ExitStudy, figure: Figure) -> None:
    """Accuracy of each bin against its mean confidence; the diagonal is perfect calibration."""
    axes: Any = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)))
    for n, k in enumerate(_exits(study)):
        confidence_N, correct_N = _of_exit(study, k)
        bin_N = np.clip(np.ceil(confidence_N * BINS - 1e-12) - 1, 0, BINS - 1).astype(int)  # as in ece
        used = np.unique(bin_N)
        mean_M, accuracy_M = ([values_N[bin_N == m].mean() for m in used] for values_N in (confidence_N, correct_N))
        axes.plot(mean_M, accuracy_M, label=study.exit_names[k], **series_style(n))
    axes.set(xlabel="mean confidence, %", ylabel="accuracy, %", xlim=(0, 1.02), ylim=(0, 1.02))
    percent(axes.xaxis)
    percent(axes.yaxis)
    legend(figure, axes)


def draw_risk_coverage(study: ExitStudy, figure: Figure) -> None:
    """Error rate of the most confident share of samples."""
    axes: Any = figure.add_subplot()
    for n, k in enumerate(_exits(study)):
        confidence_N, correct_N = _of_exit(study, k)
        order_N = np.argsort(-confidence_N, kind="stable")
        count_N = np.arange(1, len(order_N) + 1)
        risk_N = np.cumsum(~correct_N[order_N]) / count_N
        # A curve needs no more points.
        shown = np.unique(np.linspace(0, len(order_N) - 1, min(len(order_N), 400)).round().astype(int))
        style = {**series_style(n), "marker": ""}
        axes.plot(count_N[shown] / len(order_N), risk_N[shown], label=study.exit_names[k], **style)
    axes.set(xlabel="coverage, %", ylabel="risk (error rate), %", xlim=(0, 1.02))
    axes.set_ylim(bottom=0)
    percent(axes.xaxis)
    percent(axes.yaxis)
    legend(figure, axes)


def draw_confidences(study: ExitStudy, figure: Figure) -> None:
    """Histograms of confidence, correct predictions upwards and wrong ones downwards, one panel per exit."""
    exits = _exits(study)[:4]
    edges = np.linspace(0, 1, BINS + 1)
    all_axes: Any = figure.subplots(1, len(exits), sharey=True, squeeze=False)
    for n, (axes, k) in enumerate(zip(all_axes[0], exits, strict=True)):
        confidence_N, correct_N = _of_exit(study, k)
        right, _ = np.histogram(confidence_N[correct_N], edges)
        wrong, _ = np.histogram(confidence_N[~correct_N], edges)
        middle, width = (edges[:-1] + edges[1:]) / 2, 0.9 / BINS
        axes.bar(middle, right / study.samples, width, color=series_style(0)["color"], label="correct")
        axes.bar(middle, -wrong / study.samples, width, color=series_style(1)["color"], label="wrong")
        axes.set(title=study.exit_names[k], xlabel="confidence, %", xlim=(0, 1))
        percent(axes.xaxis)
        if n == 0:
            axes.set_ylabel("samples, %")
            axes.yaxis.set_major_formatter(lambda share, _: f"{100 * abs(share):g}")  # both directions are shares
    legend(figure, all_axes[0][-1])


def _exits(study: ExitStudy) -> list[int]:
    """Indices of the exits to draw, the last one among them."""
    count = len(study.exit_names)
    return sorted(set(np.linspace(0, count - 1, min(count, MOST_EXITS)).round().astype(int).tolist()))


def _of_exit(study: ExitStudy, exit: int) -> tuple[Any, Any]:
    """confidence_N and correct_N of the samples whose confidence is finite; a diverged network may have none."""
    confidence_N, correct_N = study.evaluation.confidence_KN[exit].numpy(), study.evaluation.correct_KN[exit].numpy()
    finite_N = np.isfinite(confidence_N)
    return confidence_N[finite_N], correct_N[finite_N]


def _quantity(metric: str, values: Mapping[str, Sequence[float]], exit: int) -> Quantity:
    return _number(metric, values[metric][exit], undefined_reason(metric, values, exit=exit))


def _number(metric: str, value: float, reason: str) -> Quantity:
    return Quantity(value, kind="fine" if metric in DECIMALS else "percent", undefined=reason if isnan(value) else "")


def _interval(low: float, high: float) -> str:
    return "-" if isnan(low) else f"{100 * low:.1f} to {100 * high:.1f}"
