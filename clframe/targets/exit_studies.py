"""Studies of the exits of runs: opened, measured, written to folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import isnan, nan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from clframe.accounting import backbone_macs, cumulative_macs
from clframe.environment import versions
from clframe.errors import ClframeError, DataError, RunFolderError
from clframe.exits import output
from clframe.exits.failure import LABELS
from clframe.exits.proxy import (
    GAIN_LABELS,
    GAINS,
    METRICS,
    Correlation,
    Variant,
    correlations,
    difference,
    variants_of_records,
    variants_of_scores,
)
from clframe.exits.study import ExitStudy, Progress, collect_scores, fingerprint, study_exits
from clframe.files import read_json, write_atomically
from clframe.plotting.style import MUTED, Picture, RenderedPicture, percent, render_picture, series_style
from clframe.records import read_record, to_plain
from clframe.results import Result
from clframe.tables import Cell, Quantity, Table, to_csv, to_latex, to_markdown
from clframe.targets.folders import write_files
from clframe.targets.opening import open_target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS: Final = (("csv", to_csv), ("md", to_markdown), ("tex", to_latex))


def write_exit_study(study: ExitStudy, folder: Path, *, command: Sequence[str]) -> Path:
    """Write a study into a folder.

    ``exits.json``, tables (CSV, Markdown, LaTeX), figures (SVG, PNG), and event files for TensorBoard in
    ``tensorboard/``, which replace those of an earlier study.

    Returns:
        The path of the JSON file.

    Raises:
        RunFolderError: The folder cannot be written.
    """
    content = output.to_json(study, command=command, versions=versions())
    pictures = [render_picture(picture) for picture in output.pictures(study)]
    written = _write(folder, "exits.json", content, output.tables(study), pictures)
    _write_events(study, pictures, folder / "tensorboard")
    return written


def _write_events(study: ExitStudy, pictures: Sequence[RenderedPicture], folder: Path) -> None:
    """Numbers, tables and figures of a study; x is the depth of an exit, a budget in %, or an experience."""
    from torch.utils.tensorboard import SummaryWriter

    try:
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        writer: Any = SummaryWriter(str(folder))
    except OSError as error:
        raise RunFolderError(f"{folder}: cannot be written ({error.strerror}); check the folder") from None
    with writer:
        for metric, values in study.metrics.items():
            for exit, value in enumerate(values):
                writer.add_scalar(f"study/{metric}", value, exit)
        for point in study.points.points or ():
            if not isnan(point.accuracy) and not isnan(point.budget_share):
                writer.add_scalar("study_budgets/accuracy", point.accuracy, round(100 * point.budget_share))
        for metric, values_EK in study.by_experience.items():
            for experience, values in enumerate(values_EK):
                for name, value in zip(study.exit_names, values, strict=True):
                    writer.add_scalar(f"study_by_experience/{metric}/{name}", value, experience)
        for table in output.tables(study):
            writer.add_text(f"study/{table.name}", to_markdown(table))
        for picture in pictures:
            writer.add_image(f"study/{picture.name}", _pixels(picture.png), dataformats="HWC")


def _pixels(png: bytes) -> Any:
    """Pixels (height, width, 3) of a figure."""
    import io

    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def study_run(
    run: str, *, overrides: Sequence[str] = (), device: str = "cpu", limit: int | None = None, seed: int = 0,
    progress: Progress | None = None,
) -> ExitStudy:  # fmt: skip
    """Open a run and study its exits; see :func:`~clframe.exits.study.study_exits`."""
    return study_exits(open_target(run, overrides=overrides, device=device), limit=limit, seed=seed, progress=progress)


@dataclass(frozen=True, eq=False, kw_only=True)
class ProxyStudy:
    """Variants, their correlations, and what could not be used.

    Attributes:
        variants: All variants of all runs.
        correlations: Of every metric with every gain.
        differences: |rho| of failure prediction minus |rho| of calibration, with each gain.
        skipped: Reason for each run that gave no variants.
    """

    variants: tuple[Variant, ...]
    correlations: tuple[Correlation, ...]
    differences: tuple[Correlation, ...]
    skipped: Mapping[str, str]


PAIRS: Final = (("eefp", "ece"), ("auroc", "ece"), ("aurc", "ece"), ("eefp", "accuracy"))
"""Metrics whose correlations are compared."""


def study_proxies(
    runs: Sequence[str], *, overrides: Sequence[str] = (), device: str = "cpu", resamples: int = 2000, seed: int = 0,
    progress: Progress | None = None,
) -> ProxyStudy:  # fmt: skip
    """Collect the variants of runs and correlate metrics with gains.

    The variants of a run are stored in its folder, so a study that is repeated or was interrupted computes only new
    ones. A run without exits, without validation data or without a checkpoint is skipped with its reason.

    Raises:
        DataError: Fewer than three variants.
    """
    variants: list[Variant] = []
    skipped: dict[str, str] = {}
    for done, run in enumerate(runs, start=1):
        try:
            variants += variants_of_run(run, overrides=overrides, device=device)
        except ClframeError as error:
            skipped[run] = str(error)
        if progress is not None:
            progress("runs", done, len(runs))
    if len(variants) < 3:
        why = f" ({next(iter(skipped.values()))})" if skipped else ""
        count = f"{len(variants)} variants in {len(runs)} run{'s' if len(runs) != 1 else ''}"
        raise DataError(f"proxy: found {count}{why}; give runs with exits and validation data")
    return correlate(variants, skipped=skipped, resamples=resamples, seed=seed)


def correlate(
    variants: Sequence[Variant], *, skipped: Mapping[str, str] | None = None, resamples: int = 2000, seed: int = 0
) -> ProxyStudy:
    """Correlate the metrics of variants with their gains.

    Args:
        variants: Of any number of runs.
        skipped: Reason for each run that gave no variants.
        resamples: Bootstrap resamples of the intervals.
        seed: Of the resamples.

    Raises:
        DataError: Fewer than three variants.
    """
    compared = tuple(
        difference(variants, first, second, gain=gain, resamples=resamples, seed=seed)
        for first, second in PAIRS
        for gain in GAINS
    )
    return ProxyStudy(
        variants=tuple(variants), correlations=tuple(correlations(variants, resamples=resamples, seed=seed)),
        differences=compared, skipped=skipped or {},
    )  # fmt: skip


def write_proxy_study(study: ProxyStudy, folder: Path, *, command: Sequence[str]) -> Path:
    """Write ``proxy.json``, tables and scatter plots; returns the path of the JSON file."""
    content = {
        "schema_version": 1, "command": list(command), "versions": versions(), "skipped": dict(study.skipped),
        "correlations": study.correlations, "differences": study.differences, "variants": study.variants,
    }  # fmt: skip
    plain: dict[str, Any] = to_plain(content)
    drawn = [render_picture(picture) for picture in proxy_pictures(study)]
    return _write(folder, "proxy.json", plain, [*proxy_tables(study), variants_table(study)], drawn)


def proxy_tables(study: ProxyStudy) -> list[Table]:
    """Correlations of all metrics, and the comparison of correlations."""
    runs = len({variant.run for variant in study.variants})
    note = f"{len(study.variants)} variants of {runs} run{'s' if runs > 1 else ''}; " + (
        "in brackets 95 % intervals over resampled runs." if runs > 1 else "intervals need at least two runs."
    )
    cells = {(one.metric, one.gain): _shown(one) for one in study.correlations}
    rows = tuple((_label(metric), *(cells[metric, gain] for gain in GAINS)) for metric in METRICS)
    compared = {(one.metric, one.gain): _shown(one) for one in study.differences}
    names = dict.fromkeys(one.metric for one in study.differences)
    headings = tuple(GAIN_LABELS.values())
    return [
        Table(name="proxy_correlations", title="Spearman correlation of metrics with realized gains", note=note,
              columns=("metric", *headings), rows=rows),
        Table(name="proxy_differences", title="Difference of absolute correlations", note=note,
              columns=("comparison", *headings),
              rows=tuple((_difference_label(name), *(compared[name, gain] for gain in GAINS)) for name in names)),
    ]  # fmt: skip


SCATTERED: Final = ("eefp", "ece", "auroc", "aurc")
"""Metrics with a scatter plot."""


def variants_table(study: ProxyStudy) -> Table:
    """Coordinates of the scatter plots: the metrics and gains of every variant."""
    shown = (*SCATTERED, "accuracy")
    why = "undefined at every exit"
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (
            variant.run, variant.label,
            *(Quantity(variant.metrics.get(metric, nan), undefined=why) for metric in shown),
            *(Quantity(variant.gains[gain], undefined="no threshold within the budget") for gain in GAINS),
        )
        for variant in study.variants
    )  # fmt: skip
    headings = (*(f"{_label(metric)}, %" for metric in shown), *(f"{label}, %" for label in GAIN_LABELS.values()))
    return Table(
        name="proxy_variants", title="Metrics and gains of each variant", note="Metrics are means over the exits.",
        columns=("run", "variant", *headings), rows=rows,
    )  # fmt: skip


def proxy_pictures(study: ProxyStudy) -> list[Picture]:
    """Scatter plots of the main metrics against accuracy at the 50 % budget, or the area where none has that budget."""
    half = any(not isnan(variant.gains["accuracy_50"]) for variant in study.variants)
    gain = "accuracy_50" if half else "area"
    return [
        Picture(f"proxy_{metric}", f"{_label(metric)} against {GAIN_LABELS[gain]}, one point per variant.",
                partial(draw_scatter, study, metric, gain))
        for metric in SCATTERED
    ]  # fmt: skip


def draw_scatter(study: ProxyStudy, metric: str, gain: str, figure: Figure) -> None:
    """One point per variant, colored by run where there are few."""
    axes: Any = figure.add_subplot()
    runs = list(dict.fromkeys(variant.run for variant in study.variants))
    for variant in study.variants:
        x, y = variant.metrics.get(metric, float("nan")), variant.gains.get(gain, float("nan"))
        color = series_style(runs.index(variant.run))["color"] if len(runs) <= 8 else MUTED
        axes.plot([x], [y], "o", color=color, markersize=3.5, alpha=0.7)
    rho = next(one for one in study.correlations if (one.metric, one.gain) == (metric, gain))
    axes.set(
        xlabel=f"mean {_label(metric)} of the exits, %", ylabel=f"{GAIN_LABELS[gain]}, %",
        title=f"Spearman {_shown(rho)}",
    )  # fmt: skip
    percent(axes.xaxis)
    percent(axes.yaxis)


def variants_of_run(run: str, *, overrides: Sequence[str] = (), device: str = "cpu") -> list[Variant]:
    """Variants of one run, computed once and stored in its folder.

    Raises:
        DataError: One exit only, or no validation data.
    """
    target = open_target(run, overrides=overrides, device=device)
    if target.run is None or len(target.run.network.heads) < 2:
        raise DataError(f"{run}: has one exit only; train with strategy='... + exits'")
    if target.splits.validation is None or not len(target.splits.validation):
        raise DataError(f"{run}: has no validation data; train with benchmark.validation=0.1")
    file, key = target.folder / "exits" / "proxy.json", fingerprint(target, None)
    stored = _stored(file, key)
    if stored is not None:
        return stored
    network = target.run.network
    validation, test = collect_scores(target, "validation"), collect_scores(target, "test")
    found = variants_of_scores(
        run, validation, test, cost_K=cumulative_macs(network), backbone_cost=backbone_macs(network)
    )
    results = target.folder / "results.json"
    if results.is_file():
        # The last experience is the run at its end, which the scores above describe.
        found += variants_of_records(run, Result.from_json(results).exits[:-1])
    write_atomically(file, json.dumps({"key": key, "variants": to_plain([asdict(v) for v in found])}) + "\n")
    return found


def _stored(file: Path, key: str) -> list[Variant] | None:
    try:
        content = read_json(file)
        if content["key"] != key:
            return None
        return [read_record(Variant, each) for each in content["variants"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(folder: Path, name: str, content: Any, tables: Sequence[Table], pictures: Sequence[RenderedPicture]) -> Path:
    """Render everything, then write; the JSON file last."""
    files: dict[str, str | bytes] = {}
    for table in tables:
        files |= {f"{table.name}.{ending}": render(table) for ending, render in FORMATS}
    for picture in pictures:
        files |= {f"{picture.name}.svg": picture.svg, f"{picture.name}.png": picture.png}
    files[name] = json.dumps(content, indent=1) + "\n"
    write_files(folder, files)
    return folder / name


def _shown(one: Correlation) -> str:
    if isnan(one.rho):
        return "-"
    return f"{one.rho:+.2f}" + ("" if isnan(one.low) else f" ({one.low:+.2f} to {one.high:+.2f})")


def _label(metric: str) -> str:
    return LABELS.get(metric, metric)


def _difference_label(name: str) -> str:
    first, second = name.split(" - ")
    return f"|{_label(first)}| - |{_label(second)}|"
