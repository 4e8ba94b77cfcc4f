"""Ensembles: what each exit answers, given its own logits and those of the exits before it.

An ensemble works exit by exit and carries what it needs from one to the next, so the same code answers for
a whole forward pass and for one that stops early.

Shape suffixes: B batch, C classes, K exits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

Carried = tuple[Tensor, ...]
"""What goes from one exit to the next: tensors whose first dimension is the batch."""


class Ensemble(nn.Module, ABC):
    """Turns the logits of exit k, and what the exits before it left, into the scores that exit k answers with."""

    def grow(self, classes: Iterable[int]) -> bool:
        """Make room for ``classes``; True if parameters were replaced."""
        return False

    @abstractmethod
    def step(self, exit: int, logits_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
        """scores_BC of exit ``exit`` (their softmax is its answer's probability), and what to carry on.

        Args:
            exit: Its number k, counted from 0; the backbone's own classifier is the last.
            logits_BC: Its logits.
            carried: What the step of exit k - 1 returned; empty at the first exit.
        """

    def forward(self, logits: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """scores_BC of every exit, from the logits of all."""
        scores: list[Tensor] = []
        carried: Carried = ()
        for exit, logits_BC in enumerate(logits):
            scores_BC, carried = self.step(exit, logits_BC, carried)
            scores.append(scores_BC)
        return tuple(scores)


class Single(Ensemble):
    """No ensemble: every exit answers with its own logits."""

    def step(self, exit: int, logits_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
        """The logits as they are."""
        return logits_BC, ()
