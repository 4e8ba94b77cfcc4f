"""Learning without Forgetting: distill from the model of the last experience."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

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

    Adds ``alpha * T^2 * sum over old experiences of KL(teacher || student)`` at every exit, with a separate softmax
    over the classes of each old experience; the teacher is a frozen copy of the model before this experience. Li and
    Hoiem, "Learning without Forgetting" (2016).

    Use it if no old data may be stored and new data resemble the old, or with a replay buffer (``er + lwf``), where it
    is stronger. Without a buffer add ``current_classes``, as published: a cross-entropy over all classes so far leaves
    the last ones only. Cost: one forward pass of the teacher per step and a copy of the network.

    Args:
        alpha: Weight of the term.
        temperature: T; higher values give more weight to small probabilities.
    """

    name: ClassVar[str] = "lwf"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    per_token: ClassVar[bool] = True
    terms: ClassVar[tuple[str, ...]] = ("distill",)
    weight: ClassVar[str] = "alpha"

    alpha: float = 1.0
    temperature: float = 2.0

    def __post_init__(self) -> None:
        """Validate the options."""
        if not self.alpha >= 0:
            raise ConfigError(f"components.lwf.alpha: found {self.alpha}; give a number of at least 0")
        if not self.temperature > 0:
            raise ConfigError(f"components.lwf.temperature: found {self.temperature}; give a number above 0")

    def init_state(self, network: Network) -> State:
        """Return a state without teacher."""
        return {"teacher": None, "groups": ()}

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """Return the distillation term, from the second experience on."""
        if state["teacher"] is None:
            return {}
        teacher = step.run(state["teacher"])
        loss_K = distillation(
            step.output.logits, teacher.logits, groups=state["groups"], temperature=self.temperature
        )
        return {"distill": self.alpha * loss_K}

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Store a frozen copy as the next teacher; a class stays in the group of its first experience."""
        known = {c for group in state["groups"] for c in group}
        brought = range(network.vocabulary) or context.experience.classes  # every domain of a text has all tokens
        new = tuple(sorted(set(brought) - known))
        return {"teacher": freeze(network), "groups": (*state["groups"], new) if new else state["groups"]}
