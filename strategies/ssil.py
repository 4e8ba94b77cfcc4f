"""Separated softmax: new and old classes never compete in the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from clframe.core.component import Component
from clframe.core.types import State, Step, StepContext
from clframe.errors import ConfigError
from clframe.functional.class_incremental import separated_cross_entropy
from clframe.functional.losses import distillation
from clframe.nn.frozen import freeze
from clframe.nn.network import Network


@dataclass(frozen=True, kw_only=True)
class SSIL(Component):
    """Separated softmax (SS-IL): new samples compete among new classes only, replayed ones among old classes only.

    ``L_k = CE(new samples over new classes, old samples over old classes) + lamb * T^2 * sum over old experiences of
    KL(teacher_k || student_k)`` at every exit k, with a separate softmax over each old experience's classes, on all
    samples of the joined batch. New samples, far more than old ones, then cannot lower the logits of old classes. Ahn
    et al., "SS-IL: Separated Softmax for Incremental Learning" (2021).

    Use it for class-incremental streams with a replay buffer; few replayed samples suffice, as in
    ``er(replay=fixed, replayed=32) + ssil``. Cost: one forward pass of the teacher per step and a copy of the network.

    Args:
        lamb: Weight of the distillation: 0.25 as tuned for auxiliary classifiers (2025), 1 in the paper.
        temperature: T; higher values give more weight to small probabilities.
    """

    name: ClassVar[str] = "ssil"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    slots: ClassVar[frozenset[str]] = frozenset({"task_loss"})
    terms: ClassVar[tuple[str, ...]] = ("distill",)
    needs_memory: ClassVar[bool] = True

    lamb: float = 0.25
    temperature: float = 2.0

    def __post_init__(self) -> None:
        """Validate the options."""
        if not self.lamb >= 0:
            raise ConfigError(f"components.ssil.lamb: found {self.lamb}; give a number of at least 0")
        if not self.temperature > 0:
            raise ConfigError(f"components.ssil.temperature: found {self.temperature}; give a number above 0")

    def init_state(self, network: Network) -> State:
        """Return a state without teacher."""
        return {"teacher": None, "groups": ()}

    def task_loss(self, step: Step, state: State) -> Tensor:
        """Return the cross-entropy under separated softmaxes."""
        experience, batch = step.context.experience, step.batch
        old = tuple(sorted(set(experience.past) - set(experience.classes)))
        return separated_cross_entropy(
            step.output.logits, batch.y, new=experience.classes, old=old, weight_B=batch.weight_B
        )

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """Return the distillation of each old experience's classes, from the second experience on."""
        if state["teacher"] is None or self.lamb == 0:
            return {}
        teacher = step.run(state["teacher"])
        loss_K = distillation(
            step.output.logits, teacher.logits, groups=state["groups"], temperature=self.temperature
        )
        return {"distill": self.lamb * loss_K}

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Store a frozen copy as the next teacher; a class stays in the group of its first experience."""
        known = {c for group in state["groups"] for c in group}
        new = tuple(sorted(set(context.experience.classes) - known))
        return {"teacher": freeze(network), "groups": (*state["groups"], new) if new else state["groups"]}
