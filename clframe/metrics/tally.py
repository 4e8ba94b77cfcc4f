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
from clframe.functional.language import token_nll
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
    nats_E: tuple[float, ...] = ()
    """Of a language model, whose samples are tokens: the sum of their negative log-likelihoods on each experience, in
    nats; empty for classifiers."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "nats_E", tuple(float(nats) for nats in self.nats_E))
        for name in ("total_EC", "correct_EC", "correct_aware_EC"):
            object.__setattr__(self, name, Counts.of(getattr(self, name)))
        if self.nats_E and len(self.nats_E) != self.total_EC.shape[0]:
            raise ClframeError("tally: nats_E and total_EC differ in length; give one sum per experience")
        for name, counts in (("correct_EC", self.correct_EC), ("correct_aware_EC", self.correct_aware_EC)):
            if counts.shape != self.total_EC.shape:
                raise ClframeError(f"tally: {name} and total_EC differ in shape; give experiences x classes")
            for right, total in counts.excess(self.total_EC):
                raise ClframeError(f"tally: {name} has {right} of {total} samples; count each once")

    def as_tree(self) -> dict[str, Any]:
        """Return plain values, of the same size as the tally; ``Tally(**tree)`` is the inverse."""
        counts = {"total_EC": self.total_EC, "correct_EC": self.correct_EC, "correct_aware_EC": self.correct_aware_EC}
        tree: dict[str, Any] = {name: each.as_tree() for name, each in counts.items()}
        return {**tree, "nats_E": list(self.nats_E)} if self.nats_E else tree

    @property
    def nll_E(self) -> tuple[float, ...]:
        """Nats per token on each test experience, NaN where nothing was evaluated; empty for classifiers."""
        tokens_E = self.samples_E if self.nats_E else ()
        return tuple(nats / n if n else float("nan") for nats, n in zip(self.nats_E, tokens_E, strict=True))

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


class TokenCounter:
    """Counts the next tokens that a language model predicts, and sums their negative log-likelihoods.

    The classes of the tally are the domains, as in the stream. Every domain has the same vocabulary, so task-aware
    counts are the task-agnostic ones.

    Args:
        experiences: Number of test experiences, E.
        domains: Number of domains of the whole benchmark, D.
        device: Device of logits and targets.

    >>> counter = TokenCounter(1, 2, device="cpu")
    >>> counter.update(0, torch.zeros(2, 4), torch.tensor([0, 3]), torch.tensor([1]))
    >>> counter.result().correct_EC, round(counter.result().nats_E[0], 4)
    (((0, 1),), 2.7726)
    """

    def __init__(self, experiences: int, domains: int, *, device: torch.device | str) -> None:
        self._counts_2ED = torch.zeros(2, experiences, domains, dtype=torch.int64, device=device)
        self._nats_E = torch.zeros(experiences, dtype=torch.float64, device=device)

    def update(self, experience: int, logits_NV: Tensor, y_N: Tensor, domain_B: Tensor) -> None:
        """Count the tokens of B windows of test experience ``experience``.

        Logits that are not finite predict nothing.

        Args:
            experience: Its index.
            logits_NV: Logits of the tokens, window by window.
            y_N: Their targets.
            domain_B: The domain of each window.
        """
        right_B = _right_B(logits_NV, y_N).reshape(len(domain_B), -1).sum(1)
        tokens_B = torch.full_like(right_B, y_N.numel() // max(len(domain_B), 1))
        for counts_D, count_B in zip(self._counts_2ED[:, experience], (tokens_B, right_B), strict=True):
            counts_D.index_add_(0, domain_B.long(), count_B)
        self._nats_E[experience] += token_nll(logits_NV, y_N).sum(dtype=torch.float64)

    def result(self) -> Tally:
        """Return the counts so far."""
        total_EC, right_EC = (Counts.of(counts_ED.numpy()) for counts_ED in self._counts_2ED.cpu())
        return Tally(total_EC, right_EC, right_EC, nats_E=tuple(self._nats_E.tolist()))


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
