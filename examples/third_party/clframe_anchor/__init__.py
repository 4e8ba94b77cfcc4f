"""A component in a package of its own: after ``pip install`` it is known as ``anchor`` everywhere."""

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
    """Anchor: hold the backbone near the weights it had after the last experience.

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
            raise ConfigError(
                f"components.anchor.strength: found {self.strength}; give a number of at least 0"
            )

    def init_state(self, network: Network) -> State:
        """Nothing holds the first experience."""
        return {"old": None}

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """The distance, from the second experience on."""
        if state["old"] is None:
            return {}
        live = step.network.backbone.parameters()
        squares = [(p - old).square().sum() for p, old in zip(live, state["old"], strict=True)]
        return {"distance": self.strength / 2 * torch.stack(squares).sum()}

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Remember the weights as they are now."""
        return {"old": [p.detach().clone() for p in network.backbone.parameters()]}
