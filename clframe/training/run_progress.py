"""Results of a run so far, as checkpoints of finished experiences contain them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from clframe.exits.diagnostics import ExitRecord
from clframe.metrics import Tally
from clframe.records import as_tree
from clframe.sparsity.activity import ActivityRecord


@dataclass
class Progress:
    """Results of a run so far; every checkpoint contains them."""

    finished: int = 0
    steps: int = 0
    """Training steps, each on one batch; the ledger counts the optimizer's."""
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

    def as_content(self) -> dict[str, Any]:
        """Return the entries of a checkpoint; its number of finished experiences is written by ``save_checkpoint``."""
        content: dict[str, Any] = {
            "steps": self.steps,
            "train_seconds": self.train_seconds,
            "baseline": None if self.baseline is None else self.baseline.as_tree(),
            "tallies": [tally.as_tree() for tally in self.tallies],
            "exits": [as_tree(record) for record in self.exits],
            "activity": [as_tree(record) for record in self.activity],
            "loss_terms": self.loss_terms,
            "diverged": list(self.diverged),
            "skipped": list(self.skipped),
        }
        if self.confusion_CC is not None:
            content["confusion"] = self.confusion_CC
        return content

    @classmethod
    def of(cls, content: Mapping[str, Any], *, experiences: int, records_activity: bool) -> Progress:
        """Read the progress from a checkpoint.

        Args:
            content: The checkpoint.
            experiences: Length of the stream.
            records_activity: Whether the run records activity.

        Raises:
            ValueError: A count contradicts another one or the stream; the field and its value.
        """
        _check_counts(content, experiences=experiences)
        finished = content["finished"]
        activity: list[ActivityRecord] = []
        if records_activity:
            # A checkpoint of an early version has none.
            records = content.get("activity", [None] * finished)
            activity = [ActivityRecord() if record is None else ActivityRecord.of(record) for record in records]
        return cls(
            finished=finished,
            steps=content["steps"],
            train_seconds=content["train_seconds"],
            baseline=tally_of(content["baseline"]),
            tallies=[Tally(**tally) for tally in content["tallies"]],
            exits=[ExitRecord.of(record) for record in content["exits"]],
            activity=activity,
            loss_terms=content["loss_terms"],
            diverged=list(content.get("diverged", ())),
            skipped=list(content.get("skipped", ())),
            confusion_CC=content.get("confusion") if finished == experiences else None,
        )


def tally_of(content: dict[str, Any] | None) -> Tally | None:
    """Read a tally from a checkpoint, which may have none."""
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
