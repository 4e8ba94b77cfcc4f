"""A session: one run through a stream, experience by experience, that can be stopped and resumed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clframe.accounting import Ledger
from clframe.config.periods import Period
from clframe.data.benchmark import Benchmark
from clframe.errors import ClframeError, DivergenceError, reason_of
from clframe.metrics import Tally
from clframe.training.activity_recorder import ActivityRecorder
from clframe.training.budget import TOLERANCE, ExperienceCost
from clframe.training.checkpoint import nbytes
from clframe.training.cost_recorder import CostRecorder
from clframe.training.exit_recorder import ExitRecorder
from clframe.training.experience_cost import count_costs
from clframe.training.inside import Position
from clframe.training.monitor import Monitor
from clframe.training.run_progress import Progress, tally_of
from clframe.training.run_saver import RunSaver
from clframe.training.saver import ExperienceSaver, TrainingMeter
from clframe.training.scores import Scores
from clframe.training.strategy import LightningStrategy
from clframe.training.tensorboard_pages import write_hyper_parameters, write_pictures, write_scalars

if TYPE_CHECKING:
    from clframe.plotting.style import PixelArray

_log = logging.getLogger(__name__)


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
        self._exits = ExitRecorder(benchmark, scores)
        self._activity = ActivityRecorder(benchmark)
        changed = any(component.changes_activity for component in self.learner.composition)
        self._records_activity = changed if record_activity is None else record_activity
        self._figures = figures
        self.figures: Mapping[str, PixelArray] = {}
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
        self._run_saver: RunSaver | None = None
        self._saver: ExperienceSaver | None = None
        if checkpoints is not None:
            self._run_saver = RunSaver(
                strategy, benchmark, costs=self._costs, exits=self._exits, activity=self._activity,
                records_activity=self._records_activity, folder=checkpoints, config=config,
            )  # fmt: skip
            self._saver = ExperienceSaver(
                strategy, benchmark, self._costs, monitor, folder=checkpoints, config=config, period=period,
                foreign=foreign, writes=self._writes,
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
        if self._run_saver is None or self._saver is None:
            return 0
        group = self.strategy.group
        # The first process deletes what a kill has left behind.
        with nullcontext() if group is None else group.first_before_others():
            progress = self._run_saver.load()
            if progress is not None:
                self._guard.found[:] = progress.diverged
                self.progress = replace(progress, diverged=self._guard.found)
            self._inside = self._saver.load(finished=self.progress.finished)
        if self._inside is not None:
            self.progress.baseline = tally_of(self._inside["baseline"])
        if group is not None:
            step = 0 if self.position is None else self.position.step
            found = {"checkpoints": 1e9 * self.progress.finished + step}
            group.check_equal(found, where="where they resume", advice="keep other processes from the run folder")
        return self.progress.finished

    def run(self) -> Progress:
        """Train on the remaining experiences; returns the complete progress."""
        inside = self._inside
        self._monitor.open(
            finished=self.progress.finished,
            # Steps since the last log entry are logged again, with those that follow.
            steps=self.progress.steps if inside is None else inside["steps"] - inside["monitor"]["unlogged"],
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
        board, last = self._monitor.tensorboard, len(self.benchmark) - 1
        if board is not None:
            write_hyper_parameters(board, self.progress, self.ledger, values=values, metrics=metrics, last=last)

    def note_failure(self, error: Exception) -> None:
        """Write to log.txt why the run ends."""
        reason = reason_of(error, most=300)
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
        if abs(spent - planned.budget) > granularity:
            share = f"{100 * spent / planned.budget:.1f} % of " if planned.budget else "not "
            text = (f"trainer.budget: experience {index + 1} cost {spent:.4g} MACs, {share}its budget of "
                    f"{planned.budget:.4g}")  # fmt: skip
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
            progress.exits.append(self._exits.record(strategy, index))
        self._note_compilation(index)
        self._costs.finish(skipped=skipped[0])
        progress.finished = index + 1
        self._write_pages(index)
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

    def _write_pages(self, index: int) -> None:
        """Write TensorBoard's scalars and, where they are due, its pictures."""
        board, progress, learner, ledger = self._monitor.tensorboard, self.progress, self.learner, self.ledger
        if board is None:
            return
        last = progress.finished == len(self.benchmark)
        try:
            with self._timing("tensorboard", index):
                write_scalars(board, progress, learner, ledger)
            if self._figures == "experience" or (self._figures == "end" and last):
                with self._timing("figures", index):
                    self.figures = write_pictures(board, progress, learner, ledger, self.benchmark)
        except Exception as error:  # the experience is trained: a failure to draw must not lose it
            reason = f"{type(error).__name__}: {reason_of(error, most=200)}"
            _log.warning("tensorboard: experience %d could not be drawn (%s)", index, reason)

    @contextmanager
    def _timing(self, recorder: str, index: int) -> Iterator[None]:
        """Add the time of a recorder to the ledger."""
        start = time.perf_counter()
        yield
        self.ledger.add_time(recorder, seconds=time.perf_counter() - start, experience=index)

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
        if self._run_saver is None or not self._writes:
            return None
        path = self._run_saver.save(self.progress)
        assert self._saver is not None
        self._saver.finish()
        size = path.stat().st_size
        self.ledger.add_bytes("checkpoint", bytes=size, experience=self.progress.finished - 1)
        return size
