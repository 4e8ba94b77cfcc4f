"""Run all cells of a sweep through a launcher."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from clframe.sweep.cells import Cell, read_attempts, record_attempt
from clframe.sweep.locks import holder

POLL: Final = 2.0
"""Seconds between two looks at cells that other processes train."""
_MOST_LAUNCHES = 3


class Launcher(Protocol):
    """Trains cells somewhere."""

    reported: set[str]
    """Keys of cells whose failure it has printed."""

    @property
    def jobs(self) -> int:
        """Cells that are trained at a time, about."""

    def launch(self, cells: Sequence[Cell]) -> None:
        """Train cells, and return when each has been tried once.

        A launcher records the failure of a cell whose process has ended without doing so.

        Raises:
            KeyboardInterrupt: A signal has stopped them.
        """


def run_cells(
    cells: Sequence[Cell],
    launcher: Launcher,
    *,
    retry: bool = False,
    on_waiting: Callable[[Sequence[Cell]], None] | None = None,
) -> dict[str, str]:
    """Train the cells that are not finished; returns the reason of each that has failed, by key.

    Args:
        cells: The cells.
        launcher: What trains them.
        retry: Whether cells that failed before are tried again.
        on_waiting: Called once with the cells that other processes train, when only these are left.
    """
    launches: Counter[str] = Counter()
    waited = False
    while True:
        due, elsewhere = [], []
        for cell in cells:
            if cell.finished():
                continue
            if holder(cell.sweep, cell.key) is not None:
                elsewhere.append(cell)
            elif not read_attempts(cell.sweep, cell.key).failed or (retry and not launches[cell.key]):
                due.append(cell)
        for cell in due:
            launches[cell.key] += 1
            if launches[cell.key] > _MOST_LAUNCHES:
                record_attempt(cell.sweep, cell.key, seconds=0.0, failed="it ended without results or a reason")
        due = [cell for cell in due if launches[cell.key] <= _MOST_LAUNCHES]
        if due:
            launcher.launch(due)
        elif elsewhere:
            if not waited and on_waiting is not None:
                on_waiting(elsewhere)
            waited = True
            time.sleep(POLL)
        else:
            break
    return {cell.key: read_attempts(cell.sweep, cell.key).failed for cell in cells if not cell.finished()}
