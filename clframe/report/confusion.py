"""Confusion matrices of runs: files, figures and the table of classes that are confused most.

Shape suffix: C classes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from clframe.data.npz import read_arrays
from clframe.errors import RunFolderError
from clframe.files import write_atomically
from clframe.metrics.statistics import mean
from clframe.plotting.images import class_shares, draw_confusion
from clframe.plotting.style import HEIGHT, Picture
from clframe.results import Result
from clframe.tables import Cell, Quantity, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILE = "confusion.npz"
"""File of a run folder with the counts of a run that has too many classes for ``results.json``."""
MOST_PAIRS = 10
"""Rows of the table of confused classes."""
LARGEST_TABLE = 30
"""Classes up to which the counts are a table of the report."""
LARGEST_WITH_DIGITS = 12
"""Classes up to which the figure of the page has its numbers drawn in."""

Counts = Sequence[Sequence[int]]
"""Samples by true class (rows) and predicted class (columns)."""


def write_confusion(counts_CC: Counts, class_order: Sequence[int], folder: Path) -> None:
    """Write ``confusion.npz`` into a run folder: ``counts`` and the classes of its rows, ``class_order``."""
    text = io.BytesIO()
    np.savez_compressed(
        text, counts=np.asarray(counts_CC, dtype=np.int32), class_order=np.asarray(class_order, dtype=np.int64)
    )
    write_atomically(folder / FILE, text.getvalue())


def read_confusion(folder: Path, result: Result) -> Counts:
    """Return the confusion matrix of a finished run, from its results or from ``confusion.npz``; empty without one.

    Raises:
        RunFolderError: A matrix that does not fit the classes of the run, or a damaged file.
    """
    classes, path = len(result.class_order), folder / FILE
    counts_CC: Counts = result.confusion
    where = folder / "results.json"
    if not counts_CC and path.is_file():
        where = path
        try:
            counts_CC = read_arrays(path, ["counts"])["counts"].tolist()
        except Exception:  # damaged archives raise anything from BadZipFile to UnicodeDecodeError
            raise RunFolderError(f"{path}: is damaged; delete it to report without it") from None
    if counts_CC and (len(counts_CC) != classes or any(len(row) != classes or min(row) < 0 for row in counts_CC)):
        raise RunFolderError(f"{where}: the confusion matrix does not fit class_order; restore the file or run again")
    return counts_CC


def merge_confusions(
    confusions: Sequence[Counts], orders: Sequence[Sequence[int]]
) -> tuple[list[list[float]], list[list[int]], list[int]]:
    """Return the mean shares and the summed counts of several runs, and the classes of their rows.

    Runs that learn the classes in one order are shown in it; those of different orders by class id.

    Args:
        confusions: One per run.
        orders: ``class_order`` of each run, which have the same classes.
    """
    order = list(orders[0]) if len({tuple(o) for o in orders}) == 1 else sorted(orders[0])
    aligned = []
    for counts_CC, own in zip(confusions, orders, strict=True):
        at = {c: i for i, c in enumerate(own)}
        aligned.append([[counts_CC[at[true]][at[predicted]] for predicted in order] for true in order])
    shares = [class_shares(counts_CC) for counts_CC in aligned]
    size = range(len(order))
    mean_CC = [[mean([one[i][j] for one in shares]) for j in size] for i in size]
    return mean_CC, [[sum(one[i][j] for one in aligned) for j in size] for i in size], order


def confusion_picture(
    shares_CC: Sequence[Sequence[float]], names: Sequence[str], *, prefix: str, seeds: int
) -> Picture:
    """Return the figure of the page."""
    over = f", mean over {seeds} seeds" if seeds > 1 else ""
    caption = f"Predicted class (columns), % of the test samples of each true class (rows), at the end{over}."
    height = min(6.0, max(HEIGHT, 1.2 + 0.32 * len(names)))

    def draw(figure: Figure) -> None:
        axes: Any = figure.add_subplot()
        draw_confusion(axes, shares_CC, names=names, most=LARGEST_WITH_DIGITS)

    return Picture(f"{prefix}confusion_matrix", caption, draw, height)


class Parts(NamedTuple):
    """The section of a report about the confusion matrix."""

    intro: str
    picture: Picture
    tables: list[Table]
    folded: list[Table]


def confusion_parts(results: Sequence[Result], confusions: Sequence[Counts], *, prefix: str) -> Parts | None:
    """Return the section for the runs of one group; None where a run has no matrix, or other classes.

    Args:
        results: One per run.
        confusions: The matrix of each run, empty where not recorded.
        prefix: Start of the name of the figure.
    """
    orders = [result.class_order for result in results]
    if not all(confusions) or len({tuple(sorted(order)) for order in orders}) > 1:
        return None
    shares_CC, counts_CC, order = merge_confusions(confusions, orders)
    names = [results[0].class_label(c) for c in order]
    known = "in the order in which they are learned" if order == list(orders[0]) else "by id"
    return Parts(
        f"{len(names)} classes, {known}.",
        confusion_picture(shares_CC, names, prefix=prefix, seeds=len(confusions)),
        [confused_table(shares_CC, counts_CC, names)],
        [counts_table(counts_CC, names)] if len(names) <= LARGEST_TABLE else [],
    )


def confused_table(shares_CC: Sequence[Sequence[float]], counts_CC: Counts, names: Sequence[str]) -> Table:
    """List the pairs of classes that are confused most, by share of the true class."""
    pairs = [
        (shares_CC[i][j], i, j)
        for i in range(len(names))
        for j in range(len(names))
        if i != j and counts_CC[i][j] and not math.isnan(shares_CC[i][j])
    ]
    pairs.sort(key=lambda pair: (-pair[0], pair[1], pair[2]))
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (names[i], names[j], Quantity(share), Quantity(counts_CC[i][j], kind="whole"))
        for share, i, j in pairs[:MOST_PAIRS]
    )
    note = "" if rows else "No test sample is predicted as a wrong class."
    columns = ("true class", "predicted class", "of the true class, %", "samples")
    return Table(name="confused_classes", title="Classes confused most", note=note, columns=columns, rows=rows)


def counts_table(counts_CC: Counts, names: Sequence[str]) -> Table:
    """Return the counts, true classes in rows."""
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (name, *(Quantity(count, kind="whole") for count in row)) for name, row in zip(names, counts_CC, strict=True)
    )
    return Table(name="confusion_matrix", title="Confusion matrix, samples", note="Rows are true classes.",
                 columns=("true class", *names), rows=rows)  # fmt: skip
