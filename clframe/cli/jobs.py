"""The number of runs that one command trains at a time, ``--jobs N``, and the share of each."""

from __future__ import annotations

import math
from collections.abc import Sequence
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


def parse_per_device(text: str) -> int:
    """Parse ``--per-device``."""
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 6 else 0
    if not 1 <= number <= MOST_JOBS:
        raise ConfigError(f"--per-device: found '{text}'; give a number from 1 to {MOST_JOBS}")
    return number


@dataclass(frozen=True)
class Plan:
    """Number of processes at a time, and their shares.

    Attributes:
        jobs: Processes at a time.
        threads: CPU threads of each, unless ``trainer.threads`` says otherwise.
        memory_share: Largest share of its CUDA device's memory of each; None sets no bound.
        reason: One line that says what was chosen and why.
        devices: Names of the CUDA devices that processes are assigned to; empty leaves all of them visible.
    """

    jobs: int
    threads: int
    memory_share: float | None
    reason: str
    devices: tuple[str, ...] = ()

    def next_device(self, used: Sequence[str | None]) -> str | None:
        """Return the device with the fewest processes, the first of several; None without devices.

        >>> plan = Plan(3, 1, None, "", devices=("0", "1"))
        >>> plan.next_device([]), plan.next_device(["0"]), plan.next_device(["0", "1"])
        ('0', '1', '0')
        """
        return min(self.devices, key=used.count) if self.devices else None


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
    *,
    runs: int,
    jobs: int | None,
    cores: int,
    threads: int | None,
    memory: Memory | None = None,
    devices: Sequence[str] = (),
    per_device: int | None = None,
) -> Plan:
    """Choose the number of processes.

    ``auto`` on a CPU is ``cores // threads of one run``. On CUDA it is, for each device, the free memory divided by
    that of one run, at most :data:`MOST_CHOSEN`, and at most one process a core on all devices. A run that records
    graphs is taken to need twice the memory of its eager steps, since graphs have a separate memory pool, and of such
    runs at most :data:`MOST_CAPTURED` are chosen.

    Args:
        runs: Number of runs.
        jobs: Processes at a time; None chooses.
        cores: CPU cores available.
        threads: ``trainer.threads`` of the config.
        memory: Of one run on CUDA, where it was measured.
        devices: Several CUDA devices, to which processes are assigned in turn.
        per_device: Processes on one device at a time; None chooses.

    Raises:
        ConfigError: More jobs than ``per_device`` allows.

    >>> choose_jobs(runs=8, jobs=None, cores=6, threads=2).reason
    '3 runs at a time (auto): 6 cores, 2 threads each'
    >>> choose_jobs(runs=8, jobs=4, cores=8, threads=None).reason
    '4 runs at a time: 8 cores, 2 threads each'
    >>> choose_jobs(runs=8, jobs=None, cores=8, threads=1, devices=("0", "1"), per_device=2).reason
    '4 runs at a time: 8 cores, 1 thread each, 2 devices'
    """
    count = max(1, len(devices))
    how, why, usable = "" if jobs or per_device else " (auto)", "", USED
    if jobs is not None and per_device is not None and jobs > per_device * count:
        raise ConfigError(
            f"--jobs: found {jobs}, but {count} device{'s' if count > 1 else ''} with --per-device {per_device} "
            f"take {per_device * count}; leave one of them out"
        )
    if jobs is not None:
        jobs = min(jobs, runs)
    elif per_device is not None:
        jobs = min(runs, per_device * count)
    elif memory is None:
        jobs = max(1, min(runs, cores // (threads or 1)))
    else:
        free = memory.free + CONTEXT_BYTES
        usable *= free / memory.total
        each = memory.peak * (2 if memory.captured else 1) + CONTEXT_BYTES
        fit = math.floor(USED * free / each)
        most = MOST_CAPTURED if memory.captured else MOST_CHOSEN
        jobs = max(1, min(runs, cores, min(fit, most) * count))
        why = (
            f"; a short run reserved {_gib(memory.peak)} of {_gib(memory.free)} GiB free, counted "
            f"{'twice for its graphs, ' if memory.captured else ''}with {_gib(CONTEXT_BYTES)} for CUDA: {fit} fit, "
            f"at most {most} are used{', since graphs fill the device' if memory.captured else ''}"
        )
    share = threads or max(1, cores // jobs)
    over = ", more than the cores" if jobs * share > cores else ""
    runs_at, each_has = "1 run" if jobs == 1 else f"{jobs} runs", f"{share} thread{'s' if share > 1 else ''} each"
    several = f", {count} devices" if count > 1 else ""
    reason = f"{runs_at} at a time{how}: {cores} core{'s' if cores > 1 else ''}, {each_has}{over}{several}{why}"
    here = -(-jobs // count)
    return Plan(jobs, share, None if here == 1 else usable / here, reason, tuple(devices) if count > 1 else ())


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
