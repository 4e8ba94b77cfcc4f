"""Label smoothing: targets that leave a little for every class."""

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
    """Label smoothing: the target gives a share of its probability to all classes met, at every exit.

    The loss is ``(1 - s) * CE + s * mean over classes of -log p``. Use it to keep logits small and confidence near
    accuracy, for early exits too; classes not met yet get no share. Costs nothing. Szegedy et al., "Rethinking the
    Inception Architecture for Computer Vision" (2016).

    Args:
        smoothing: s, the share; 0.1 is usual, below 1.
    """

    name: ClassVar[str] = "label_smoothing"
    slots: ClassVar[frozenset[str]] = frozenset({"task_loss"})
    weight: ClassVar[str] = "smoothing"

    smoothing: float = 0.1

    def __post_init__(self) -> None:
        """Refuse shares below none and of everything."""
        if not 0 <= self.smoothing < 1:
            raise ConfigError(
                f"components.{self.name}.smoothing: found {self.smoothing}; give a share from 0 to below 1"
            )

    def task_loss(self, step: Step, state: State) -> Tensor:
        """One value per exit."""
        batch = step.batch
        return smoothed_cross_entropy(step.output.logits, batch.y, smoothing=self.smoothing, weight_B=batch.weight_B)
