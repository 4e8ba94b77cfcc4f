"""Counts of correct predictions of one evaluation of the model on every test experience.

Accuracies are ratios of integers, so they do not depend on how the samples were batched.

Shape suffixes: B batch, C classes in learning order, E test experiences, K classes of one experience.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clframe.errors import ClframeError
from clframe.metrics.counts import Counts


@dataclass(frozen=True, slots=True)
class Tally:
    """Number of test samples and of correct predictions by test experience and class.

    Nested lists are accepted, and what :meth:`as_tree` returned: ``Tally(**tally.as_tree())`` is equal to ``tally``,
    after a JSON round trip too. Memory grows with the counts that are not 0. Raises :class:`ClframeError` for
    impossible counts.

    >>> tally = Tally(((3, 1), (0, 2)), correct_EC=((3, 0), (0, 1)), correct_aware_EC=((3, 1), (0, 1)))
    >>> tally.accuracy_E, tally.accuracy_C
    ((0.75, 0.5), (1.0, 0.3333333333333333))
    """

    total_EC: Counts
    """Samples evaluated."""
    correct_EC: Counts
    """Correct with the arg-max over all classes learned so far (task-agnostic)."""
    correct_aware_EC: Counts
    """Correct with the arg-max over the classes of the sample's experience only (task-aware)."""

    def __post_init__(self) -> None:
        for name in ("total_EC", "correct_EC", "correct_aware_EC"):
            object.__setattr__(self, name, Counts.of(getattr(self, name)))
        for name, counts in (("correct_EC", self.correct_EC), ("correct_aware_EC", self.correct_aware_EC)):
            if counts.shape != self.total_EC.shape:
                raise ClframeError(f"tally: {name} and total_EC differ in shape; give experiences x classes")
            for right, total in counts.excess(self.total_EC):
                raise ClframeError(f"tally: {name} has {right} of {total} samples; count each once")

    def as_tree(self) -> dict[str, dict[str, Any]]:
        """Return plain values, of the same size as the tally; ``Tally(**tree)`` is the inverse."""
        counts = {"total_EC": self.total_EC, "correct_EC": self.correct_EC, "correct_aware_EC": self.correct_aware_EC}
        return {name: each.as_tree() for name, each in counts.items()}

    @property
    def samples_E(self) -> tuple[int, ...]:
        """Test samples of each experience."""
        return self.total_EC.sum_by_row()

    @property
    def accuracy_E(self) -> tuple[float, ...]:
        """Task-agnostic accuracy on each test experience, correct / total; NaN where nothing was evaluated."""
        return _ratios(self.correct_EC.sum_by_row(), self.total_EC.sum_by_row())

    @property
    def accuracy_aware_E(self) -> tuple[float, ...]:
        """Task-aware accuracy on each test experience, correct / total; NaN where nothing was evaluated."""
        return _ratios(self.correct_aware_EC.sum_by_row(), self.total_EC.sum_by_row())

    @property
    def accuracy_C(self) -> tuple[float, ...]:
        """Task-agnostic accuracy on each class over all test experiences; NaN for a class without samples."""
        return _ratios(self.correct_EC.sum_by_column(), self.total_EC.sum_by_column())


class TallyCounter:
    """Counts on the device, batch by batch, without synchronization; :meth:`result` transfers them once.

    Args:
        experiences: Number of test experiences, E.
        classes: Number of classes of the whole benchmark, C, learned or not.
        device: Device of logits and labels.

    >>> counter = TallyCounter(1, 3, device="cpu")
    >>> counter.update(0, torch.tensor([[0.2, 0.9], [0.8, 0.1]]), torch.tensor([1, 2]), (1, 2))
    >>> counter.result().correct_EC
    ((0, 1, 0),)
    """

    def __init__(self, experiences: int, classes: int, *, device: torch.device | str) -> None:
        self.counts_3EC = torch.zeros(3, experiences, classes, dtype=torch.int64, device=device)
        """Total, correct, correct task-aware; with several processes, sum over them before :meth:`result`."""
        self._index_K: dict[tuple[int, ...], Tensor] = {}

    def update(self, experience: int, logits_BC: Tensor, y_B: Tensor, classes: Sequence[int]) -> None:
        """Count one batch of test experience ``experience``, whose classes are ``classes`` (any order).

        A sample is correct when its class has the highest logit; ties go to the lowest class. A class without a column,
        or with ``-inf`` in it, never wins; where no class can win, and where a compared logit is NaN or ``+inf``, the
        sample is wrong: such a network has diverged, its probabilities are undefined, and exits are counted by the same
        rule. Labels must be below the number of classes.
        """
        known = tuple(sorted({c for c in classes if c < logits_BC.shape[1]}))
        counted_3B = torch.stack((torch.ones_like(y_B, dtype=torch.bool),
                                  _right_B(logits_BC, y_B),
                                  self._right_among_B(logits_BC, y_B, known)))  # fmt: skip
        # index_add_ of integers is exact in any order, and unlike bincount needs no size from the device.
        self.counts_3EC[:, experience].index_add_(1, y_B.long(), counted_3B.long())

    def result(self) -> Tally:
        """Return the counts so far; the only transfer from the device."""
        total_EC, correct_EC, correct_aware_EC = map(Counts.of, self.counts_3EC.cpu().numpy())
        return Tally(total_EC, correct_EC, correct_aware_EC)

    def _right_among_B(self, logits_BC: Tensor, y_B: Tensor, known: tuple[int, ...]) -> Tensor:
        if not known:
            return torch.zeros_like(y_B, dtype=torch.bool)
        first, last = known[0], known[-1]
        if last - first + 1 == len(known):  # consecutive in learning order, the usual case: a view instead of an index
            return _right_B(logits_BC[:, first : last + 1], y_B - first)
        index_K = self._index_K.get(known)
        if index_K is None:
            index_K = torch.tensor(known)
            if logits_BC.device.type == "cuda":  # from pinned memory the copy is asynchronous
                index_K = index_K.pin_memory().to(logits_BC.device, non_blocking=True)
            index_K = self._index_K[known] = index_K.to(logits_BC.device)
        return _right_B(logits_BC.index_select(1, index_K), y_B, names_K=index_K)


def _right_B(logits_BK: Tensor, y_B: Tensor, *, names_K: Tensor | None = None) -> Tensor:
    """Return whether the column with the highest logit is the label's; ``names_K`` are the columns' classes."""
    if logits_BK.shape[1] == 0:
        return torch.zeros_like(y_B, dtype=torch.bool)
    highest_B, winner_B = logits_BK.max(dim=1)
    if names_K is not None:
        winner_B = names_K[winner_B]
    return (winner_B == y_B) & highest_B.isfinite()  # the maximum of a row with NaN is NaN


def _ratios(right: Sequence[int], total: Sequence[int]) -> tuple[float, ...]:
    shared: dict[tuple[int, int], float] = {}  # one object for equal ratios, of which a long stream has many
    return tuple(
        shared.setdefault((r, t), r / t if t else float("nan")) for r, t in zip(right, total, strict=True)
    )
