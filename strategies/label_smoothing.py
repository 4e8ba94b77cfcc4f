"""Label smoothing: spread a share of the target probability over all classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from clframe.core.component import Component
from clframe.core.types import State, Step
from clframe.errors import ConfigError
from clframe.functional.losses import smoothed_cross_entropy


@dataclass(frozen=True, kw_only=True)
class LabelSmoothing(Component):
    """Label smoothing: spread a share of the target probability over all classes seen so far, at every exit.

    The loss is ``(1 - s) * CE + s * mean over classes of -log p``; classes not seen yet get no share. Use it to keep
    logits small and confidence close to accuracy, also for early exits. Cost: none. Szegedy et al., "Rethinking the
    Inception Architecture for Computer Vision" (2016).

    Args:
        smoothing: s, the share, below 1; 0.1 is usual.
    """

    name: ClassVar[str] = "label_smoothing"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    per_token: ClassVar[bool] = True
    slots: ClassVar[frozenset[str]] = frozenset({"task_loss"})
    weight: ClassVar[str] = "smoothing"

    smoothing: float = 0.1

    def __post_init__(self) -> None:
        """Validate the share."""
        if not 0 <= self.smoothing < 1:
            raise ConfigError(
                f"components.{self.name}.smoothing: found {self.smoothing}; give a share from 0 to below 1"
            )

    def task_loss(self, step: Step, state: State) -> Tensor:
        """Return the smoothed cross-entropy of each exit."""
        batch = step.batch
        return smoothed_cross_entropy(step.output.logits, batch.y, smoothing=self.smoothing, weight_B=batch.weight_B)
