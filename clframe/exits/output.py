"""Tables, figures and JSON of the study of a run's exits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from clframe.errors import RunFolderError
from clframe.exits.calibration_error import BINS
from clframe.exits.failure import LABELS, mean_over_exits, undefined_reason
from clframe.exits.study import ExitStudy
from clframe.files import read_json
from clframe.plotting.style import HEIGHT, MUTED, Picture, legend, percent, series_style
from clframe.records import read_record, to_plain
from clframe.tables import Cell, Quantity, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DECIMALS: Final = frozenset({"brier", "nll"})
HEADINGS: Final[Mapping[str, str]] = {
    "accuracy": "accuracy, %",
    "smooth_ece": "smooth ECE, %",
    **{name: label if name in DECIMALS else f"{label}, %" for name, label in LABELS.items()},
}
"""Column headings by metric; definitions in :mod:`clframe.exits.failure`."""

SCHEMA_VERSION: Final = 1
"""Version of ``exits.json``."""

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
        "schema_version": SCHEMA_VERSION, "run": study.name, "command": list(command), "versions": dict(versions),
        "exit_names": list(study.exit_names), "cost": list(study.cost_K), "samples": study.samples,
        "validation_samples": study.validation_samples, "metrics": study.metrics, "intervals_95": study.intervals,
        "undecided": study.undecided, "undecided_samples": list(study.undecided_samples),
        "by_experience": study.by_experience, "budgets": study.points, "curves": study.curves,
    }  # fmt: skip
    found: dict[str, Any] = to_plain(content)
    return found


_KEYS: Final[Mapping[str, str]] = {"run": "name", "cost": "cost_K", "intervals_95": "intervals", "budgets": "points"}
"""Key of ``exits.json`` -> attribute of :class:`~clframe.exits.study.ExitStudy`, where they differ."""


def read_study(file: Path) -> ExitStudy:
    """Read the study in ``exits.json``, without the samples behind it.

    Raises:
        RunFolderError: A file that is damaged or of a newer version.
    """
    try:
        content = read_json(file)
        version = content["schema_version"]
    except (OSError, ValueError, KeyError, TypeError):
        raise RunFolderError(f"{file}: cannot be read as JSON of a study; run clframe analyze exits again") from None
    if version != SCHEMA_VERSION:
        raise RunFolderError(f"{file}: has schema version {version}; this clframe reads {SCHEMA_VERSION}")
    return read_record(ExitStudy, {_KEYS.get(key, key): value for key, value in content.items()}, prefix=f"{file}: ")


def pictures(study: ExitStudy, *, prefix: str = "") -> list[Picture]:
    """Reliability, risk against coverage, and confidences of correct and wrong predictions; none without curves."""
    if not study.curves:
        return []
    return [
        Picture(f"{prefix}reliability", "Reliability: accuracy against confidence in "
                f"{BINS} bins of equal width, test samples.", partial(draw_reliability, study), HEIGHT + 0.6),
        Picture(f"{prefix}risk_coverage", "Risk-coverage: error rate among the most confident samples.",
                partial(draw_risk_coverage, study), HEIGHT + 0.4),
        Picture(f"{prefix}confidences", "Confidence of correct and wrong predictions, by exit.",
                partial(draw_confidences, study), HEIGHT + 0.6),
    ]  # fmt: skip


def draw_reliability(study: ExitStudy, figure: Figure) -> None:
    """Accuracy of each bin against its mean confidence; the diagonal is perfect calibration."""
    axes: Any = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)))
    for n, k in enumerate(_exits(study)):
        curve = study.curves[k]
        bins = [m for m, mean in enumerate(curve.confidence_M) if not isnan(mean)]
        accuracy = [curve.right_M[m] / (curve.right_M[m] + curve.wrong_M[m]) for m in bins]
        axes.plot([curve.confidence_M[m] for m in bins], accuracy, label=study.exit_names[k], **series_style(n))
    axes.set(xlabel="mean confidence, %", ylabel="accuracy, %", xlim=(0, 1.02), ylim=(0, 1.02))
    percent(axes.xaxis)
    percent(axes.yaxis)
    legend(figure, axes)


def draw_risk_coverage(study: ExitStudy, figure: Figure) -> None:
    """Error rate of the most confident share of samples."""
    axes: Any = figure.add_subplot()
    for n, k in enumerate(_exits(study)):
        style = {**series_style(n), "marker": ""}
        axes.plot(study.curves[k].coverage_P, study.curves[k].risk_P, label=study.exit_names[k], **style)
    axes.set(xlabel="coverage, %", ylabel="risk (error rate), %", xlim=(0, 1.02))
    axes.set_ylim(bottom=0)
    percent(axes.xaxis)
    percent(axes.yaxis)
    legend(figure, axes)


def draw_confidences(study: ExitStudy, figure: Figure) -> None:
    """Histograms of confidence, correct predictions upwards and wrong ones downwards, one panel per exit."""
    exits = _exits(study)[:4]
    middle = [(m + 0.5) / BINS for m in range(BINS)]
    all_axes: Any = figure.subplots(1, len(exits), sharey=True, squeeze=False)
    for n, (axes, k) in enumerate(zip(all_axes[0], exits, strict=True)):
        curve = study.curves[k]
        right, wrong = (np.array(counts) / study.samples for counts in (curve.right_M, curve.wrong_M))
        axes.bar(middle, right, 0.9 / BINS, color=series_style(0)["color"], label="correct")
        axes.bar(middle, -wrong, 0.9 / BINS, color=series_style(1)["color"], label="wrong")
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


def _quantity(metric: str, values: Mapping[str, Sequence[float]], exit: int) -> Quantity:
    return _number(metric, values[metric][exit], undefined_reason(metric, values, exit=exit))


def _number(metric: str, value: float, reason: str) -> Quantity:
    return Quantity(value, kind="fine" if metric in DECIMALS else "percent", undefined=reason if isnan(value) else "")


def _interval(low: float, high: float) -> str:
    return "-" if isnan(low) else f"{100 * low:.1f} to {100 * high:.1f}"
