"""Learning without Forgetting: the previous model teaches the next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from clframe.core.component import Component
from clframe.core.types import State, Step, StepContext
from clframe.errors import ConfigError
from clframe.functional.losses import distillation
from clframe.nn.frozen import freeze
from clframe.nn.network import Network


@dataclass(frozen=True, kw_only=True)
class LwF(Component):
    """Learning without Forgetting (LwF): distill the old classes from the model of the last experience.

    Adds ``alpha * T^2 * sum over old experiences of KL(teacher || student)`` at every exit, each old
    experience's classes under a softmax of their own; the teacher is the frozen model as it was before
    this experience. Li and Hoiem, "Learning without Forgetting" (2016).

    Use it where nothing may be stored of old data and new data resemble it, or beside a memory (``er + lwf``), where
    it is stronger. Costs one forward pass of the teacher a step and a copy of the network.

    Args:
        alpha: Weight of the term.
        temperature: T; higher values listen more to the small probabilities.
    """

    name: ClassVar[str] = "lwf"
    terms: ClassVar[tuple[str, ...]] = ("distill",)
    weight: ClassVar[str] = "alpha"

    alpha: float = 1.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        """Refuse a negative weight and a temperature that divides by zero."""
        if not self.alpha >= 0:
            raise ConfigError(f"components.lwf.alpha: found {self.alpha}; give a number of at least 0")
        if not self.temperature > 0:
            raise ConfigError(f"components.lwf.temperature: found {self.temperature}; give a number above 0")

    def init_state(self, network: Network) -> State:
        """No teacher before the first experience ends."""
        return {"teacher": None, "groups": ()}

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """The distillation term, from the second experience on."""
        if state["teacher"] is None:
            return {}
        with torch.no_grad():
            teacher = state["teacher"](step.batch.x)
        loss_K = distillation(
            step.output.logits, teacher.logits, groups=state["groups"], temperature=self.temperature
        )
        return {"distill": self.alpha * loss_K}

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """The model as it is now teaches the next experience; a class stays in the group it first came in."""
        known = {c for group in state["groups"] for c in group}
        new = tuple(sorted(set(context.experience.classes) - known))
        return {"teacher": freeze(network), "groups": (*state["groups"], new) if new else state["groups"]}
