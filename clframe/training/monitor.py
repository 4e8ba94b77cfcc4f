"""What a person sees while a run goes on: a progress bar, TensorBoard, and metrics.csv."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from clframe.files import write_atomically
from clframe.training.tensorboard import LEARNING_RATE, LOSS, THROUGHPUT, TensorBoard

POINTS = 300
"""Points of a curve over training steps that one experience adds to TensorBoard, at most; metrics.csv has them all."""


class Monitor:
    """Collects what is logged, every ``log_every`` steps, and shows it.

    Args:
        folder: The run folder.
        experiences: Test experiences of the benchmark.
        tensorboard: Whether to write event files below ``folder/tensorboard``.
        csv: Whether to write ``metrics.csv``, one row per value.
        log_every: Steps between two looks at the losses; between them nothing waits for the device.
        progress: Whether to show a bar; it hides itself where the output is no terminal.

    Attributes:
        aside: Tells the seconds so far that were spent inside steps on something else than training.
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
    ) -> None:
        self._folder, self._experiences = folder, experiences
        self._path = folder / "metrics.csv" if csv else None
        self._writes_tensorboard = tensorboard
        self.tensorboard: TensorBoard | None = None
        self._log_every = log_every
        self._progress = progress
        self._rows: list[tuple[int, int, str, float]] = []
        self._bar: Any = None
        self._waiting = 0
        self._sums: dict[str, float] = {}
        self._flushes = self._looks = self._samples = 0
        self._every = 1
        self._since = 0.0
        self.aside: Callable[[], float] = lambda: 0.0
        self.experience = 0

    def open(self, *, finished: int, steps: int) -> None:
        """Start writing after ``finished`` experiences of ``steps`` steps; what was logged later is forgotten."""
        if self._writes_tensorboard:
            self.tensorboard = TensorBoard(
                self._folder / "tensorboard",
                experiences=self._experiences,
                finished=finished,
                steps=steps,
            )
        if self._path is None or not self._path.is_file():
            return
        with open(self._path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if int(row["experience"]) < finished:
                    self._rows.append(
                        (int(row["experience"]), int(row["step"]), row["name"], float(row["value"]))
                    )

    def begin_experience(self, index: int, *, label: str, steps: int) -> None:
        """Show a fresh bar."""
        self.experience, self._waiting = index, 0
        self._sums, self._flushes, self._looks, self._samples = {}, 0, 0, 0
        self._every = max(1, -(-steps // (self._log_every * POINTS)))
        self._since = self._now()
        if self._progress:
            from tqdm import tqdm

            self._bar = tqdm(
                total=steps, desc=label, unit="step", disable=None, leave=False, dynamic_ncols=True
            )

    def on_step(self, strategy: Any) -> None:
        """After a training step: cheap, except every ``log_every``-th."""
        self._waiting += 1
        self._samples += len(strategy.batch.y)
        if self._waiting == self._log_every:
            self.flush(strategy)

    def flush(self, strategy: Any) -> None:
        """Log the means of the loss terms since the last flush, and the learning rate."""
        if self._waiting == 0:
            return
        means = strategy.learner.flush_terms()
        step = int(strategy.clock.train_iterations)
        for name, value in means.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * self._waiting
        self._flushes += self._waiting
        values = {**means, LEARNING_RATE: strategy.optimizer.param_groups[0]["lr"]}
        self._rows += [(self.experience, step, name, value) for name, value in values.items()]
        self._draw({**values, LOSS: sum(means.values()), THROUGHPUT: self._throughput()}, step=step)
        if self._bar is not None:
            self._bar.update(self._waiting)
            self._bar.set_postfix(
                {name.removeprefix("loss/"): f"{v:.3f}" for name, v in means.items()}, refresh=False
            )
        self._waiting = 0

    def end_experience(self) -> dict[str, float]:
        """Close the bar, write metrics.csv; returns the mean of each loss term over the experience."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._write()
        return {name: total / self._flushes for name, total in self._sums.items()}

    def close(self) -> None:
        """Leave nothing open, whether the run ended or broke off."""
        if self._bar is not None:
            self._bar.close()
        if self.tensorboard is not None:
            self.tensorboard.close()

    def _draw(self, values: Mapping[str, float], *, step: int) -> None:
        """Every so many looks a point, so that event files stay small."""
        if self.tensorboard is not None and self._looks % self._every == 0:
            self.tensorboard.scalars(values, step)
            if self._looks == 0:
                self.tensorboard.lay_out(self.experience)
        self._looks += 1

    def _throughput(self) -> float:
        """Samples a second since the last look; the terms have just been read, so the device is done with them."""
        before, self._since = self._since, self._now()
        samples, self._samples = self._samples, 0
        return samples / max(self._since - before, 1e-9)

    def _now(self) -> float:
        return time.perf_counter() - self.aside()

    def _write(self) -> None:
        if self._path is None:
            return
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("experience", "step", "name", "value"))
        writer.writerows((e, s, n, f"{v:.8g}") for e, s, n, v in self._rows)
        write_atomically(self._path, text.getvalue())
