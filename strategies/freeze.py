"""Freeze the backbone after the first experiences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from clframe.core.component import Component
from clframe.core.types import Experience, State, StepContext
from clframe.errors import ConfigError
from clframe.nn.network import Network


@dataclass(frozen=True, kw_only=True)
class Freeze(Component):
    """Freezing: train the backbone in the first experiences only; classifiers continue to learn.

    Use it as a baseline that forgets no feature and learns no new one; it is strong if the first experience is large or
    the backbone pre-trained. Running statistics of batch normalization are frozen too. Cost: less than fine-tuning.

    Args:
        after: Number of experiences in which the backbone is trained; 0 never trains it.
    """

    name: ClassVar[str] = "freeze"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True

    after: int = 1

    def __post_init__(self) -> None:
        """Validate the number of experiences."""
        if self.after < 0:
            raise ConfigError(f"components.freeze.after: found {self.after}; give a number of at least 0")

    def add_classes(self, network: Network, experience: Experience) -> None:
        """Freeze the backbone before other components collect trainable parameters."""
        if experience.index >= self.after:
            network.backbone.requires_grad_(False)

    def before_epoch(self, network: Network, context: StepContext, state: State) -> None:
        """Freeze again, since every epoch starts in training mode."""
        self.add_classes(network, context.experience)
        if context.experience.index >= self.after:
            network.backbone.eval()
