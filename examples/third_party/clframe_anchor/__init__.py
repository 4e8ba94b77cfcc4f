"""A component of another package: after ``pip install``, ``strategy=anchor`` works everywhere.

The module ``others`` adds a backbone, a data set, a metric and an exit policy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from clframe.core import Component, State, Step, StepContext
from clframe.errors import ConfigError
from clframe.nn import Network


@dataclass(frozen=True, kw_only=True)
class Anchor(Component):
    """Anchor: penalize the distance of the backbone's weights to those after the last experience.

    Adds ``strength / 2 * ||w - w_old||^2`` over the backbone, the L2 baseline of Kirkpatrick et al. (2017).

    Args:
        strength: Weight of the penalty.
    """

    name: ClassVar[str] = "anchor"
    terms: ClassVar[tuple[str, ...]] = ("distance",)
    weight: ClassVar[str] = "strength"

    strength: float = 0.01

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise ConfigError(f"components.anchor.strength: found {self.strength}; give a number of at least 0")

    def init_state(self, network: Network) -> State:
        """Return a state without weights: the first experience has no penalty."""
        return {"old": None}

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """Return the penalty, from the second experience on."""
        if state["old"] is None:
            return {}
        weights = step.network.backbone.parameters()
        squares = [(p - old).square().sum() for p, old in zip(weights, state["old"], strict=True)]
        return {"distance": self.strength / 2 * torch.stack(squares).sum()}

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Store the current weights."""
        return {"old": [p.detach().clone() for p in network.backbone.parameters()]}
