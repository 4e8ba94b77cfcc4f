"""A session: one run through a stream, experience by experience, that can be stopped and resumed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from clframe.accounting import DevicePeak, EnergyMeter, Ledger
from clframe.config.typed import same_config
from clframe.data.benchmark import Benchmark
from clframe.errors import RunFolderError
from clframe.exits.diagnostics import ExitRecord
from clframe.metrics import Tally
from clframe.sparsity.activity import ActivityRecord
from clframe.training.checkpoint import decode, load_latest, nbytes, save_checkpoint
from clframe.training.cost_recorder import CostRecorder
from clframe.training.evaluation import ActivityRecorder, ExitRecorder, Scores
from clframe.training.monitor import Monitor
from clframe.training.prediction_cost import policy_of
from clframe.training.strategy import LightningStrategy
from clframe.training.tensorboard import TensorBoard
from clframe.training.trained import describe_data

_log = logging.getLogger(__name__)


@dataclass
class Progress:
    """Results of a run so far; every checkpoint contains them."""

    finished: int = 0
    steps: int = 0
    train_seconds: float = 0.0
    baseline: Tally | None = None
    tallies: list[Tally] = field(default_factory=list)
    exits: list[ExitRecord] = field(default_factory=list)
    activity: list[ActivityRecord] = field(default_factory=list)
    loss_terms: list[dict[str, float]] = field(default_factory=list)
    diverged: list[str] = field(default_factory=list)
    """One line for each experience whose losses or weights were not finite."""


class Session:
    """Trains and evaluates on every experience of a benchmark and writes a checkpoint after each.

    Args:
        strategy: Built with a :class:`~clframe.training.module.ContinualModule` and ``benchmark``.
        benchmark: The stream.
        scores: The plugin of ``strategy`` that counts correct predictions.
        monitor: Live output.
        checkpoints: Folder for checkpoints; None writes none.
        config: The resolved config as text; a checkpoint of another one is refused.
        on_evaluated: Called with the progress after every experience.

    Attributes:
        ledger: Costs of the run so far; every checkpoint contains it.
    """

    def __init__(
        self,
        strategy: LightningStrategy,
        benchmark: Benchmark,
        *,
        scores: Scores,
        monitor: Monitor,
        checkpoints: Path | None = None,
        config: str = "",
        on_evaluated: Callable[[Progress], None] | None = None,
    ) -> None:
        assert strategy.learner is not None
        self.strategy, self.benchmark, self.learner = strategy, benchmark, strategy.learner
        self.progress = Progress()
        self._scores, self._monitor = scores, monitor
        self._watch = ExitRecorder(benchmark, scores)
        self._activity = ActivityRecorder(benchmark)
        self._folder, self._config = checkpoints, config
        self._on_evaluated = on_evaluated
        self.ledger = Ledger()
        self._costs = CostRecorder(self.learner, self.ledger)
        strategy.plugins.append(self._costs)
        strategy.on_step = monitor.on_step
        assert strategy.module is not None
        self._guard = guard = strategy.module.divergence
        self.progress.diverged = guard.found
        monitor.on_losses = lambda means, index, step: guard.check_losses(means, experience=index, step=step)

    def resume(self) -> int:
        """Resume from the newest checkpoint; returns the number of finished experiences (0: there is none)."""
        content = None if self._folder is None else load_latest(self._folder, device=self.strategy.device)
        if content is None:
            return 0
        if content.get("config") != self._config and not same_config(str(content.get("config")), self._config):
            raise RunFolderError(
                f"{self._folder}: was written by another config; resume with the run's own config.yaml"
            )
        try:
            self._restore(content)
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise RunFolderError(
                f"{self._folder}: the newest checkpoint does not fit this run ({reason}); delete it to resume "
                f"from the one before"
            ) from error
        return self.progress.finished

    def _restore(self, content: Mapping[str, Any]) -> None:
        learner = self.learner
        _check_counts(content, experiences=len(self.benchmark))
        learner.network.load_state_dict(content["network"])
        self.strategy.model.to(self.strategy.device)
        learner.past = tuple(content["past"])
        learner.state = decode(content["components"], learner.network)
        exits = [ExitRecord.of(record) for record in content["exits"]]
        self.progress = Progress(
            finished=content["finished"],
            steps=content["steps"],
            train_seconds=content["train_seconds"],
            baseline=_tally(content["baseline"]),
            tallies=[Tally(**t) for t in content["tallies"]],
            exits=exits,
            activity=_activity(content, finished=len(exits)),
            loss_terms=content["loss_terms"],
            diverged=self._guard.found,
        )
        self._guard.found[:] = content.get("diverged", ())
        self._watch.reference = content["taps"]
        self._activity.learnt = list(content.get("active", ()))
        if "ledger" in content:
            self.ledger = self._costs.ledger = Ledger.of(content["ledger"])
            # A checkpoint cannot hold its own size, so the row that follows it in an uninterrupted run is added here.
            self.ledger.add_bytes("checkpoint", bytes=content["file_bytes"], experience=self.progress.finished - 1)
        clock = self.strategy.clock
        clock.train_iterations = clock.total_iterations = self.progress.steps
        clock.train_exp_counter = self.benchmark.sub_experiences(self.progress.finished - 1).stop

    def run(self) -> Progress:
        """Train on the remaining experiences; returns the complete progress."""
        self._monitor.open(finished=self.progress.finished, steps=self.progress.steps)
        for index in range(self.progress.finished, len(self.benchmark)):
            if index == 0:
                self.progress.baseline = self._baseline()
            self._learn(index)
        return self.progress

    def write_hyper_parameters(self, values: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Write options, final metrics and costs to TensorBoard's HParams page, if TensorBoard is on."""
        if self._monitor.tensorboard is not None:
            last = len(self.benchmark) - 1
            costs = {
                "macs_per_prediction": self.ledger.predictions.mean(experience=last),
                "sparsity": self.progress.activity[-1].sparsity,
            }
            self._monitor.tensorboard.hyper_parameters(values, metrics={**metrics, **costs}, step=last)

    def close(self) -> None:
        """Close bar and files."""
        self._monitor.close()

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes of each component's state, by name."""
        return {name: nbytes(state) for name, state in self.learner.state.items()}

    def _learn(self, index: int) -> None:
        strategy, progress, monitor, benchmark = self.strategy, self.progress, self._monitor, self.benchmark
        stream = benchmark.avalanche.streams["train"]
        parts = [stream[i] for i in benchmark.sub_experiences(index)]  # one, unless the stream is online
        label = f"experience {index + 1}/{len(benchmark)} ({benchmark.title(index)})"
        monitor.begin_experience(index, label=label, steps=sum(map(strategy.count_steps, parts)))
        progress.train_seconds += self._train(parts, index)
        progress.loss_terms.append(monitor.end_experience())
        progress.steps = int(strategy.clock.train_iterations)
        start = time.perf_counter()
        progress.tallies.append(self._evaluate())
        monitor.log_accuracies(progress.tallies[-1].accuracy_E, step=progress.steps)
        self.ledger.add_time("evaluation", seconds=time.perf_counter() - start, experience=index)
        progress.activity.append(self._activity.record(self.learner.network, index))
        progress.exits.append(self._watch.record(strategy, index))
        self._costs.finish()
        progress.finished = index + 1
        if monitor.tensorboard is not None:
            try:
                self._draw(monitor.tensorboard)
            except Exception as error:  # the experience is trained: a failure to draw must not lose it
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                _log.warning("tensorboard: experience %d could not be drawn (%s)", index, reason)
        self._save()
        if self._on_evaluated is not None:
            self._on_evaluated(progress)

    def _draw(self, board: TensorBoard) -> None:
        progress, names = self.progress, self.learner.network.exit_names
        board.evaluation(progress.tallies, baseline=progress.baseline)
        costs, newest = self.ledger.predictions, progress.finished - 1
        macs, policy = costs.mean(experience=newest), policy_of(self.learner)
        board.predictions(costs, macs=macs, experience=newest, names=names, policy=policy is not None)
        board.activity(progress.activity)
        board.exits(progress.exits, names=names)
        board.write_layout(progress.finished)

    def _train(self, parts: list[Any], index: int) -> float:
        """Train on the parts of an experience; returns the seconds it took."""
        ledger, device = self.ledger, self.strategy.device
        start = time.perf_counter()
        self._costs.begin(index)
        with EnergyMeter(device) as meter, DevicePeak(device) as peak:
            self.strategy.train(parts, eval_streams=[[self.benchmark.evaluation_stream[index]]])
        self._monitor.flush(self.strategy)
        seconds = time.perf_counter() - start
        ledger.add_time("training", seconds=seconds, experience=index)
        ledger.add_energy(meter.energy, experience=index)
        if peak.bytes is not None:
            ledger.add_bytes("device_peak", bytes=peak.bytes, experience=index)
        return seconds

    def _baseline(self) -> Tally:
        """Accuracies at random initialization, with logits for the classes of the first experience."""
        self.learner.seed_everything("experience", 0)
        self.learner.network.grow(self.benchmark.classes[0])
        self.strategy.model.to(self.strategy.device)
        return self._evaluate()

    def _evaluate(self) -> Tally:
        self.strategy.eval(self.benchmark.evaluation_stream)
        assert self._scores.tally is not None
        return self._scores.tally

    def _save(self) -> None:
        if self._folder is None:
            return
        progress, learner = self.progress, self.learner
        content: Mapping[str, Any] = {
            "config": self._config,
            "torch": str(torch.__version__),
            "steps": progress.steps,
            "train_seconds": progress.train_seconds,
            "baseline": None if progress.baseline is None else asdict(progress.baseline),
            "tallies": [asdict(t) for t in progress.tallies],
            "exits": [asdict(record) for record in progress.exits],
            "activity": [asdict(record) for record in progress.activity],
            "taps": dict(self._watch.reference),
            "active": [dict(rates) for rates in self._activity.learnt],
            "data": describe_data(self.benchmark),
            "loss_terms": progress.loss_terms,
            "diverged": list(progress.diverged),
            "past": learner.past,
            "ledger": self.ledger.as_tree(),
            "network": dict(learner.network.state_dict()),
            "components": learner.state,
        }
        path = save_checkpoint(self._folder, content, finished=progress.finished)
        self.ledger.add_bytes("checkpoint", bytes=path.stat().st_size, experience=progress.finished - 1)


def _activity(content: Mapping[str, Any], *, finished: int) -> list[ActivityRecord]:
    if "activity" not in content:  # a checkpoint of an early version
        return [ActivityRecord()] * finished
    return [ActivityRecord.of(record) for record in content["activity"]]


def _tally(content: dict[str, Any] | None) -> Tally | None:
    return None if content is None else Tally(**content)


def _check_counts(content: Mapping[str, Any], *, experiences: int) -> None:
    """Refuse counts that contradict each other or the stream.

    Raises:
        ValueError: The field and its value.
    """
    finished = content["finished"]
    if type(finished) is not int or not 1 <= finished <= experiences:
        raise ValueError(f"finished={finished!r} of {experiences} experiences")
    for key in ("tallies", "exits", "loss_terms"):
        if len(content[key]) != finished:
            raise ValueError(f"{key} has {len(content[key])} entries after {finished} experiences")
    if type(content["steps"]) is not int or content["steps"] < 0:
        raise ValueError(f"steps={content['steps']!r}")
    if type(content["train_seconds"]) not in (int, float):
        raise ValueError(f"train_seconds={content['train_seconds']!r}")
