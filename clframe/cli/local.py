"""Cells of a sweep in processes of this machine."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from clframe.cli.jobs import Memory, Plan, choose_jobs
from clframe.cli.pool import Pool, PoolStopped
from clframe.cli.processes import RunProcess, Task
from clframe.cli.side_by_side import SHORT, is_captured
from clframe.config.typed import to_yaml
from clframe.environment import available_cores
from clframe.errors import ClframeError, ConfigError
from clframe.results import Result
from clframe.sweep.cells import Cell, read_attempts, record_attempt


class LocalLauncher:
    """Trains cells in processes of this machine, which share its cores and its CUDA devices.

    Args:
        quiet: Whether to print errors and warnings only.
        jobs: Processes at a time; None chooses.
        per_device: Processes on one CUDA device at a time; None chooses.
    """

    def __init__(self, *, quiet: bool, jobs: int | None, per_device: int | None) -> None:
        self._quiet, self._jobs, self._per_device = quiet, jobs, per_device
        self._pool = Pool(quiet=quiet)
        self.reported: set[str] = set()
        self._plan: Plan | None = None
        self._memory: Memory | None = None
        self._measured = False

    @property
    def jobs(self) -> int:
        """Processes at a time, as far as known."""
        return self._plan.jobs if self._plan is not None else self._jobs or max(1, int(available_cores()))

    def launch(self, cells: Sequence[Cell]) -> None:
        """Train cells, and return when each has been tried once; see :class:`~clframe.sweep.driver.Launcher`."""
        plan = self._choose(cells)
        if not self._quiet and (self._plan is None or plan.reason != self._plan.reason):
            self._pool.say(plan.reason)
        self._plan = plan
        by_key = {cell.key: cell for cell in cells}
        before = {key: read_attempts(cell.sweep, key).count for key, cell in by_key.items()}
        ended = 0

        def end(run: RunProcess) -> None:
            nonlocal ended
            cell = by_key[str(run.task.key)]
            if run.reason is not None and read_attempts(cell.sweep, cell.key).count == before[cell.key]:
                record_attempt(cell.sweep, cell.key, seconds=0.0, failed=run.reason)  # its process could not
            ended += not run.locked
            self._report(run, cell, f"{ended}/{len(cells)}")

        tasks = [self._task(cell, plan) for cell in cells]
        try:
            self._pool.run(tasks, plan, on_ended=end)
        except PoolStopped:
            raise KeyboardInterrupt from None

    def _report(self, run: RunProcess, cell: Cell, count: str) -> None:
        if run.reason is not None:
            self._pool.say(f"clframe: error: {run.task.label}: {run.reason}", error=True)
            self.reported.add(cell.key)
        elif run.folder is not None and not self._quiet:
            accuracy = Result.from_json(cell.results).score("final_average_accuracy").value
            self._pool.say(f"{count}  {run.task.label}: {100 * accuracy:.1f} %, {cell.folder}")

    def _task(self, cell: Cell, plan: Plan) -> Task:
        block = json.dumps(asdict(cell.config.benchmark), sort_keys=True, default=str)
        request = {
            "sweep": str(cell.sweep), "cell": cell.key, "quiet": self._quiet, "measure": False,
            "memory_share": plan.memory_share, "command": list(sys.argv), "bars": self._pool.bars,
        }  # fmt: skip
        reads = hashlib.sha256(block.encode()).hexdigest()
        return Task(cell.key, f"{cell.label}, seed {cell.seed}", request, reads=reads)

    def _choose(self, cells: Sequence[Cell]) -> Plan:
        devices = _cuda_devices(cells)
        if self._per_device is not None and not devices:
            raise ConfigError(
                f"--per-device: found {self._per_device}, but no cell trains on CUDA here; leave it out and use --jobs"
            )
        if self._jobs is None and self._per_device is None and devices and len(cells) > 1 and not self._measured:
            self._measured, self._memory = True, self._measure(cells, devices[0])
        # A device index in a config is one of those that are visible without an assignment.
        assigned = all(cell.config.trainer.devices == 1 for cell in cells)
        given = [cell.config.trainer.threads for cell in cells]
        threads = None if None in given else max(number for number in given if number is not None)
        return choose_jobs(
            runs=len(cells), jobs=self._jobs, cores=max(1, int(available_cores())), threads=threads,
            memory=self._memory, devices=devices if assigned else (), per_device=self._per_device,
        )  # fmt: skip

    def _measure(self, cells: Sequence[Cell], device: str) -> Memory | None:
        """Measure a short run of the first cell; all others are taken to need as much."""
        with tempfile.TemporaryDirectory(prefix="clframe-") as folder:
            config = Path(folder) / "config.yaml"
            config.write_text(to_yaml(cells[0].config), encoding="utf-8")
            request = {
                "config": str(config), "overrides": list(SHORT), "output": folder, "quiet": True, "measure": True,
                "memory_share": None, "command": list(sys.argv), "bars": False,
            }  # fmt: skip
            run = self._pool.measure(Task("measurement", "measurement", request), device=device)
        if run.reason is not None:
            raise ClframeError(run.reason)
        found = run.found or {}
        if not found.get("peak"):
            return None
        captured = any(is_captured(cell.config) for cell in cells)
        return Memory(peak=found["peak"], free=found["free"], total=found["total"], captured=captured)


def _cuda_devices(cells: Sequence[Cell]) -> tuple[str, ...]:
    """Names of the visible CUDA devices; none if no cell trains on CUDA."""
    if all(cell.config.trainer.accelerator not in ("auto", "cuda", "gpu") for cell in cells):
        return ()
    import torch

    if not torch.cuda.is_available():
        return ()
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    count = torch.cuda.device_count()
    return tuple(visible[:count]) if visible else tuple(map(str, range(count)))
