"""Cells: runs that are done once, whoever asks how often, and go on where they were broken off.

A cell is a config, overrides and a seed; its folder is named by all three. A cell with results is read, one with a
checkpoint is resumed, any other is run. So the command that makes a table may be stopped and called again, by several
processes and on several machines that share the folder of results one after the other.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One run of a table."""

    label: str
    """The row it belongs to."""
    config: str
    overrides: tuple[str, ...]
    seed: int

    def folder(self, out: Path, *, unkeyed: Sequence[str] = ()) -> Path:
        """Its folder; overrides that begin like one of ``unkeyed`` (where data lie, say) do not change it."""
        kept = [text for text in self.overrides if not text.startswith(tuple(unkeyed))]
        digest = hashlib.sha256(json.dumps([self.config, kept]).encode()).hexdigest()[:12]
        return out / f"{self.label.replace(' ', '').replace('+', '-')}-{digest}" / f"seed{self.seed}"


UNKEYED = ("benchmark.data_dir=", "trainer.threads=", "trainer.accelerator=", "trainer.progress=", "trainer.loggers=")
"""Overrides that say where and how a cell is run, not what it is."""


def finished(cell: Cell, out: Path) -> Path | None:
    """The cell's results, if it has been run to its end."""
    return next(iter(sorted(cell.folder(out, unkeyed=UNKEYED).glob("*/*/results.json"))), None)


def run_cell(cell: Cell, out: Path) -> Path:
    """The cell's results, run or resumed where there are none yet."""
    import torch

    import clframe

    torch.set_num_threads(1)
    done = finished(cell, out)
    if done is not None:
        return done
    folder = cell.folder(out, unkeyed=UNKEYED)
    begun = sorted(folder.glob("*/*/checkpoints/experience_*.ckpt"))
    if begun:
        result = clframe.run(resume=begun[-1].parents[1])
    else:
        result = clframe.run(cell.config, [*cell.overrides, f"seed={cell.seed}"], output=folder)
    return Path(result.run_folder) / "results.json"


def run_cells(
    cells: Sequence[Any],
    out: Path,
    *,
    workers: int,
    run: Callable[[Any, Path], Path] = run_cell,
    done: Callable[[Any, Path], Path | None] = finished,
    share_processes: bool = False,
) -> Iterator[tuple[Any, Path]]:
    """Every cell with its results, finished ones first, the others as they end.

    A cell that fails is named when it fails, and again after all others have been run.

    Args:
        cells: What to run; each has a ``label`` and a ``seed``.
        out: Folder of the results.
        workers: Processes.
        run: Runs a cell and returns its results; a function of a module's top level.
        done: The results of a cell that has been run to its end.
        share_processes: Whether a process runs cell after cell; otherwise each cell has a process to itself, so that
            one that is killed takes no other with it.
    """
    waiting = []
    for cell in cells:
        results = done(cell, out)
        if results is None:
            waiting.append(cell)
        else:
            yield cell, results
    failures: list[str] = []
    start = run if share_processes else partial(_run_alone, run)
    with _processes(workers) if share_processes else ThreadPoolExecutor(workers) as pool:
        jobs = {pool.submit(start, cell, out): cell for cell in waiting}
        for job in as_completed(jobs):
            cell, error = jobs[job], job.exception()
            if error is None:
                yield cell, job.result()
            else:
                failures.append(f"{cell.label}, seed {cell.seed}: {error}")
                print(f"failed: {failures[-1]}", file=sys.stderr, flush=True)
    if failures:
        raise SystemExit("cells failed, call again to go on:\n" + "\n".join(failures))


def _processes(workers: int) -> Executor:
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def _run_alone(run: Callable[[Any, Path], Path], cell: Any, out: Path) -> Path:
    """Run a cell in a process that ends with it (an executor limits the calls of a process from Python 3.11 on only)."""
    with _processes(1) as process:
        return process.submit(run, cell, out).result()
