"""The state of a sweep as a table, which follows it on a terminal."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from clframe.cli.runs import format_age
from clframe.metrics.statistics import mean
from clframe.printable import printable
from clframe.run_states import read_state
from clframe.sweep.cells import Cell, cell_keys, label_cells, read_attempts, read_cell
from clframe.sweep.locks import holder
from clframe.tables import Quantity, Table, over_seeds, to_text

PERIOD: Final = 2.0
"""Seconds between two readings of the folder."""
IDLE: Final = 60.0
"""Seconds without a cell that trains after which the table is no longer followed: processes take seconds to start."""
STATES: Final = ("done", "running", "failed", "stopped", "waiting")
_MOST_FAILURES = 10


@dataclass(frozen=True, kw_only=True)
class CellState:
    """A cell and what is known about its run."""

    cell: Cell
    state: str
    """One of :data:`STATES`."""
    detail: str = ""
    """Place of a run, or the reason of a failure."""
    accuracy: float = math.nan
    seconds: float = math.nan
    """Wall time of a finished cell."""


def cell_state(cell: Cell, *, now: float) -> CellState:
    """Read the state of a cell."""
    attempts = read_attempts(cell.sweep, cell.key)
    if cell.finished():
        run = read_state(cell.folder, now=now)
        seconds = attempts.seconds or math.nan
        return CellState(cell=cell, state="done", detail=run.detail, accuracy=run.accuracy, seconds=seconds)
    begun = cell.folder.is_dir()
    detail = read_state(cell.folder, now=now).detail if begun else ""
    if holder(cell.sweep, cell.key) is not None:
        return CellState(cell=cell, state="running", detail=detail)
    if attempts.failed:
        return CellState(cell=cell, state="failed", detail=attempts.failed)
    return CellState(cell=cell, state="stopped" if begun else "waiting", detail=detail)


def time_left(states: Sequence[CellState]) -> float:
    """Estimate the seconds until all cells are done; NaN if none is or none is running.

    The mean wall time of finished cells, times those that are left, divided by those that are running.
    """
    done = [found.seconds for found in states if not math.isnan(found.seconds)]
    running = sum(found.state == "running" for found in states)
    left = sum(found.state in ("running", "stopped", "waiting") for found in states)
    return mean(done) * left / running if done and running else math.nan


def groups(states: Sequence[CellState]) -> dict[tuple[str, str], list[CellState]]:
    """Return the cells that differ in their seed only, by stage and label."""
    found: dict[tuple[str, str], list[CellState]] = {}
    for state in states:
        found.setdefault((state.cell.stage, state.cell.label), []).append(state)
    return found


def status_table(states: Sequence[CellState]) -> Table:
    """Return one row for each group of cells: how many are in each state, where they are, and their accuracy."""
    rows: list[tuple[str | Quantity, ...]] = []
    for (stage, label), cells in groups(states).items():
        counts = [sum(found.state == state for found in cells) for state in STATES]
        accuracies = {found.cell.seed: found.accuracy for found in cells if found.state == "done"}
        accuracy = over_seeds(accuracies) if accuracies else Quantity(math.nan)
        places = "; ".join(f"seed {f.cell.seed} {f.detail}" for f in cells if f.state == "running" and f.detail)
        name = f"{label} (selection)" if stage == "selection" else label
        rows.append((name, *(Quantity(count, kind="whole") for count in counts), accuracy, places))
    return Table(
        name="sweep", title=summary_line(states),
        columns=("cell", *STATES, "final average accuracy, %", "place"), rows=tuple(rows),
    )  # fmt: skip


def summary_line(states: Sequence[CellState]) -> str:
    """Return the counts of states and the time left in one line."""
    counts = {state: sum(found.state == state for found in states) for state in STATES}
    left = time_left(states)
    parts = [f"{count} {state}" for state, count in counts.items() if count or state in ("done", "running", "failed")]
    return f"{len(states)} cells: {', '.join(parts)}" + ("" if math.isnan(left) else f"; about {format_age(left)} left")


def failures(states: Sequence[CellState]) -> list[str]:
    """Return one line for each failed cell, the first ones of many."""
    failed = [f"{f.cell.label}, seed {f.cell.seed}: {f.detail}" for f in states if f.state == "failed"]
    more = [f"and {len(failed) - _MOST_FAILURES} more"] if len(failed) > _MOST_FAILURES else []
    return failed[:_MOST_FAILURES] + more


def show_status(sweep: Path) -> int:
    """Print the state of a sweep; on a terminal, with rich, it is followed until nothing is left or trains."""
    known: dict[str, Cell] = {}
    states = _read(sweep, known)
    if not sys.stdout.isatty() or not _is_left(states):
        print(_text(states))
        return 0
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:
        print(_text(states))
        print("clframe: a table that follows the sweep needs rich; pip install 'clframe[sweep]'", file=sys.stderr)
        return 0
    idle, console = 0.0, Console(file=sys.__stdout__)  # sys.stdout shows the codes that move the cursor as text
    live = Live(_rich_table(states), refresh_per_second=2, console=console, redirect_stdout=False)
    with contextlib.suppress(KeyboardInterrupt), live:
        while _is_left(states) and idle < IDLE:
            time.sleep(PERIOD)
            states = _read(sweep, known)
            idle = 0.0 if any(found.state == "running" for found in states) else idle + PERIOD
            live.update(_rich_table(states))
    return 0


def _is_left(states: Sequence[CellState]) -> bool:
    """Whether a cell is neither done nor failed."""
    return any(found.state not in ("done", "failed") for found in states)


def _read(sweep: Path, known: dict[str, Cell]) -> list[CellState]:
    now = time.time()
    for key in cell_keys(sweep):
        if key not in known:
            known[key] = read_cell(sweep, key)
    order = sorted(label_cells(list(known.values())), key=lambda cell: (cell.stage, cell.label, cell.seed))
    return [cell_state(cell, now=now) for cell in order]


def _text(states: Sequence[CellState]) -> str:
    lines = [f"failed: {line}" for line in failures(states)]
    return "\n".join([to_text(status_table(states)), *lines])


def _rich_table(states: Sequence[CellState]) -> Any:
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    content = status_table(states)
    table = RichTable(title=content.title)
    for name in content.columns:
        table.add_column(name)
    for row in content.rows:
        undefined = (isinstance(cell, Quantity) and math.isnan(cell.value) for cell in row)
        table.add_row(*(Text("-" if empty else printable(str(c))) for c, empty in zip(row, undefined, strict=True)))
    return Group(table, *(Text(printable(f"failed: {line}"), style="red") for line in failures(states)))


def print_summary(cells: Sequence[Cell]) -> None:
    """Print mean and deviation of the finished cells of each group."""
    now = time.time()
    found: Mapping[tuple[str, str], list[CellState]] = groups([cell_state(cell, now=now) for cell in cells])
    rows = tuple(
        (label, Quantity(len(done), kind="whole"), over_seeds({f.cell.seed: f.accuracy for f in done}))
        for (_, label), states in found.items() if (done := [f for f in states if f.state == "done"])
    )  # fmt: skip
    if rows:
        table = Table(
            name="sweep", title="Mean ± sample standard deviation over seeds",
            columns=("cell", "seeds", "final average accuracy, %"), rows=rows,
        )  # fmt: skip
        print(f"\n{to_text(table)}")
