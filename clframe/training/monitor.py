"""Live output of a run: progress bar, log.txt, TensorBoard, metrics.csv and Lightning's loggers."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clframe.errors import DivergenceError, RunFolderError, UnsupportedError, reason_of
from clframe.files import write_atomically
from clframe.metrics import Tally
from clframe.metrics.continual import average_seen_accuracy
from clframe.progress import is_shown
from clframe.training.display import Display, RemainingTime
from clframe.training.run_log import RunLog
from clframe.training.tensorboard import GRADIENT_NORM, LEARNING_RATE, LOSS, THROUGHPUT, TensorBoard

POINTS = 300
"""Most points that one experience adds to a TensorBoard curve over training steps; metrics.csv has them all."""
POINTS_OF_RUN = 6000
"""Most points of such a curve in a run, but each experience may add ``FEWEST_POINTS``."""
FEWEST_POINTS = 20


class Monitor:
    """Logs losses, learning rate, norm of the gradient and throughput every ``log_every`` steps, and later accuracies.

    Args:
        folder: The run folder.
        experiences: Test experiences of the benchmark.
        tensorboard: Whether to write event files below ``folder/tensorboard``.
        csv: Whether to write ``metrics.csv``, one row per value.
        log_every: Steps between two log entries; no step in between synchronizes with the device.
        progress: Whether to show a bar if stderr is a terminal.
        loggers: Loggers of Lightning, with a step that rises over the experiences.
        log: Whether to write ``log.txt``.

    Attributes:
        on_losses: Called with the mean of each loss term, the experience and the step of every log entry.
        display: The progress bar; None where it is not shown.
        log: The file log.txt.
    """

    def __init__(
        self,
        folder: Path,
        *,
        experiences: int,
        tensorboard: bool = True,
        csv: bool = True,
        log_every: int = 20,
        progress: bool = True,
        loggers: Sequence[Any] = (),
        log: bool = True,
    ) -> None:
        self._folder, self._experiences = folder, experiences
        self._path = folder / "metrics.csv" if csv else None
        self._writes_tensorboard = tensorboard
        self.tensorboard: TensorBoard | None = None
        self._log_every = log_every
        self.display: Display | None = None
        self._shows_progress = progress and is_shown()
        self.log = RunLog(folder, experiences=experiences, writes=log)
        self._rows: list[tuple[int, int, str, float]] = []
        self._loggers = loggers
        self._unlogged = 0
        self._sums: dict[str, float] = {}
        self._flushes = self._entries = self._samples = 0
        self._every = 1
        self._since = 0.0
        self.on_losses: Callable[[Mapping[str, float], int, int], None] | None = None
        self.experience = 0

    def open(
        self,
        *,
        finished: int,
        steps: int,
        tallies: Sequence[Tally] = (),
        expected_steps: Callable[[], Sequence[int]] = tuple,
    ) -> None:
        """Start writing after ``finished`` experiences; entries of a killed run after ``steps`` steps are dropped.

        Args:
            finished: Experiences that are not trained again.
            steps: Training steps up to the last log entry that is kept.
            tallies: Their evaluations.
            expected_steps: Returns the expected steps of each experience; called if a progress bar is shown.

        Raises:
            RunFolderError: ``metrics.csv`` or the event files cannot be read or written.
            UnsupportedError: A logger of Lightning cannot start.
        """
        for logger in self._loggers:
            try:
                logger.experiment  # noqa: B018  # most loggers connect on first access, which would be in training
            except Exception as error:  # whatever a service's client raises
                reason = reason_of(error)
                name = type(logger).__name__
                raise UnsupportedError(f"trainer.loggers: {name} cannot start ({reason}); remove or fix it") from None
        if self._writes_tensorboard:
            try:
                self.tensorboard = TensorBoard(
                    self._folder / "tensorboard", experiences=self._experiences, finished=finished, steps=steps
                )
            except OSError as error:
                raise RunFolderError(
                    f"{self._folder / 'tensorboard'}: cannot be written ({error.strerror}); check the folder and its "
                    f"permissions"
                ) from None
        if self._path is not None and self._path.is_file():
            self._rows = [row for row in _read_rows(self._path) if row[0] < finished]
        self.log.open(finished=finished)
        if self._shows_progress:
            remaining = RemainingTime(expected_steps() or [0] * self._experiences, finished=finished)
            accuracies = [tally.accuracy_E for tally in tallies]
            accuracy = average_seen_accuracy(accuracies).value if accuracies else math.nan
            self.display = Display(remaining, experiences=self._experiences, accuracy=accuracy)

    def time_evaluation(self, seconds: float) -> None:
        """Give the time of the evaluation before any training, the first estimate of that of the others."""
        if self.display is not None:
            self.display.time_evaluation(seconds)

    def begin_experience(self, index: int, *, steps: int, done: int = 0, epochs: int = 0) -> None:
        """Start an experience.

        Args:
            index: Its number, from 0.
            steps: Its training steps.
            done: Those done before, where training resumes inside the experience.
            epochs: Its epochs, for the progress bar; 0 does not show them.
        """
        self.experience, self._unlogged = index, 0
        self._sums, self._flushes, self._entries, self._samples = {}, 0, 0, 0
        points = min(POINTS, max(FEWEST_POINTS, POINTS_OF_RUN // self._experiences))
        self._every = max(1, -(-steps // (self._log_every * points)))
        self._since = time.perf_counter()
        if self.display is not None:
            self.display.begin_experience(index, steps=steps, done=done, epochs=epochs)

    def state_dict(self) -> dict[str, Any]:
        """Return what has been logged of this experience, and write its TensorBoard points to disk."""
        if self.tensorboard is not None:
            self.tensorboard.flush()
        return {
            "rows": [row for row in self._rows if row[0] == self.experience],
            "unlogged": self._unlogged,
            "sums": dict(self._sums),
            "flushes": self._flushes,
            "entries": self._entries,
            "samples": self._samples,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`, after :meth:`begin_experience` of the same experience."""
        self._rows = [row for row in self._rows if row[0] < self.experience]
        self._rows += [(int(e), int(s), str(n), float(v)) for e, s, n, v in state["rows"]]
        self._unlogged, self._samples = state["unlogged"], state["samples"]
        self._sums, self._flushes, self._entries = dict(state["sums"]), state["flushes"], state["entries"]
        self._since = time.perf_counter()

    def on_step(self, strategy: Any) -> None:
        """Count a training step and log every ``log_every``-th."""
        self._unlogged += 1
        self._samples += len(strategy.batch.y)
        if self._unlogged == self._log_every:
            self.flush(strategy)
        if self.display is not None:
            self.display.step(strategy)

    def flush(self, strategy: Any) -> None:
        """Log the means of the loss terms since the last flush, the learning rate and the norm of the gradient.

        The norm is that of the last update, see :meth:`~clframe.training.loop.StrategyStep.gradient_norm`.
        """
        if self._unlogged == 0:
            return
        # Without those whose loss was not finite under trainer.on_nonfinite=skip.
        steps = strategy.learner.loss_sums.steps
        means = strategy.learner.flush_terms()
        step = int(strategy.clock.train_iterations)
        for name, value in means.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * steps
        self._flushes += steps
        groups = strategy.optimizer.param_groups
        values = {**means, LEARNING_RATE: groups[0]["lr"]}
        values |= {f"{LEARNING_RATE}/{group['name']}": group["lr"] for group in groups if "name" in group}
        norm = strategy.gradient_norm()
        if norm is not None:
            values[GRADIENT_NORM] = norm
        self._rows += [(self.experience, step, name, value) for name, value in values.items()]
        curves = {**values, THROUGHPUT: self._throughput()}
        if means:
            curves[LOSS] = sum(means.values())
        self._draw(curves, step=step)
        self._send(curves, step=step)
        self._unlogged = 0
        if self.on_losses is not None:
            try:
                self.on_losses(means, self.experience, step)
            except DivergenceError:
                self._write()  # the curves up to here show how it came about
                raise

    def end_experience(self) -> dict[str, float]:
        """Write metrics.csv; returns the mean of each loss term over the experience."""
        if self.display is not None:
            self.display.begin_evaluation()
        self._write()
        return {name: total / self._flushes for name, total in self._sums.items()}

    def log_accuracies(self, accuracy_E: Sequence[float], *, step: int) -> None:
        """Send Lightning's loggers the test accuracy of each experience so far, and their mean.

        Args:
            accuracy_E: By experience; those after the current one are left out.
            step: Training steps so far.
        """
        seen = accuracy_E[: self.experience + 1]
        values = {f"accuracy/experience_{i + 1}": accuracy for i, accuracy in enumerate(seen)}
        self._send({"accuracy/average": sum(seen) / len(seen), **values}, step=step)

    def log_experience(
        self,
        tallies: Sequence[Tally],
        *,
        title: str,
        losses: Mapping[str, float],
        steps: int,
        train_seconds: float,
        evaluation_seconds: float,
        checkpoint_bytes: int | None,
        skipped: tuple[int, int] = (0, 0),
    ) -> None:
        """Write the line of the newest experience to log.txt; see :meth:`~clframe.training.run_log.RunLog.experience`.

        Args:
            tallies: One evaluation per training experience so far.
            title: See there, as for the arguments that follow.
            losses: Mean of each loss term.
            steps: Training steps so far.
            train_seconds: Of this experience.
            evaluation_seconds: Of this experience.
            checkpoint_bytes: Size of the checkpoint.
            skipped: Updates of this experience that were skipped, and all of them.
        """
        accuracies = [tally.accuracy_E for tally in tallies]
        self.log.experience(
            finished=len(tallies), title=title, accuracies=accuracies, losses=losses, batches=steps,
            train_seconds=train_seconds, evaluation_seconds=evaluation_seconds, checkpoint_bytes=checkpoint_bytes,
            skipped=skipped, nats=tallies[-1].nll_E,
        )  # fmt: skip
        if self.display is not None:
            self.display.end_evaluation(average_seen_accuracy(accuracies).value)

    def close(self) -> None:
        """Close bar, log, event files and loggers, whether the run has ended or failed."""
        if self.display is not None:
            self.display.close()
        self.log.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        for logger in self._loggers:
            logger.finalize("success")

    def _draw(self, values: Mapping[str, float], *, step: int) -> None:
        """Add a point to each curve, at most ``POINTS`` an experience and fewer in long streams."""
        if self.tensorboard is not None and self._entries % self._every == 0:
            self.tensorboard.scalars(values, step)
            if self._entries == 0:
                self.tensorboard.write_layout(self.experience)
        self._entries += 1

    def _send(self, values: Mapping[str, float], *, step: int) -> None:
        for logger in self._loggers:
            logger.log_metrics(dict(values), step)
            logger.save()

    def _throughput(self) -> float:
        """Samples per second since the last log entry; reading the losses has just synchronized with the device."""
        before, self._since = self._since, time.perf_counter()
        samples, self._samples = self._samples, 0
        return samples / max(self._since - before, 1e-9)

    def _write(self) -> None:
        if self._path is None:
            return
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("experience", "step", "name", "value"))
        writer.writerows((e, s, n, f"{v:.8g}") for e, s, n, v in self._rows)
        write_atomically(self._path, text.getvalue())


def _read_rows(path: Path) -> list[tuple[int, int, str, float]]:
    """The rows of a metrics.csv, which a full disk or a copy may have cut short."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [
                (int(row["experience"]), int(row["step"]), str(row["name"]), float(row["value"]))
                for row in csv.DictReader(file)
            ]
    except (OSError, KeyError, TypeError, ValueError, csv.Error):
        raise RunFolderError(f"{path}: is damaged; delete it to resume without the earlier log entries") from None
