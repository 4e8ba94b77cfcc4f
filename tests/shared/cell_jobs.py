"""A cell of perf/cells.py and what runs it in another process, which imports this module: hence nothing heavy here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """A cell that writes the number of its process, or fails."""

    label: str
    seed: int = 0


def done(job: Job, out: Path) -> Path | None:
    """The file of a job that has been run."""
    file = out / job.label
    return file if file.exists() else None


def run(job: Job, out: Path) -> Path:
    """Write the process's number; a job named ``killed`` ends its process, one named ``wrong`` raises."""
    if job.label == "killed":
        os._exit(9)
    if job.label == "wrong":
        raise ValueError("no such data")
    file = out / job.label
    file.write_text(str(os.getpid()))
    return file
