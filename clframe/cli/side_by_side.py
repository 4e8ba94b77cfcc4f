"""``clframe run --seeds A..B --jobs N``: the runs of several seeds in separate processes, N at a time.

Each process trains one seed as ``clframe run --seed`` would, and writes the same run folder; see
:mod:`clframe.cli.pool`. What the first run is refused for before it trains is said once, since all runs would be.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clframe.cli.jobs import Memory, Plan, choose_jobs
from clframe.cli.pool import Pool, PoolStopped
from clframe.cli.processes import RunProcess, Task
from clframe.environment import available_cores
from clframe.errors import ClframeError, Interrupted

if TYPE_CHECKING:
    from clframe.config.schema import Config

SHORT = ("trainer.fast_dev_run=2", "trainer.figures=none", "trainer.loggers=[]")
"""Overrides of a run that is measured; replay and teachers need memory from the second experience on."""


class SeedsInterrupted(Interrupted):
    """Runs of several seeds stopped by the user or by a signal.

    Args:
        commands: Commands that continue them.
    """

    def __init__(self, commands: Sequence[str]) -> None:
        KeyboardInterrupt.__init__(self, "interrupted")
        self.folder = Path()
        self.advice = "".join(["continue with", *(f"\n  {command}" for command in commands)])


class SideBySide:
    """Runs of one config with several seeds.

    Args:
        config: Name or file of the config.
        overrides: Those of every run.
        output: As for :func:`clframe.run`.
        quiet: Whether to print errors and warnings only.
        rest: The command that starts such runs, without its seeds: what continues those that were not started.
    """

    def __init__(
        self, config: str, overrides: Sequence[str], *, output: str | None, quiet: bool, rest: Sequence[str]
    ) -> None:
        self._pool = Pool(quiet=quiet)
        self._request = {
            "config": config, "overrides": list(overrides), "output": output, "quiet": quiet, "measure": False,
            "memory_share": None, "command": list(sys.argv), "bars": self._pool.bars,
        }  # fmt: skip
        self._quiet, self._rest = quiet, list(rest)

    def measure(self, seed: int, *, captured: bool) -> Memory | None:
        """Measure the memory of a short run; None where it does not run on CUDA.

        Raises:
            ClframeError: The run failed.
        """
        with tempfile.TemporaryDirectory(prefix="clframe-") as folder:
            run = self._pool.measure(self._task(seed, overrides=SHORT, output=folder, measure=True, quiet=True))
        if run.reason is not None:
            raise ClframeError(run.reason)
        found = run.found or {}
        if not found.get("peak"):
            return None
        return Memory(peak=found["peak"], free=found["free"], total=found["total"], captured=captured)

    def run(self, seeds: Sequence[int], chosen: Plan) -> dict[int, Path | None]:
        """Run all seeds; returns the folder of each finished run, and None for a failed one.

        Raises:
            ClframeError: The first run failed before it could train, as all would.
            SeedsInterrupted: The user or a signal stopped the runs, which have saved.
        """
        found: dict[int, Path | None] = dict.fromkeys(seeds)

        def end(run: RunProcess) -> None:
            seed = int(run.task.key)
            if seed == seeds[0] and not run.built:
                raise ClframeError(run.reason or "run: the first process ended; start again")
            found[seed] = run.folder
            self._report(run)

        tasks = [self._task(seed, memory_share=chosen.memory_share) for seed in seeds]
        try:
            self._pool.run(tasks, chosen, on_ended=end)
        except PoolStopped as stop:
            raise SeedsInterrupted(self._commands(stop)) from None
        return found

    def _task(self, seed: int, *, overrides: Sequence[str] = (), **changed: Any) -> Task:
        request = {**self._request, **changed}
        request["overrides"] = [*request["overrides"], f"seed={seed}", *overrides]
        return Task(seed, f"seed {seed}", request)

    def _commands(self, stop: PoolStopped) -> list[str]:
        """Return what continues the runs that were stopped, and starts those that have no folder yet."""
        stopped = [run for run in stop.started if run.folder is None and run.reason is None]
        left = [*(run.task for run in stopped if run.advice is None), *stop.waiting]
        commands = [run.advice.removeprefix("resume with ") for run in stopped if run.advice is not None]
        seeds = ",".join(str(seed) for seed in sorted(int(task.key) for task in left))
        return commands + ([shlex.join([*self._rest, "--seeds", seeds])] if left else [])

    def _report(self, run: RunProcess) -> None:
        if run.reason is not None:
            self._pool.say(f"clframe: error: {run.task.label}: {run.reason}", error=True)
        elif not self._quiet:
            self._pool.say(f"{run.task.label}: finished, {run.folder}")


def plan_runs(runs: SideBySide, config: Config, *, seeds: Sequence[int], jobs: int | None) -> Plan:
    """Choose the number of processes for a config; measures a short run where CUDA memory decides."""
    trainer, memory = config.trainer, None
    cores = max(1, int(available_cores()))
    if jobs is None and len(seeds) > 1 and trainer.accelerator in ("auto", "cuda", "gpu"):
        import torch

        if torch.cuda.is_available():
            memory = runs.measure(seeds[0], captured=is_captured(config))
    return choose_jobs(runs=len(seeds), jobs=jobs, cores=cores, threads=trainer.threads, memory=memory)


def is_captured(config: Config) -> bool:
    """Whether the steps of a run on CUDA are recorded as graphs."""
    from clframe.build import build_strategy

    recorded = all(component.capturable for component in build_strategy(config.strategy, config.components))
    return recorded and config.trainer.capture is not False and config.trainer.engine == "fabric"
