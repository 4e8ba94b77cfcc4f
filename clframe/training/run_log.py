"""The log file of a run: one line per experience, readable without a terminal."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from clframe.functional.language import perplexity
from clframe.metrics.continual import average_seen_accuracy
from clframe.printable import printable

_log = logging.getLogger(__name__)

NAME = "log.txt"
"""The file in the run folder."""


class RunLog:
    """Appends lines with date and time to ``log.txt``.

    A resumed run appends to the file of the run before. A file that cannot be written is reported once and does not
    end a run.

    Args:
        folder: The run folder.
        experiences: Number of experiences.
        writes: Whether to write at all.
    """

    def __init__(self, folder: Path, *, experiences: int, writes: bool = True) -> None:
        self._path, self._experiences = folder / NAME, experiences
        self._failed = not writes
        self._open = False
        self._finished = 0

    def open(self, *, finished: int) -> None:
        """Write the first line; ``finished`` experiences are not trained again."""
        self._open, self._finished = True, finished
        self._add(f"resumed after experience {finished}/{self._experiences}" if finished else "started")

    def experience(
        self,
        *,
        finished: int,
        title: str,
        accuracies: Sequence[Sequence[float]],
        losses: Mapping[str, float],
        batches: int,
        train_seconds: float,
        evaluation_seconds: float,
        checkpoint_bytes: int | None,
        skipped: tuple[int, int] = (0, 0),
        nats: Sequence[float] = (),
    ) -> None:
        """Write the line of an experience.

        Args:
            finished: Experiences finished, this one included.
            title: Title of this experience.
            accuracies: The accuracy matrix so far; its last row is of this experience.
            losses: Mean of each loss term over this experience, by name.
            batches: Those that the run has trained on so far.
            train_seconds: Time of training this experience.
            evaluation_seconds: Time of evaluating after it.
            checkpoint_bytes: Size of its checkpoint; None where none was written.
            skipped: Its updates that were skipped, and all of them.
            nats: Nats per token of a language model on each experience, after this one.
        """
        self._finished = finished
        own, seen = accuracies[-1][finished - 1], average_seen_accuracy(accuracies).value
        text = f"accuracy {100 * own:.2f} %, {100 * seen:.2f} % over the experiences so far"
        if nats:
            every = perplexity(sum(nats[:finished]) / finished)
            text = f"perplexity {perplexity(nats[finished - 1]):.2f}, {every:.2f} over the domains so far"
        terms = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        terms = terms or ("no finite loss" if skipped[1] else "no training step")
        without = f"{skipped[0]} of {skipped[1]} updates skipped as not finite; " if skipped[0] else ""
        size = "none" if checkpoint_bytes is None else f"{checkpoint_bytes / 1e6:,.3f} MB"
        self._add(
            f"experience {finished}/{self._experiences} ({title}): {text}; {terms}; {batches} batches so far; {without}"
            f"training {train_seconds:.1f} s, evaluation {evaluation_seconds:.1f} s; checkpoint {size}"
        )

    def note(self, text: str) -> None:
        """Write a line."""
        self._add(text)

    def fail(self, reason: str, *, word: str = "failed") -> None:
        """Write why the run ends, if it has begun.

        Args:
            reason: The message of the error.
            word: What the line begins with.
        """
        if self._open:
            self._add(f"{word}: {reason}")

    def close(self) -> None:
        """Write the last line, once."""
        if self._open:
            self._open = False
            done = self._finished == self._experiences
            self._add("finished" if done else f"stopped after experience {self._finished}/{self._experiences}")

    def _add(self, text: str) -> None:
        if self._failed:
            return
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {printable(' '.join(text.split()))}\n")
        except OSError as error:
            self._failed = True
            _log.warning("%s: cannot be written (%s); the run continues without it", self._path, error.strerror)
