"""A session: one run through a stream, experience by experience, that can be stopped and resumed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from clframe.accounting import Ledger
from clframe.config.periods import Period
from clframe.config.typed import same_config
from clframe.data.benchmark import Benchmark
from clframe.errors import ClframeError, DivergenceError, RunFolderError
from clframe.exits.diagnostics import ExitRecord
from clframe.metrics import Tally
from clframe.metrics.confusion import MOST_SHOWN
from clframe.records import as_tree
from clframe.sparsity.activity import ActivityRecord
from clframe.training.budget import TOLERANCE, ExperienceCost
from clframe.training.checkpoint import decode, load_latest, nbytes, save_checkpoint
from clframe.training.cost_recorder import CostRecorder
from clframe.training.evaluation import ActivityRecorder, ExitRecorder, Scores
from clframe.training.experience_cost import count_costs
from clframe.training.inside import Position
from clframe.training.monitor import Monitor
from clframe.training.pictures import draw_pictures, exit_usage, figures_of
from clframe.training.prediction_cost import policy_of
from clframe.training.saver import ExperienceSaver, TrainingMeter
from clframe.training.strategy import LightningStrategy
from clframe.training.tensorboard import TensorBoard
from clframe.training.trained import describe_data

if TYPE_CHECKING:
    from clframe.plotting.style import PixelArray

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
    """Empty where activity is not recorded."""
    loss_terms: list[dict[str, float]] = field(default_factory=list)
    diverged: list[str] = field(default_factory=list)
    """One line for each experience whose losses or weights were not finite."""
    skipped: list[int] = field(default_factory=list)
    """Updates skipped in each experience; empty unless ``trainer.on_nonfinite`` is ``skip``."""
    confusion_CC: Tensor | None = None
    """Test samples by true and predicted class after the last experience; None before it."""


class Session:
    """Trains and evaluates on every experience of a benchmark and writes a checkpoint after each.

    Args:
        strategy: Built with a :class:`~clframe.training.module.ContinualModule` and ``benchmark``.
        benchmark: The stream.
        scores: The plugin of ``strategy`` that counts correct predictions.
        monitor: Live output.
        checkpoints: Folder for checkpoints; None writes none.
        config: The resolved config as text; a checkpoint of another one is refused.
        period: When checkpoints inside an experience are written; None only when a signal ends the run.
        figures: When TensorBoard's pictures are drawn: after the last experience, after every one, or never.
        record_activity: Whether to record active neurons and experts; None: where a component changes their activity.
        foreign: Names of plugins and callbacks whose state checkpoints inside an experience cannot hold.
        on_evaluated: Called with the progress after every experience.

    Attributes:
        figures: Figures of the newest experience that have been drawn for TensorBoard, by name.
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
        period: Period | None = None,
        figures: Literal["end", "experience", "none"] = "end",
        record_activity: bool | None = None,
        foreign: str = "",
        on_evaluated: Callable[[Progress], None] | None = None,
    ) -> None:
        assert strategy.learner is not None
        self.strategy, self.benchmark, self.learner = strategy, benchmark, strategy.learner
        self.progress = Progress()
        self._scores, self._monitor = scores, monitor
        self._watch = ExitRecorder(benchmark, scores)
        self._activity = ActivityRecorder(benchmark)
        changed = any(component.changes_activity for component in self.learner.composition)
        self._records_activity = changed if record_activity is None else record_activity
        self._figures = figures
        self.figures: Mapping[str, PixelArray] = {}
        self._folder, self._config = checkpoints, config
        self._on_evaluated = on_evaluated
        self._costs = CostRecorder(self.learner, Ledger())
        strategy.plugins.append(self._costs)
        strategy.on_step = monitor.on_step
        assert strategy.module is not None
        self._guard = guard = strategy.module.divergence
        self.progress.diverged = guard.found
        monitor.on_losses = lambda means, index, step: guard.check_losses(means, experience=index, step=step)
        self._writes = strategy.group is None or strategy.group.is_first
        self._inside: Mapping[str, Any] | None = None
        self._saver: ExperienceSaver | None = None
        if checkpoints is not None:
            self._saver = ExperienceSaver(
                strategy, self._costs, monitor, folder=checkpoints, config=config, period=period, foreign=foreign,
                writes=self._writes,
            )  # fmt: skip

    @property
    def ledger(self) -> Ledger:
        """Costs of the run so far; every checkpoint contains them."""
        return self._costs.ledger

    @property
    def position(self) -> Position | None:
        """The place inside an experience where the run continues after :meth:`resume`; None between experiences."""
        return None if self._inside is None else Position.of(self._inside["position"])

    def resume(self) -> int:
        """Resume from the newest checkpoint; returns the number of finished experiences (0: there is none)."""
        if self._folder is None or self._saver is None:
            return 0
        group = self.strategy.group
        # The first process deletes what a kill has left behind.
        with nullcontext() if group is None else group.first_before_others():
            content = load_latest(self._folder, device=self.strategy.device)
            if content is not None:
                self._resume_after(content)
            self._inside = self._saver.load(finished=self.progress.finished)
        if self._inside is not None:
            self.progress.baseline = _tally(self._inside["baseline"])
        if group is not None:
            step = 0 if self.position is None else self.position.step
            found = {"checkpoints": 1e9 * self.progress.finished + step}
            group.check_equal(found, where="where they resume", advice="keep other processes from the run folder")
        return self.progress.finished

    def _resume_after(self, content: Mapping[str, Any]) -> None:
        """Restore the checkpoint of a finished experience.

        Raises:
            RunFolderError: It is of another config, or does not fit.
        """
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

    def _restore(self, content: Mapping[str, Any]) -> None:
        learner = self.learner
        _check_counts(content, experiences=len(self.benchmark))
        learner.network.load_state_dict(content["network"])
        self.strategy.model.to(self.strategy.device)
        learner.past = tuple(content["past"])
        learner.state = decode(content["components"], learner.network)
        if learner.average is not None:
            learner.average.load_state_dict(content.get("average"), learner.network)
        exits = [ExitRecord.of(record) for record in content["exits"]]
        self.progress = Progress(
            finished=content["finished"],
            steps=content["steps"],
            train_seconds=content["train_seconds"],
            baseline=_tally(content["baseline"]),
            tallies=[Tally(**t) for t in content["tallies"]],
            exits=exits,
            activity=_activity(content, finished=len(exits)) if self._records_activity else [],
            loss_terms=content["loss_terms"],
            diverged=self._guard.found,
            skipped=list(content.get("skipped", ())),
            confusion_CC=content.get("confusion") if content["finished"] == len(self.benchmark) else None,
        )
        self._guard.found[:] = content.get("diverged", ())
        self._watch.reference = content["taps"]
        self._activity.learnt = list(content.get("active", ()))
        if "ledger" in content:
            self._costs.ledger = Ledger.of(content["ledger"])
            # A checkpoint cannot hold its own size, so the row that follows it in an uninterrupted run is added here.
            self.ledger.add_bytes("checkpoint", bytes=content["file_bytes"], experience=self.progress.finished - 1)
        if content.get("precision"):
            self.strategy.fabric._precision.load_state_dict(content["precision"])
        clock = self.strategy.clock
        clock.train_iterations = clock.total_iterations = self.progress.steps
        clock.train_exp_counter = self.benchmark.sub_experiences(self.progress.finished - 1).stop

    def run(self) -> Progress:
        """Train on the remaining experiences; returns the complete progress."""
        inside = self._inside
        self._monitor.open(
            finished=self.progress.finished,
            steps=self.progress.steps if inside is None else inside["steps"],
            tallies=self.progress.tallies,
            expected_steps=self._expected_steps,
        )
        if inside is not None:
            self._monitor.log.note(f"resumed at {Position.of(inside['position'])}")
        with nullcontext() if self._saver is None or not self._writes else self._saver.stop:
            for index in range(self.progress.finished, len(self.benchmark)):
                if index == 0:
                    self._start_network()
                self._learn(index)
        return self.progress

    def write_hyper_parameters(self, values: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Write options, final metrics and costs to TensorBoard's HParams page, if TensorBoard is on."""
        if self._monitor.tensorboard is not None:
            last = len(self.benchmark) - 1
            costs = {"macs_per_prediction": self.ledger.predictions.mean(experience=last)}
            if self.progress.activity:
                costs["sparsity"] = self.progress.activity[-1].sparsity
            self._monitor.tensorboard.hyper_parameters(values, metrics={**metrics, **costs}, step=last)

    def note_failure(self, error: Exception) -> None:
        """Write to log.txt why the run ends."""
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        self._monitor.log.fail(reason, word="diverged" if isinstance(error, DivergenceError) else "failed")

    def note_stuck(self, reason: str) -> None:
        """Write to log.txt why a process that is blocked ends itself."""
        self._monitor.log.fail(reason)

    def close(self) -> None:
        """Close bar and files."""
        self._monitor.close()

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes of each component's state, by name."""
        return {name: nbytes(state) for name, state in self.learner.state.items()}

    def _expected_steps(self) -> list[int]:
        """Training steps of each experience, as far as they are known before training."""
        stream, benchmark = self.benchmark.avalanche.streams["train"], self.benchmark
        try:
            return [
                sum(self.strategy.count_steps(stream[i]) for i in benchmark.sub_experiences(index))
                for index in range(len(benchmark))
            ]
        except ClframeError:  # of an experience that cannot be trained, which is reported when it begins
            return [0] * len(benchmark)

    def count_costs(self) -> tuple[ExperienceCost, ...]:
        """Return what each experience costs; the session cannot be used for training afterwards."""
        return count_costs(self.strategy, self.benchmark, self._costs, start=self._grow)

    def _check_budget(self, index: int) -> None:
        """Add the budget of a trained experience to the ledger, and report a deviation from it."""
        plan = self.strategy.plan
        if plan is None:
            return
        planned, spent = plan.experiences[index], self._costs.profiler.spent()
        self.ledger.add_figure("budget", value=planned.budget, experience=index)
        granularity = max(TOLERANCE * planned.budget, planned.cost.step)
        if planned.steps and abs(spent - planned.budget) > granularity:
            text = (f"trainer.budget: experience {index + 1} cost {spent:.4g} MACs, {spent / planned.budget:.1%} of "
                    f"its budget of {planned.budget:.4g}")  # fmt: skip
            _log.warning("%s", text)
            self._monitor.log.note(text)

    def _learn(self, index: int) -> None:
        strategy, progress, monitor, benchmark = self.strategy, self.progress, self._monitor, self.benchmark
        stream = benchmark.avalanche.streams["train"]
        parts = [stream[i] for i in benchmark.sub_experiences(index)]  # one, unless the stream is online
        strategy.begin_plan(index)
        epochs = int(strategy.train_epochs) if len(parts) == 1 else 0
        steps, done = sum(map(strategy.count_steps, parts)), 0
        if self._inside is not None:
            done = Position.of(self._inside["position"]).step
        monitor.begin_experience(index, steps=steps, epochs=epochs, done=done)
        seconds = self._train(parts, index)
        self._check_budget(index)
        progress.train_seconds += seconds
        progress.loss_terms.append(monitor.end_experience())
        counted = self._guard.count_skipped(index)
        skipped = (0, 0) if counted is None else counted
        if counted is not None or progress.skipped:
            # An extended run, or one without a skipped update before this, has not counted.
            progress.skipped += [0] * (index - len(progress.skipped)) + [skipped[0]]
        progress.steps = int(strategy.clock.train_iterations)
        start = time.perf_counter()
        progress.tallies.append(self._evaluate())
        if index + 1 == len(benchmark):
            progress.confusion_CC = self._scores.confusion_CC
        monitor.log_accuracies(progress.tallies[-1].accuracy_E, step=progress.steps)
        evaluation_seconds = time.perf_counter() - start
        self.ledger.add_time("evaluation", seconds=evaluation_seconds, experience=index)
        if self._records_activity:
            with self._timing("activity", index):
                progress.activity.append(self._activity.record(self.learner.network, index))
        with self._timing("exits", index):
            progress.exits.append(self._watch.record(strategy, index))
        self._note_compilation(index)
        self._costs.finish()
        progress.finished = index + 1
        if monitor.tensorboard is not None:
            try:
                with self._timing("tensorboard", index):
                    self._write_scalars(monitor.tensorboard)
                if self._figures == "experience" or (self._figures == "end" and progress.finished == len(benchmark)):
                    with self._timing("figures", index):
                        self._draw(monitor.tensorboard)
            except Exception as error:  # the experience is trained: a failure to draw must not lose it
                reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                _log.warning("tensorboard: experience %d could not be drawn (%s)", index, reason)
        checkpoint_bytes = self._save()
        monitor.log_experience(
            progress.tallies, title=benchmark.title(index), losses=progress.loss_terms[-1], steps=progress.steps,
            train_seconds=seconds, evaluation_seconds=evaluation_seconds, checkpoint_bytes=checkpoint_bytes,
            skipped=skipped,
        )  # fmt: skip
        if self._on_evaluated is not None:
            self._on_evaluated(progress)

    def _note_compilation(self, index: int) -> None:
        """Write to ledger and log what has been compiled since the experience before."""
        stages = self.strategy.stages
        graphs, seconds = (0, 0.0) if stages is None else stages.take()
        if graphs:
            self.ledger.add_time("compile", seconds=seconds, experience=index)
            self.ledger.add_figure("compiled_graphs", value=graphs, experience=index)
            again = "again " if index else ""
            self._monitor.log.note(f"trainer.compile: {graphs} graph(s) compiled {again}in {seconds:.1f} s")

    @contextmanager
    def _timing(self, recorder: str, index: int) -> Iterator[None]:
        """Add the time of a recorder to the ledger."""
        start = time.perf_counter()
        yield
        self.ledger.add_time(recorder, seconds=time.perf_counter() - start, experience=index)

    def _write_scalars(self, board: TensorBoard) -> None:
        progress, names = self.progress, self.learner.network.exit_names
        board.evaluation(progress.tallies, baseline=progress.baseline)
        costs, newest = self.ledger.predictions, progress.finished - 1
        macs, policy = costs.mean(experience=newest), policy_of(self.learner)
        board.predictions(costs, macs=macs, experience=newest, names=names, policy=policy is not None)
        board.activity(progress.activity)
        board.exits(progress.exits, names=names)
        board.write_layout(progress.finished)

    def _draw(self, board: TensorBoard) -> None:
        progress, names, known = self.progress, self.learner.network.exit_names, self.benchmark.class_names
        accuracy_TE = [tally.accuracy_E for tally in progress.tallies]
        usage: list[list[float]] = []
        if policy_of(self.learner) is not None:
            usage = exit_usage(self.ledger.predictions, names=names, experiences=range(progress.finished))
        shown = progress.confusion_CC is not None and len(progress.confusion_CC) <= MOST_SHOWN
        found = draw_pictures(
            accuracy_TE, names=names, exits=progress.exits, usage=usage, activity=progress.activity,
            confusion=progress.confusion_CC.tolist() if shown and progress.confusion_CC is not None else (),
            classes=[known[c] if c < len(known) else str(c) for c in self.benchmark.class_order],
        )  # fmt: skip
        board.pictures(found, accuracy_TE=accuracy_TE)
        self.figures = figures_of(found)

    def _train(self, parts: list[Any], index: int) -> float:
        """Train on the parts of an experience; returns the seconds it took."""
        inside, self._inside = self._inside, None
        meter = TrainingMeter(self.strategy.device)
        self._costs.begin(index)
        if self._saver is not None:
            baseline = None if self.progress.baseline is None else self.progress.baseline.as_tree()
            self._saver.begin(index, parts=len(parts), step=self.progress.steps, meter=meter, baseline=baseline)
            if inside is not None:
                parts = self._saver.resume(inside, parts)
        with meter:
            self.strategy.train(parts, eval_streams=[[self.benchmark.evaluation_stream[index]]])
        self._monitor.flush(self.strategy)
        seconds, ledger = meter.seconds, self.ledger
        ledger.add_time("training", seconds=seconds, experience=index)
        ledger.add_energy(meter.energy, experience=index)
        capture = self.strategy.step_capture
        if capture is not None and capture.recorded:
            ledger.add_time("capture", seconds=capture.seconds, experience=index)
            ledger.add_figure("captured_graphs", value=capture.recorded, experience=index)
        if meter.peak_bytes is not None:
            ledger.add_bytes("device_peak", bytes=meter.peak_bytes, experience=index)
        return seconds

    def _start_network(self) -> None:
        """Grow the heads for the first experience and evaluate them at random initialization."""
        self._grow()
        if self._inside is None:
            start = time.perf_counter()
            self.progress.baseline = self._evaluate()
            self._monitor.time_evaluation(time.perf_counter() - start)

    def _grow(self) -> None:
        self.learner.seed_everything("experience", 0)
        self.learner.network.grow(self.benchmark.classes[0])
        self.strategy.model.to(self.strategy.device)

    def _evaluate(self) -> Tally:
        # The experiences of an extended run have no samples where its earlier data are gone.
        self.strategy.eval([each for each in self.benchmark.evaluation_stream if len(each.dataset)])
        assert self._scores.tally is not None
        return self._scores.tally

    def _save(self) -> int | None:
        """Write a checkpoint; returns its size in bytes, or None where none is written."""
        if self._folder is None or not self._writes:
            return None
        progress, learner = self.progress, self.learner
        content: dict[str, Any] = {
            "config": self._config,
            "torch": str(torch.__version__),
            "steps": progress.steps,
            "train_seconds": progress.train_seconds,
            "baseline": None if progress.baseline is None else progress.baseline.as_tree(),
            "tallies": [tally.as_tree() for tally in progress.tallies],
            "exits": [as_tree(record) for record in progress.exits],
            "activity": [as_tree(record) for record in progress.activity],
            "taps": dict(self._watch.reference),
            "active": [dict(rates) for rates in self._activity.learnt],
            "data": describe_data(self.benchmark),
            "loss_terms": progress.loss_terms,
            "diverged": list(progress.diverged),
            "skipped": list(progress.skipped),
            "past": learner.past,
            "ledger": self.ledger.as_tree(),
            "network": dict(learner.network.state_dict()),
            "components": learner.state,
        }
        if learner.average is not None:
            content["average"] = learner.average.state_dict(learner.network)
        if progress.confusion_CC is not None:
            content["confusion"] = progress.confusion_CC
        # The scale of 16-bit mixed precision, which a Trainer shares with Fabric; empty without one.
        content["precision"] = dict(self.strategy.fabric._precision.state_dict())
        path = save_checkpoint(self._folder, content, finished=progress.finished)
        assert self._saver is not None
        self._saver.finish()
        size = path.stat().st_size
        self.ledger.add_bytes("checkpoint", bytes=size, experience=progress.finished - 1)
        return size


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
