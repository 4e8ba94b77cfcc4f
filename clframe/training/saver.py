"""Checkpoints inside the experiences of a session: when they are written, and how training continues from one."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clframe.accounting import DevicePeak, Energy, EnergyMeter, Ledger
from clframe.config.periods import Period
from clframe.config.typed import same_config
from clframe.data.benchmark import Benchmark
from clframe.data.digests import refuse_other_data
from clframe.errors import RunFolderError, reason_of
from clframe.training.checkpoint import encode, load_inside, remove_inside, save_inside
from clframe.training.cost_recorder import CostRecorder
from clframe.training.inside import Boundary, Position, Resumption, Schedule
from clframe.training.monitor import Monitor
from clframe.training.stopping import DeferredSignals
from clframe.training.strategy import LightningStrategy
from clframe.training.trained import describe_data, recorded_digest

_log = logging.getLogger(__name__)


class TrainingMeter:
    """Seconds, energy and peak memory of training an experience, in a ``with`` block and before it was resumed.

    Args:
        device: Device that trains.
    """

    def __init__(self, device: torch.device) -> None:
        self._energy, self._peak = EnergyMeter(device), DevicePeak(device)
        self._start = time.perf_counter()
        self._before: Mapping[str, Any] = {"seconds": 0.0, "joules": 0.0, "peak": 0}
        self._finished = False

    def __enter__(self) -> TrainingMeter:
        self._start = time.perf_counter()
        self._energy.__enter__()
        self._peak.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._energy.__exit__()
        self._peak.__exit__()
        self._finished = True

    @property
    def seconds(self) -> float:
        """Seconds until now."""
        passed: float = self._before["seconds"] + time.perf_counter() - self._start
        return passed

    @property
    def energy(self) -> Energy:
        """Energy until now or the end; without joules where any part of it was not read."""
        now, before = self._energy.energy if self._finished else self._energy.read(), self._before["joules"]
        joules = None if now.joules is None or before is None else before + now.joules
        return Energy(joules, now.energy_source)

    @property
    def peak_bytes(self) -> int | None:
        """Largest memory until now or the end; None where it is not measured."""
        now = self._peak.bytes if self._finished else self._peak.read()
        return None if now is None else max(now, self._before["peak"])

    def state_dict(self) -> dict[str, Any]:
        """Return what has been measured until now."""
        return {"seconds": self.seconds, "joules": self.energy.joules, "peak": self.peak_bytes or 0}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Add what was measured before."""
        self._before = dict(state)


class ExperienceSaver:
    """Writes checkpoints inside experiences, ends a run there on a signal, and continues from one.

    Args:
        strategy: The strategy; its boundaries are observed.
        benchmark: The stream.
        costs: The recorder, whose ledger is saved.
        monitor: Live output.
        folder: Folder of checkpoints.
        config: The resolved config as text; a checkpoint of another one is refused.
        period: When to write; None only on a signal.
        foreign: Names of plugins or callbacks whose state cannot be saved; with any, nothing is written.
        writes: Whether this process writes and handles signals; the others of several devices only read.
    """

    def __init__(
        self,
        strategy: LightningStrategy,
        benchmark: Benchmark,
        costs: CostRecorder,
        monitor: Monitor,
        *,
        folder: Path,
        config: str,
        period: Period | None,
        foreign: str = "",
        writes: bool = True,
    ) -> None:
        assert strategy.module is not None
        self.stop = DeferredSignals()
        self.writes = writes
        self._strategy, self._benchmark = strategy, benchmark
        self._costs, self._monitor = costs, monitor
        self._guard = strategy.module.divergence
        self._folder, self._config = folder, config
        self._schedule = Schedule(period)
        self._foreign = foreign
        self._reported = False
        self._index, self._parts, self._first_step = 0, 1, 0
        self._baseline: dict[str, Any] | None = None
        self._meter = TrainingMeter(strategy.device)
        if writes:
            strategy.on_boundary = self._reach
        if foreign and period is not None:
            _log.info("trainer.checkpoint: none inside experiences, as checkpoints lack the state of %s", foreign)

    # --- called by the session --------------------------------------------------------------------

    def begin(
        self, index: int, *, parts: int, step: int, meter: TrainingMeter, baseline: dict[str, Any] | None
    ) -> None:
        """Start an experience.

        Args:
            index: Its index.
            parts: Number of small experiences that it consists of; 1 unless the stream is online.
            step: Steps of the run before it.
            meter: Measures its training.
            baseline: The evaluation of the untrained network, as a checkpoint stores it.
        """
        self._index, self._parts, self._first_step = index, parts, step
        self._meter, self._baseline = meter, baseline
        self._strategy.part = 0
        self._schedule.begin(step)

    def finish(self) -> None:
        """Delete the checkpoints inside an experience that has been saved as a whole."""
        assert self.writes
        remove_inside(self._folder, finished=self._index + 1)

    def load(self, *, finished: int) -> dict[str, Any] | None:
        """Return the newest checkpoint inside the experience after ``finished`` ones, or None.

        Raises:
            RunFolderError: It is of another config or of other data, or contradicts itself.
        """
        if self.writes:  # left by a kill between writing the last one and deleting them
            remove_inside(self._folder, finished=finished)
        content = load_inside(self._folder, finished=finished, device=self._strategy.device)
        if content is None:
            return None
        refuse_other_config(content, self._config, folder=self._folder)
        if "data" in content:  # not in one of an earlier version
            refuse_other_samples(content, self._benchmark, folder=self._folder, begun=finished + 1)
        try:
            position = Position.of(content["position"])
            if position.experience != finished:
                raise ValueError(f"experience={position.experience} after {finished}")
            if type(content["steps"]) is not int or content["steps"] < position.step:
                raise ValueError(f"steps={content['steps']!r}")
            unlogged = content["monitor"]["unlogged"]
            if type(unlogged) is not int or not 0 <= unlogged <= position.step:
                raise ValueError(f"unlogged={unlogged!r}")
        except (LookupError, TypeError, ValueError) as error:
            raise _unfit(content["file"], error) from error
        return content

    def resume(self, content: Mapping[str, Any], parts: list[Any]) -> list[Any]:
        """Prepare the strategy to continue from a checkpoint; returns the parts of the experience that are left."""
        position = Position.of(content["position"])
        strategy = self._strategy
        if position.part >= len(parts) or position.epoch > strategy.train_epochs:
            raise _unfit(content["file"], ValueError(f"position {position}"))
        self._schedule.begin(content["steps"])
        if position.part:
            try:
                strategy.enter_part(position.part, parts[0], content["strategy"])
            except RESTORE_ERRORS as error:
                raise _unfit(content["file"], error) from error
            self._restore_records(content)
        else:
            strategy.resumption = Resumption(position, partial(self._restore, content), content["strategy"])
        return parts[position.part :]

    # --- called by the strategy -------------------------------------------------------------------

    def _reach(self, boundary: Boundary) -> None:
        """Write a checkpoint if one is due or a signal has come, and end the run on a signal."""
        stop = self.stop
        if boundary == "begin":
            stop.deferring = True
            self._check_state()
            return
        step = int(self._strategy.clock.train_iterations)
        if stop.requested is not None or self._schedule.is_due(boundary, step):
            can = "no" if self._foreign else self._strategy.can_save(boundary)
            if can == "now":
                self._save(boundary, step)
            last = boundary == "trained" and self._strategy.part + 1 == self._parts
            if stop.requested is not None and (can != "soon" or last):
                stop.stop()
        if boundary == "trained":
            stop.deferring = False  # consolidation may last

    def _check_state(self) -> None:
        """Report a state that a checkpoint cannot hold, once, rather than end a run for it."""
        if self._foreign:
            return
        learner = self._strategy.learner
        assert learner is not None
        live = {id(parameter): name for name, parameter in learner.network.named_parameters()}
        for name, state in learner.state.items():
            try:
                encode(state, live=live)
            except RunFolderError as error:
                self._foreign = f"component {name}"
                _log.warning("component '%s': %s; no checkpoints are written inside experiences", name, error)

    def _save(self, boundary: Boundary, step: int) -> None:
        start = time.perf_counter()
        position = self._strategy.position(boundary, experience=self._index, step=step - self._first_step)
        content = {
            "config": self._config,
            "data": describe_data(self._benchmark),
            "torch": str(torch.__version__),
            "position": asdict(position),
            "steps": step,
            "baseline": self._baseline,
            "strategy": self._strategy.capture(boundary),
            "monitor": self._monitor.state_dict(),
            "costs": self._costs.state_dict(),
            "ledger": self._costs.ledger.as_tree(),
            "guard": self._guard.state_dict(),
            "meter": self._meter.state_dict(),
        }
        path = save_inside(self._folder, content, finished=self._index, step=position.step)
        seconds = time.perf_counter() - start
        self._schedule.add(step, seconds=seconds)
        if not self._reported or self.stop.requested is not None:
            self._reported = True
            if self.stop.requested is not None:
                self._monitor.log.note(f"saved at {position}")
            _log.info("saved at %s (%.3f MB, %.0f ms)", position, path.stat().st_size / 1e6, 1e3 * seconds)

    def _restore(self, content: Mapping[str, Any]) -> None:
        try:
            self._strategy.restore(content["strategy"])
        except RESTORE_ERRORS as error:
            raise _unfit(content["file"], error) from error
        self._restore_records(content)

    def _restore_records(self, content: Mapping[str, Any]) -> None:
        try:
            self._costs.load_state_dict(content["costs"])
            self._costs.ledger = Ledger.of(content["ledger"])
            self._monitor.load_state_dict(content["monitor"])
            self._guard.load_state_dict(content["guard"])
            self._meter.load_state_dict(content["meter"])
        except RESTORE_ERRORS as error:
            raise _unfit(content["file"], error) from error


RESTORE_ERRORS = (LookupError, TypeError, ValueError, AttributeError, RuntimeError)
"""Errors that restoring a damaged or foreign content may raise."""


def refuse_other_config(content: Mapping[str, Any], config: str, *, folder: Path) -> None:
    """Refuse a checkpoint of another config.

    Args:
        content: The checkpoint.
        config: The resolved config of the run as text.
        folder: Folder of checkpoints.

    Raises:
        RunFolderError: The configs differ.
    """
    if content.get("config") != config and not same_config(str(content.get("config")), config):
        raise RunFolderError(f"{folder}: was written by another config; resume with the run's own config.yaml")


def refuse_other_samples(content: Mapping[str, Any], benchmark: Benchmark, *, folder: Path, begun: int) -> None:
    """Refuse to continue a run on other data than it has begun with.

    Args:
        content: The checkpoint.
        benchmark: The stream as it is now.
        folder: Folder of checkpoints.
        begun: Number of experiences whose training has begun. Training samples of later ones may differ, unless the
            normalization, which is measured on training samples, differs with them.

    Raises:
        RunFolderError: The data differ.
    """
    now, before = describe_data(benchmark), content.get("data")
    same = isinstance(before, Mapping) and all(before.get(key) == now[key] for key in ("mean", "std"))
    refuse_other_data(
        benchmark.digest, recorded_digest(content), where=str(folder.parent),
        advice="restore the data to continue it, or start a new run", begun=begun if same else None,
    )  # fmt: skip


def _unfit(file: Any, error: Exception) -> RunFolderError:
    reason = reason_of(error, most=200)
    return RunFolderError(f"{file}: does not fit this run ({reason}); delete it to resume from the checkpoint before")
