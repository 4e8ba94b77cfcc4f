"""Cells as jobs of SLURM, through submitit; see https://github.com/facebookincubator/submitit.

The folder of the sweep is one that all nodes see. Before its time limit SLURM sends SIGUSR1 to a job: the run finishes
its step and saves, then submitit submits the job again, which continues from that checkpoint. ``cluster=local`` runs
the jobs as processes of this machine, to test a sweep without SLURM.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from clframe.errors import ConfigError, UnsupportedError, reason_of
from clframe.own_code import allowed_packages
from clframe.run_folder import SWEEP_RECORDS
from clframe.sweep.cells import Cell, record_attempt
from clframe.sweep.ray_launcher import Say, read_options, say_end, train

OPTIONS: Final[Mapping[str, Any]] = {
    "cluster": "slurm", "timeout_min": 240, "signal_delay_s": 120, "cpus": 1, "gpus": 0, "mem_gb": 0, "partition": "",
    "account": "", "qos": "", "constraint": "", "requeues": 1000,
}  # fmt: skip
"""Options with their defaults. ``signal_delay_s`` is the time before the limit at which a job is told to save."""
FEW_JOBS: Final = 2
"""Jobs at a time with ``cluster=local``, which has no queue, and candidates of a sampler, without ``--jobs``."""
SIGNAL: Final = "USR1"
"""A run that trains saves on this signal, and then calls the handler of submitit, which submits the job again."""
POLL: Final = 1.0


class SlurmLauncher:
    """Trains cells as jobs of SLURM.

    Args:
        options: See :data:`OPTIONS`.
        jobs: Jobs at a time; None leaves it to SLURM.
        say: Prints lines.
    """

    def __init__(self, options: Mapping[str, Any], *, jobs: int | None, say: Say) -> None:
        self._options, self._jobs, self._say = options, jobs, say
        self.reported: set[str] = set()

    @classmethod
    def of(cls, given: Mapping[str, str], *, jobs: int | None, say: Say) -> SlurmLauncher:
        """Return the launcher with options as texts.

        Raises:
            ConfigError: An unknown option, or a value of another type.
            UnsupportedError: submitit or SLURM is not there.
        """
        options = read_options(given, OPTIONS)
        if options["cluster"] not in ("slurm", "local"):
            raise ConfigError(f"--launcher-option cluster: found '{options['cluster']}'; give slurm or local")
        if options["signal_delay_s"] >= 60 * options["timeout_min"]:
            raise ConfigError(
                f"--launcher-option signal_delay_s: found {options['signal_delay_s']}, which is not below the limit of "
                f"{options['timeout_min']} min; give fewer seconds"
            )
        launcher = cls(options, jobs=jobs, say=say)
        _import()
        return launcher

    @property
    def jobs(self) -> int:
        """Jobs at a time: those given, or :data:`FEW_JOBS`."""
        return self._jobs or FEW_JOBS

    def launch(self, cells: Sequence[Cell]) -> None:
        """Train cells, and return when each has been tried once; see :class:`~clframe.sweep.driver.Launcher`."""
        executor = self._executor(cells[0].sweep)
        waiting, running = list(cells), dict[Any, Cell]()
        local = self._options["cluster"] == "local"
        most = self._jobs or (FEW_JOBS if local else len(cells))
        ended = 0
        try:
            while waiting or running:
                while waiting and (len(running) < most or not local):  # SLURM queues what is beyond its own limit
                    batch = [waiting.pop(0)] if local else [waiting.pop(0) for _ in range(len(waiting))]
                    running.update(zip(self._submit(executor, batch), batch, strict=True))
                for job in [job for job in running if job.done()]:
                    ended += 1
                    self._end(job, running.pop(job), f"{ended}/{len(cells)}")
                time.sleep(POLL)
        except KeyboardInterrupt:
            for job in running:
                with contextlib.suppress(Exception):  # of scancel, for a job that has just ended
                    job.cancel()
            raise

    def _executor(self, sweep: Path) -> Any:
        submitit, given = _import(), self._options
        folder = sweep / SWEEP_RECORDS / "submitit"
        if given["cluster"] == "local":  # AutoExecutor does not pass on the delay
            local = submitit.LocalExecutor(folder=folder, max_num_timeout=given["requeues"])
            local.update_parameters(
                timeout_min=given["timeout_min"], signal_delay_s=given["signal_delay_s"], gpus_per_node=given["gpus"]
            )
            return local
        try:
            executor = submitit.AutoExecutor(
                folder=folder, cluster="slurm", slurm_max_num_timeout=given["requeues"]
            )  # fmt: skip
        except RuntimeError as error:
            raise UnsupportedError(
                f"--launcher slurm: {' '.join(str(error).split())}; log in to a machine with sbatch"
            ) from None
        more = {f"slurm_{key}": given[key] for key in ("partition", "account", "qos", "constraint") if given[key]}
        more |= {"mem_gb": given["mem_gb"]} if given["mem_gb"] else {}
        more |= {"slurm_array_parallelism": self._jobs} if self._jobs else {}
        executor.update_parameters(
            timeout_min=given["timeout_min"], cpus_per_task=given["cpus"], gpus_per_node=given["gpus"],
            tasks_per_node=1, nodes=1, name="clframe-sweep", slurm_signal_delay_s=given["signal_delay_s"], **more,
        )  # fmt: skip
        return executor

    def _submit(self, executor: Any, cells: Sequence[Cell]) -> list[Any]:
        cpus = self._options["cpus"]
        here, packages = os.getcwd(), allowed_packages()
        tasks = [CellJob(str(c.sweep.resolve()), c.key, here, packages, threads=cpus) for c in cells]
        if len(tasks) == 1:
            return [executor.submit(tasks[0])]
        jobs: list[Any] = executor.submit_array(tasks)
        return jobs

    def _end(self, job: Any, cell: Cell, count: str) -> None:
        error = job.exception()
        state, reason = ("failed", "") if error is not None else job.result()
        if error is not None:
            reason = f"job {job.job_id}: {reason_of(error, most=300)}"
            record_attempt(cell.sweep, cell.key, seconds=0.0, failed=reason)
        self.reported |= {cell.key} if state == "failed" else set()
        say_end(self._say, cell, state=state, reason=reason, count=count)


class CellJob:
    """The function of a job, which submitit submits again at the time limit.

    Args:
        sweep: Folder of the sweep.
        key: Of the cell.
        directory: Working directory of the sweep.
        packages: Packages whose code configs may name.
        threads: CPU threads, unless ``trainer.threads`` says otherwise.
    """

    def __init__(self, sweep: str, key: str, directory: str, packages: Sequence[str], *, threads: int) -> None:
        self._arguments, self._threads = (sweep, key, directory, tuple(packages)), threads

    def __call__(self) -> tuple[str, str]:
        """Train the cell."""
        # submitit ignores SIGTERM, which scancel sends: the run then saves and ends.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        # Code that imports packages catches SystemExit, which the handler of submitit raises.
        signals = {getattr(signal, f"SIG{SIGNAL}")}
        signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        try:
            _import_all(max(1, self._threads))
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        return train(*self._arguments)

    def checkpoint(self) -> Any:
        """Return what is submitted again; called after the run has saved."""
        return _import().helpers.DelayedSubmission(self)


def _import_all(threads: int) -> None:
    """Import what a run needs, and set its number of threads."""
    import torch

    from clframe.config.files import REGISTRIES

    for module in ("clframe.api", "clframe.training.launch"):
        importlib.import_module(module)
    torch.set_num_threads(threads)
    for registry in REGISTRIES.values():
        registry.names()


def _import() -> Any:
    # Before the import, which reads it; jobs inherit it.
    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = SIGNAL
    try:
        import submitit
    except ImportError:
        raise UnsupportedError("--launcher slurm: submitit is not installed; pip install 'clframe[slurm]'") from None
    return submitit
