"""The interface of ensembles of exits, and the one that combines nothing.

Shape suffixes: B batch, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

Carried = tuple[Tensor, ...]
"""Tensors passed from one exit to the next, batch first."""


class Ensemble(nn.Module, ABC):
    """Combines the logits of exit k with those of earlier exits into the scores of exit k."""

    def grow(self, classes: Iterable[int]) -> bool:
        """Add outputs for ``classes``; True if parameters were replaced."""
        return False

    @property
    def inner(self) -> Ensemble:
        """The ensemble itself, without a calibration around it."""
        return self

    @abstractmethod
    def step(self, exit: int, logits_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
        """Compute scores_BC of one exit, whose softmax is its probability, and the values for the next exit.

        Args:
            exit: Its index k, from 0; the last one is the backbone's own classifier.
            logits_BC: Its logits.
            carried: Values from the step of exit k - 1; empty at the first exit.
        """

    def forward(self, logits: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Compute scores_BC of every exit from the logits of all."""
        scores: list[Tensor] = []
        carried: Carried = ()
        for exit, logits_BC in enumerate(logits):
            scores_BC, carried = self.step(exit, logits_BC, carried)
            scores.append(scores_BC)
        return tuple(scores)


class Single(Ensemble):
    """No ensemble: the scores of an exit are its own logits."""

    def step(self, exit: int, logits_BC: Tensor, carried: Carried) -> tuple[Tensor, Carried]:
        """Return the logits unchanged."""
        return logits_BC, ()
