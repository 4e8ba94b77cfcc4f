"""Cells on a Ray cluster: one task of Ray core a cell; see https://docs.ray.io.

The folder of the sweep is one that all nodes see. A task whose node or process dies is started again by Ray, on any
node, and continues the cell from its last checkpoint.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

from clframe.errors import ConfigError, Interrupted, UnsupportedError, nearest, reason_of
from clframe.own_code import allow_imports, allowed_packages
from clframe.sweep.cells import Cell, record_attempt
from clframe.sweep.locks import STALE
from clframe.sweep.work import run_cell

OPTIONS: Final[Mapping[str, Any]] = {"address": "auto", "cpus": 1.0, "gpus": 0.0, "retries": 3}
"""Options with their defaults. ``cpus`` of a task are also its threads; ``gpus`` may be a share such as 0.25."""


class Say(Protocol):
    """Prints a line."""

    def __call__(self, text: str, *, error: bool = False) -> None:
        """Print ``text``, on stderr if it is an error."""


class RayLauncher:
    """Trains cells as tasks of a Ray cluster.

    Args:
        address: Of the cluster; ``auto`` is the one of this machine or of ``RAY_ADDRESS``, ``local`` starts one here.
        cpus: CPUs of a task.
        gpus: GPUs of a task, or a share of one.
        retries: How often a task is started again whose node or process has died.
        say: Prints lines.
    """

    def __init__(self, *, address: str, cpus: float, gpus: float, retries: int, say: Say) -> None:
        self._address, self._cpus, self._gpus, self._retries = address, cpus, gpus, retries
        self._say = say
        self.reported: set[str] = set()

    @classmethod
    def of(cls, given: Mapping[str, str], *, say: Say) -> RayLauncher:
        """Return the launcher with options as texts.

        Raises:
            ConfigError: An unknown option, or a value of another type.
            UnsupportedError: Ray is not installed.
        """
        values = read_options(given, OPTIONS)
        _import()
        return cls(**values, say=say)

    @property
    def jobs(self) -> int:
        """Tasks that the CPUs of the cluster take at a time."""
        ray = _import()
        self._connect(ray)
        return max(1, int(ray.cluster_resources().get("CPU", 1) // max(self._cpus, 1)))

    def launch(self, cells: Sequence[Cell]) -> None:
        """Train cells, and return when each has been tried once; see :class:`~clframe.sweep.driver.Launcher`."""
        ray = _import()
        self._connect(ray)
        task = ray.remote(train).options(
            num_cpus=self._cpus, num_gpus=self._gpus, max_retries=self._retries, name="clframe sweep"
        )
        packages = allowed_packages()
        waiting = {task.remote(str(c.sweep.resolve()), c.key, os.getcwd(), packages): c for c in cells}
        try:
            while waiting:
                ready, _ = ray.wait(list(waiting), num_returns=1, timeout=1)
                for reference in ready:
                    self._end(ray, reference, waiting.pop(reference), f"{len(cells) - len(waiting)}/{len(cells)}")
        except KeyboardInterrupt:
            for reference in waiting:
                ray.cancel(reference)  # interrupts the task, which saves
            ray.wait(list(waiting), num_returns=len(waiting), timeout=60)
            raise

    def _connect(self, ray: Any) -> None:
        if ray.is_initialized():
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster started here reports its usage otherwise
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # tasks without GPUs see none
        dashboard = False if self._address == "local" else None
        try:
            ray.init(address=self._address, log_to_driver=False, include_dashboard=dashboard)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = reason_of(error, most=200)
            raise UnsupportedError(
                f"--launcher ray: no cluster at address {self._address} ({reason}); start one with `ray start --head`, "
                f"or give --launcher-option address=local"
            ) from None
        self._check(ray)

    def _check(self, ray: Any) -> None:
        for name, wanted in (("CPU", self._cpus), ("GPU", self._gpus)):
            most = max((node["Resources"].get(name, 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
            if wanted > most:
                raise ConfigError(
                    f"--launcher-option {name.lower()}s: found {wanted:g}, but nodes have at most {most:g}; give less"
                )

    def _end(self, ray: Any, reference: Any, cell: Cell, count: str) -> None:
        try:
            state, reason = ray.get(reference)
        except ray.exceptions.RayError as error:
            state, reason = "failed", f"Ray: {type(error).__name__}: {reason_of(error, most=300)}"
            record_attempt(cell.sweep, cell.key, seconds=0.0, failed=reason)
        self.reported |= {cell.key} if state == "failed" else set()
        say_end(self._say, cell, state=state, reason=reason, count=count)


def say_end(say: Say, cell: Cell, *, state: str, reason: str, count: str) -> None:
    """Print how the attempt to train a cell on a cluster ended, if it has finished or failed."""
    name = f"{cell.label}, seed {cell.seed}"
    if state == "failed":
        say(f"clframe: error: {name}: {reason}", error=True)
    elif state == "done":
        say(f"{count}  {name}: finished, {cell.folder}")


def train(sweep: str, key: str, directory: str, packages: Sequence[str] = ()) -> tuple[str, str]:
    """Train a cell in a process of a cluster; returns the end of the attempt and the reason of a failure.

    Args:
        sweep: Folder of the sweep.
        key: Of the cell.
        directory: Working directory of the sweep, from which paths in configs count.
        packages: Packages whose code configs may name; see :mod:`clframe.own_code`.
    """
    if not Path(sweep).is_dir():
        return "failed", f"{socket.gethostname()} does not see {sweep}; give a --folder that all nodes share"
    if os.path.isdir(directory):
        os.chdir(directory)
    try:
        with allow_imports(packages):  # a lock to wait for may be that of a process that has died with its machine
            outcome = run_cell(Path(sweep), key, wait=STALE + 30)
    except Interrupted:
        return "stopped", ""
    return outcome.state, outcome.reason


def read_options(given: Mapping[str, str], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as the types of their defaults.

    Raises:
        ConfigError: An unknown option, or a value of another type.

    >>> read_options({"cpus": "2"}, {"cpus": 1.0, "retries": 3})
    {'cpus': 2.0, 'retries': 3}
    """
    values = dict(known)
    for key, text in given.items():
        if key not in known:
            close = nearest(key, known)
            advice = f"did you mean '{close}'?" if close else f"options are {', '.join(known)}"
            raise ConfigError(f"--launcher-option: unknown option '{key}'; {advice}")
        kind = type(known[key])
        try:
            values[key] = kind(text)
            fine = kind is str or 0 <= values[key] < 10**6
        except ValueError:
            fine = False
        if not fine:
            what = "a whole number" if kind is int else "a number"
            raise ConfigError(f"--launcher-option {key}: found '{text}'; give {what} from 0")
    return values


def _import() -> Any:
    try:
        import ray
    except ImportError:
        raise UnsupportedError("--launcher ray: ray is not installed; pip install 'clframe[ray]'") from None
    return ray
