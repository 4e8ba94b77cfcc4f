"""Progress of a run on a terminal: one bar over all experiences, with the time left.

Nothing here changes a run: counts are read from the strategy, and the loss is read from the device only when the bar
is drawn, at most :data:`DRAWS` times a second.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

from clframe.progress import progress_bar

DRAWS = 4
"""Most updates of the bar per second, each of which waits for the device once."""


class RemainingTime:
    """Estimates the seconds left of a run: those of its remaining steps and of its remaining evaluations.

    ``steps left * seconds per step + evaluations left * seconds per evaluation``. A step costs what it cost in the
    present experience, since replay makes later ones slower, or in the one before where it has just begun. The time
    from the last step of an experience to the first of the next (consolidation, evaluation, checkpoint) counts as its
    evaluation; the next one is taken to last as long as the one before.

    Args:
        steps_E: Expected training steps of each experience.
        finished: Experiences that are not trained again.
    """

    def __init__(self, steps_E: Sequence[int], *, finished: int = 0) -> None:
        self._steps_E = list(steps_E)
        self._index = finished
        self._done = 0
        self._seconds_per_step = math.nan
        self._seconds_per_evaluation = math.nan
        self._first: tuple[int, float] | None = None
        self._last = math.nan

    @property
    def total(self) -> int:
        """Expected steps of the whole run."""
        return sum(self._steps_E)

    @property
    def done(self) -> int:
        """Steps done."""
        return sum(self._steps_E[: self._index]) + self._done

    def begin_experience(self, index: int, steps: int, *, done: int = 0) -> None:
        """Start experience ``index``, of which ``done`` of ``steps`` steps are done.

        Where its steps differ from those expected, as a replay buffer that joins each epoch makes them, so will those
        of later experiences.
        """
        expected = self._steps_E[index]
        ratio = steps / expected if expected else 1.0
        self._steps_E[index:] = [steps, *(round(ratio * later) for later in self._steps_E[index + 1 :])]
        self._index, self._done, self._first = index, done, None

    def add_step(self, now: float) -> None:
        """Count a step that ended at ``now`` seconds."""
        self._done += 1
        self._last = now
        if self._first is None:
            self._first = self._done, now
        elif now > self._first[1]:
            self._seconds_per_step = (now - self._first[1]) / (self._done - self._first[0])

    def end_experience(self) -> None:
        """Correct the count of an experience that ended before its last expected step."""
        self._steps_E[self._index] = self._done

    def end_evaluation(self, now: float) -> None:
        """Measure the time since the last step."""
        if not math.isnan(self._last):
            self._seconds_per_evaluation = now - self._last

    def set_evaluation(self, seconds: float) -> None:
        """Give the time of an evaluation before any training, the first estimate."""
        self._seconds_per_evaluation = seconds

    def seconds(self) -> float:
        """Return the estimate; NaN before two steps have been timed."""
        evaluations = len(self._steps_E) - self._index
        per_evaluation = 0.0 if math.isnan(self._seconds_per_evaluation) else self._seconds_per_evaluation
        return (self.total - self.done) * self._seconds_per_step + evaluations * per_evaluation


class Display:
    """The bar of a run: experience, epoch, share of the steps, time left, loss, accuracy so far and samples per second.

    Args:
        remaining: The estimate of the time left.
        experiences: Number of experiences.
        accuracy: Accuracy over the experiences so far of a run that is resumed; NaN where there is none.
    """

    def __init__(self, remaining: RemainingTime, *, experiences: int, accuracy: float = math.nan) -> None:
        self._remaining, self._experiences, self._accuracy = remaining, experiences, accuracy
        self._bar: Any = None
        self._drawn = -math.inf
        self._samples, self._since = 0, math.nan
        self._title, self._epochs = "", 0

    def begin_experience(self, index: int, *, steps: int, done: int = 0, epochs: int = 0) -> None:
        """Show the bar for an experience; see :meth:`~clframe.training.monitor.Monitor.begin_experience`."""
        self._remaining.begin_experience(index, steps, done=done)
        self._title, self._epochs = f"experience {index + 1}/{self._experiences}", epochs
        self._samples, self._since, self._drawn = 0, math.nan, -math.inf
        if self._bar is None:
            self._bar = progress_bar(
                self._title,
                total=max(1, self._remaining.total),
                initial=self._remaining.done,
                bar_format="{desc} |{bar:20}| {percentage:.0f} %{postfix}",
            )
        self._update(self._title)

    def step(self, strategy: Any) -> None:
        """Count a training step, and draw the bar if it is time to."""
        now = time.perf_counter()
        self._remaining.add_step(now)
        if math.isnan(self._since):
            self._since = now  # the first step of an experience includes its preparation
        else:
            self._samples += len(strategy.batch.y)
        if now - self._drawn < 1 / DRAWS:
            return
        self._drawn = now
        loss = float(strategy.loss.detach().sum())  # waits for the device
        epoch = f", epoch {strategy.clock.train_exp_epochs + 1}/{self._epochs}" if self._epochs else ""
        self._update(f"{self._title}{epoch}", loss=loss, rate=self._rate(time.perf_counter()))

    def begin_evaluation(self) -> None:
        """Show that the steps of the experience are done."""
        self._remaining.end_experience()
        if self._bar is not None:
            self._update(f"{self._title}, evaluating")

    def end_evaluation(self, accuracy: float) -> None:
        """Take over the accuracy so far, and remove the bar until the next experience."""
        self._remaining.end_evaluation(time.perf_counter())
        self._accuracy = accuracy
        self.close()

    def time_evaluation(self, seconds: float) -> None:
        """Give the time of the evaluation before any training, the first estimate of that of the others."""
        self._remaining.set_evaluation(seconds)

    def close(self) -> None:
        """Remove the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _rate(self, now: float) -> float:
        return self._samples / (now - self._since) if self._samples else math.nan

    def _update(self, label: str, *, loss: float | None = None, rate: float = math.nan) -> None:
        bar, left = self._bar, self._remaining.seconds()
        bar.total = max(1, self._remaining.total)
        bar.n = min(self._remaining.done, bar.total)
        parts = [
            "" if math.isnan(left) else f"{format_duration(left)} left",
            "" if loss is None else f"loss {loss:.3g}",
            "" if math.isnan(self._accuracy) else f"accuracy so far {100 * self._accuracy:.1f} %",
            "" if math.isnan(rate) else f"{rate:,.0f} samples/s",
        ]
        bar.set_description_str(label, refresh=False)
        bar.set_postfix_str(", ".join(filter(None, parts)), refresh=False)
        bar.refresh()


def format_duration(seconds: float) -> str:
    """Format seconds as minutes and seconds, hours from 100 minutes on.

    >>> format_duration(4.2), format_duration(151), format_duration(7270), format_duration(200_000)
    ('0:04', '2:31', '2 h 01 min', '55 h 33 min')
    """
    whole = round(seconds)
    if whole < 6000:
        return f"{whole // 60}:{whole % 60:02d}"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
