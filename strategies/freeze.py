"""Freeze the backbone once it has learnt something."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from clframe.core.component import Component
from clframe.core.types import Experience, State, StepContext
from clframe.errors import ConfigError
from clframe.nn.network import Network


@dataclass(frozen=True, kw_only=True)
class Freeze(Component):
    """Freezing: the backbone learns in the first experiences and stays as it is from then on; classifiers go on.

    Use it as a baseline that forgets no feature and learns no new one, strong where the first experience is large or
    the backbone pre-trained. Statistics of batch normalization are frozen too. It costs less than no method at all.

    Args:
        after: Experiences in which the backbone learns; 0 never trains it.
    """

    name: ClassVar[str] = "freeze"

    after: int = 1

    def __post_init__(self) -> None:
        """Refuse a negative number."""
        if self.after < 0:
            raise ConfigError(f"components.freeze.after: found {self.after}; give a number of at least 0")

    def add_classes(self, network: Network, experience: Experience) -> None:
        """Hold the backbone still before other components look at what learns."""
        if experience.index >= self.after:
            network.backbone.requires_grad_(False)

    def before_epoch(self, network: Network, context: StepContext, state: State) -> None:
        """Done anew in every epoch, since training mode comes back with each."""
        self.add_classes(network, context.experience)
        if context.experience.index >= self.after:
            network.backbone.eval()
