"""Writing of a report, once, or repeatedly while runs are in progress."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clframe.errors import ClframeError, RunFolderError
from clframe.exits.plots import exit_images
from clframe.files import require_writable, to_path, write_atomically
from clframe.plotting.images import confusion_image, matrix_image
from clframe.plotting.style import encode_png
from clframe.report.comparison import group_runs
from clframe.report.content import make_page, trains
from clframe.report.families import choose_reference, members
from clframe.report.loading import Config, Run, find_runs, load_run
from clframe.report.page import render_page
from clframe.results import Result
from clframe.run_states import RunState, read_state
from clframe.sparsity.plots import activity_image
from clframe.tables import to_csv, to_latex, to_markdown

if TYPE_CHECKING:
    from clframe.plotting.style import PixelArray

FORMATS = (("csv", to_csv), ("md", to_markdown), ("tex", to_latex))


def write_report(
    runs: Sequence[str | Path] | str | Path,
    *,
    output: str | Path | None = None,
    watch: bool = False,
    against: str | None = None,
    all_figures: bool = False,
    every: float = 3.0,
    on_written: Callable[[Path], None] | None = None,
) -> Path:
    """Write the report of runs: ``report.html``, ``tables/`` and ``figures/``; returns the path of the page.

    Args:
        runs: Run folders, or folders above them, which select all finished runs below.
        output: Folder to write to; None uses ``report`` in the one folder given, or in the parent of several.
        watch: Whether to include unfinished runs, and to rewrite the report as long as one of them trains.
        against: Name or strategy of the group that the others are compared with; None compares strategies with exits
            with the same strategy without them, and the tables of differences with the group that most others are
            comparable with, the first one of several.
        all_figures: Whether all groups get their own figures, however many there are.
        every: Seconds between two checks of the folders, with ``watch``.
        on_written: Called with the page's path each time it has been written.

    Raises:
        ClframeError: No run, a run that is damaged, not finished or of a newer schema, runs that cannot be compared,
            or a reference that is not one group of several.
    """
    paths = [to_path(run, where="report") for run in ([runs] if isinstance(runs, (str, Path)) else runs or ())]
    if not paths:
        raise RunFolderError("report: no run given; give a run folder, such as the one clframe run printed")
    folder = _folder(paths) if output is None else Path(output)
    seen: dict[Path, float | str] | None = None
    failed = False
    while True:
        stamps = _stamps(paths)
        if stamps != seen:
            try:
                page, goes_on = _write(paths, folder, watch=watch, against=against, all_figures=all_figures)
            except RunFolderError:
                # A checkpoint may be deleted between listing and reading; a damaged file fails the next time too.
                if seen is None or failed:
                    raise
                failed = True
            else:
                seen, failed = stamps, False
                if on_written is not None:
                    on_written(page)
                if not goes_on:
                    return page
        time.sleep(every)


def _folder(paths: Sequence[Path]) -> Path:
    if len(paths) == 1:
        return paths[0] / "report"
    above = os.path.commonpath([path.resolve() for path in paths])
    return Path(os.path.relpath(above)) / "report"


def _stamps(paths: Sequence[Path]) -> dict[Path, float | str]:
    """Return the modification times of the files that a report reads, and the states of unfinished runs."""
    found: dict[Path, float | str] = {}
    for group in find_runs(paths):
        for path in group:
            for name in ("results.json", "metrics.csv", "checkpoints"):
                if (path / name).exists():
                    found[path / name] = (path / name).stat().st_mtime
            if path / "results.json" not in found:
                found[path] = _state(path).state
    return found


def _state(path: Path) -> RunState:
    return read_state(path, now=time.time())


def _write(
    paths: Sequence[Path], folder: Path, *, watch: bool, against: str | None, all_figures: bool
) -> tuple[Path, bool]:
    """Write everything once; returns the page and whether a run trains."""
    finished, unfinished, notices = _load(paths, watch=watch)
    states = [(run, _state(run.path)) for run in unfinished]
    goes_on = any(trains(state) for _, state in states)
    groups, more = group_runs(finished) if finished else ([], [])
    groups = [member.group for member in members(groups)]
    try:
        reference = None if against is None else choose_reference(groups, against)
    except ClframeError as error:
        if not goes_on:
            raise
        reference = None  # it may be in progress
        more.append(f"{error}. Runs are in progress; each strategy is compared with its own base until then.")
    require_writable(folder)  # drawing takes longest
    page, files = make_page(groups, states, [*notices, *more], reference=reference, all_figures=all_figures)
    for below in (folder / "tables", folder / "figures"):
        try:
            below.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(
                f"output: {below} cannot be created ({error.strerror}); choose another --output"
            ) from None
    # Not synced: there may be thousands of tables, and all of them can be made again.
    for name, table in files.tables.items():
        for ending, text in FORMATS:
            write_atomically(folder / "tables" / f"{name}.{ending}", text(table), sync=False)
    for figure in files.pictures:
        write_atomically(folder / "figures" / f"{figure.name}.svg", figure.svg, sync=False)
        write_atomically(folder / "figures" / f"{figure.name}.png", figure.png, sync=False)
    write_atomically(folder / "report.html", render_page(page))
    return folder / "report.html", goes_on


def _load(paths: Sequence[Path], *, watch: bool) -> tuple[list[Run], list[Run], list[str]]:
    given, below = find_runs(paths)
    configs: dict[str, Config] = {}
    runs = [(load_run(path, configs), path in given) for path in [*given, *below]]
    finished = [run for run, _ in runs if run.finished]
    unfinished = [(run, named) for run, named in runs if not run.finished]
    if watch:
        return finished, [run for run, _ in unfinished], []
    for run, named in unfinished:
        if named:
            raise RunFolderError(
                f"{run.path}: not finished, results.json is missing; resume with clframe run --resume {run.path}, or "
                f"follow it with --watch"
            )
    if not finished:
        raise ClframeError(f"{paths[0]}: no run below it is finished; follow them with --watch")
    return finished, [], [f"{run.path} is not finished and was omitted." for run, _ in unfinished]


def write_figures(result: Result, folder: Path, drawn: Mapping[str, PixelArray] | None = None) -> None:
    """Write ``accuracy_matrix.png`` and ``confusion_matrix.png``, ``neurons.png`` and ``exits_*.png`` where recorded.

    The accuracy matrix has rows after experience i, columns on test experience j; the confusion matrix has rows for
    true classes, columns for predicted ones.

    Args:
        result: The result of the run.
        folder: Folder of the figures.
        drawn: Figures by name that have been drawn of the same numbers and are not drawn again.
    """
    folder.mkdir(exist_ok=True)
    pictures = dict(drawn or {})
    if "accuracy_matrix" not in pictures:
        pictures["accuracy_matrix"] = matrix_image(result.accuracy_matrix)
    if result.confusion and "confusion_matrix" not in pictures:
        names = [result.class_label(c) for c in result.class_order]
        pictures["confusion_matrix"] = confusion_image(result.confusion, names=names)
    neurons = activity_image(result.activity) if result.activity and "neurons" not in pictures else None
    if neurons is not None:
        pictures["neurons"] = neurons
    if len(result.exit_names) > 1 and "exits_curve" not in pictures:
        images = exit_images(result.exits, names=result.exit_names)
        pictures.update({f"exits_{name}": image for name, image in images.items()})
    for name, picture in pictures.items():
        write_atomically(folder / f"{name}.png", encode_png(picture))
