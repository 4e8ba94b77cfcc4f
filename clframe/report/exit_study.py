"""The section of a report with the study of a run's exits, where ``clframe analyze exits`` has made one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from clframe.exits.output import pictures, read_study, tables
from clframe.plotting.style import RenderedPicture, render_picture
from clframe.report.loading import Run
from clframe.report.page import Section
from clframe.tables import Table

FILE = "exits/exits.json"
"""File of a run folder with the study."""

SHOWN = ("exit_metrics", "exit_budgets")
"""Tables that are shown at first; the others are collapsed."""


def exit_study_section(
    runs: Sequence[Run], *, title: str, prefix: str, drawn: bool = True
) -> tuple[Section | None, list[RenderedPicture], list[Table]]:
    """Make the section of the first run that has a study, with the figures and tables that are also files.

    Everything is drawn from the numbers in ``exits.json``; figures in the run folder are not read.

    Raises:
        RunFolderError: A study that cannot be read.
    """
    run = next((run for run in runs if (run.path / FILE).is_file()), None)
    if run is None:
        return None, [], []
    study = read_study(run.path / FILE)
    rendered = [render_picture(p) for p in pictures(study, prefix=f"{prefix}study_")] if drawn else []
    made = [replace(table, name=f"study_{table.name}") for table in tables(study)]
    shown = [table for table in made if table.name.removeprefix("study_") in SHOWN]
    folded = [table for table in made if table not in shown]
    intro = f"clframe analyze exits, seed {run.seed}: {study.samples} test samples."
    section = Section(
        title=title, short="study of exits", level=2, intro=intro, pictures=rendered, tables=shown, folded=folded
    )
    return section, rendered, made
