"""Training of one cell, in whatever process a launcher has started."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from clframe.errors import ClframeError, DivergenceError, reason_of
from clframe.run_folder import RunFolder
from clframe.sweep.cells import read_cell, record_attempt
from clframe.sweep.locks import claim

if TYPE_CHECKING:
    from clframe.build import Setup


class Outcome(NamedTuple):
    """The end of an attempt to train a cell."""

    state: Literal["done", "failed", "locked"]
    """``locked``: another process trains it."""
    reason: str = ""
    """One line that says why it failed."""
    folder: str = ""
    """The run folder of a finished cell."""


def run_cell(
    sweep: Path,
    key: str,
    *,
    wait: float = 0.0,
    on_built: Callable[[Setup], None] | None = None,
    on_evaluated: Callable[[Any], None] | None = None,
) -> Outcome:
    """Train a cell from its newest checkpoint, and record how that ended; a finished one is left as it is.

    Args:
        sweep: Folder of the sweep.
        key: Of the cell.
        wait: Seconds to wait for a cell that another process trains, which may be one that has just been killed.
        on_built: As for :func:`clframe.run`.
        on_evaluated: As for :func:`clframe.run`.

    Raises:
        Interrupted: A signal has stopped the run, which has saved.
    """
    cell = read_cell(sweep, key)
    until = time.monotonic() + wait
    while True:
        with claim(sweep, key) as mine:
            if cell.finished():
                return Outcome("done", folder=str(cell.folder))
            if mine and not RunFolder(cell.folder).is_locked():  # by clframe run --resume
                from clframe.api import run

                start = time.monotonic()
                failed, diverged = "", False
                try:
                    run(cell.config, folder=cell.folder, on_built=on_built, on_evaluated=on_evaluated)
                except ClframeError as error:
                    failed, diverged = reason_of(error), isinstance(error, DivergenceError)
                except Exception as error:  # other cells go on
                    import traceback

                    traceback.print_exc()
                    failed = f"{type(error).__name__}: {reason_of(error, most=300)}"
                seconds = time.monotonic() - start
                record_attempt(sweep, key, seconds=seconds, failed=failed, diverged=diverged)
                return Outcome("failed", failed) if failed else Outcome("done", folder=str(cell.folder))
        if time.monotonic() >= until:
            return Outcome("locked")
        time.sleep(1.0)
