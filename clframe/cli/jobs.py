"""The number of runs that ``clframe run --seeds A..B --jobs N`` trains at a time, and the share of each."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from clframe.errors import ConfigError

MOST_JOBS: Final = 256
"""Bound on ``--jobs``: each is a process that imports torch."""
MOST_CHOSEN: Final = 8
"""Most processes on one CUDA device that ``--jobs auto`` chooses."""
MOST_CAPTURED: Final = 2
"""The same where steps are CUDA graphs: one process keeps the device busy, a second one trains while it evaluates."""
USED: Final = 0.9
"""Share of a device's memory that all processes together may use."""
CONTEXT_BYTES: Final = 600 * 2**20
"""Device memory of a process besides tensors: the CUDA context with its libraries."""


def parse_jobs(text: str) -> int | None:
    """Parse ``--jobs``; None is ``auto``.

    >>> parse_jobs("4"), parse_jobs("auto")
    (4, None)
    """
    if text == "auto":
        return None
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 6 else 0
    if not 1 <= number <= MOST_JOBS:
        raise ConfigError(f"--jobs: found '{text}'; give a number from 1 to {MOST_JOBS}, or auto")
    return number


@dataclass(frozen=True)
class Plan:
    """Number of processes at a time, and their shares.

    Attributes:
        jobs: Processes at a time.
        threads: CPU threads of each, unless ``trainer.threads`` says otherwise.
        memory_share: Largest share of the CUDA device's memory of each; None sets no bound.
        reason: One line that says what was chosen and why.
    """

    jobs: int
    threads: int
    memory_share: float | None
    reason: str


@dataclass(frozen=True)
class Memory:
    """Device memory of one run, measured, in bytes."""

    peak: int
    """Largest reservation for tensors."""
    free: int
    """Free before the run, when the context of its process exists."""
    total: int
    """Of the device."""
    captured: bool
    """Whether full runs record CUDA graphs, which the short run that was measured does not."""


def choose_jobs(
    *, seeds: int, jobs: int | None, cores: int, threads: int | None, memory: Memory | None = None
) -> Plan:  # fmt: skip
    """Choose the number of processes.

    ``auto`` on a CPU is ``cores // threads of one run``. On CUDA it is the free memory divided by that of one run, at
    most one process a core and :data:`MOST_CHOSEN`. A run that records graphs is taken to need twice the memory of its
    eager steps, since graphs have a separate memory pool, and of such runs at most :data:`MOST_CAPTURED` are chosen.

    Args:
        seeds: Number of runs.
        jobs: Processes at a time; None chooses.
        cores: CPU cores available.
        threads: ``trainer.threads`` of the config.
        memory: Of one run on CUDA, where it was measured.

    >>> choose_jobs(seeds=8, jobs=None, cores=6, threads=2).reason
    '3 runs at a time (auto): 6 cores, 2 threads each'
    >>> choose_jobs(seeds=8, jobs=4, cores=8, threads=None).reason
    '4 runs at a time: 8 cores, 2 threads each'
    """
    how, why, usable = "" if jobs else " (auto)", "", USED
    if jobs is not None:
        jobs = min(jobs, seeds)
    elif memory is None:
        jobs = max(1, min(seeds, cores // (threads or 1)))
    else:
        free = memory.free + CONTEXT_BYTES
        usable *= free / memory.total
        each = memory.peak * (2 if memory.captured else 1) + CONTEXT_BYTES
        fit = math.floor(USED * free / each)
        most = MOST_CAPTURED if memory.captured else MOST_CHOSEN
        jobs = max(1, min(seeds, cores, fit, most))
        why = (
            f"; a short run reserved {_gib(memory.peak)} of {_gib(memory.free)} GiB free, counted "
            f"{'twice for its graphs, ' if memory.captured else ''}with {_gib(CONTEXT_BYTES)} for CUDA: {fit} fit, "
            f"at most {most} are used{', since graphs fill the device' if memory.captured else ''}"
        )
    share = threads or max(1, cores // jobs)
    over = ", more than the cores" if jobs * share > cores else ""
    runs, each_has = "1 run" if jobs == 1 else f"{jobs} runs", f"{share} thread{'s' if share > 1 else ''} each"
    reason = f"{runs} at a time{how}: {cores} core{'s' if cores > 1 else ''}, {each_has}{over}{why}"
    return Plan(jobs, share, None if jobs == 1 else usable / jobs, reason)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
