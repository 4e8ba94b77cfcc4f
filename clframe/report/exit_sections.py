"""Sections of a report about the exits of one group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from clframe.plotting.style import RenderedPicture
from clframe.report.exit_tables import (
    budgets_table,
    decisions_table,
    exits_table,
    failure_table,
    similarity_table,
    unique_table,
)
from clframe.report.page import Section
from clframe.results import Result
from clframe.tables import Table

PICTURES: Final = {
    "exits": ("accuracy_cost", "exit_usage", "exit_accuracy"),
    "overthinking": ("exit_decisions",),
    "unique accuracy": ("exit_metrics",),
    "CKA": ("exit_similarity",),
    "calibration": ("exit_failure_prediction",),
}
"""Names of the figures of each section, by its name in the list of contents."""


def exit_sections(
    results: Sequence[Result], pictures: Sequence[RenderedPicture], *, of: str, prefix: str
) -> list[Section]:
    """Make the sections of cost and accuracy, overthinking, unique accuracy, similarity and calibration.

    Args:
        results: One per seed.
        pictures: Rendered figures of :func:`~clframe.report.figures.exit_pictures`; may be empty.
        of: Appended to the titles, the group's label where there are several groups.
        prefix: Start of the names of the pictures.

    Returns:
        Those sections that have a table; none for a network with one exit.
    """
    if len(results[0].exit_names) < 2 or not all(result.exits for result in results):
        return []
    by_name = {picture.name.removeprefix(prefix): picture for picture in pictures}
    sections = []
    for short, title, shown in (
        ("exits", "Exits: accuracy and cost", [budgets_table(results), exits_table(results)]),
        ("overthinking", "Overthinking and oracle", [decisions_table(results)]),
        ("unique accuracy", "Unique accuracy", [unique_table(results)]),
        ("CKA", "Similarity of representations (CKA) over experiences", [similarity_table(results)]),
        ("calibration", "Calibration and failure prediction", [failure_table(results)]),
    ):
        tables: list[Table] = [table for table in shown if table is not None]
        if tables:
            drawn = [by_name[name] for name in PICTURES[short] if name in by_name]
            sections.append(Section(title=f"{title}{of}", short=short, level=2, pictures=drawn, tables=tables))
    return sections
