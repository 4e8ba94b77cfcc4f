"""Separated softmax: new and old classes never compete in the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
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

    ``L_k = CE(new samples over new classes, old samples over old classes) + lamb * T^2 * sum over old experiences
    of KL(teacher_k || student_k)`` at every exit k, each old experience's classes under a softmax of their own, on
    all samples of the joined batch. New samples, many more than old ones, then cannot push the scores of old
    classes down. For class-incremental streams with a memory; few replayed samples are enough, as in
    ``er(replay=fixed, replayed=32) + ssil``. Costs one forward pass of the teacher a step and a copy of the
    network. Ahn et al., "SS-IL: Separated Softmax for Incremental Learning" (2021).

    Args:
        lamb: Weight of the distillation: 0.25 as tuned for auxiliary classifiers (2025), 1 in the paper.
        temperature: T; higher values listen more to the small probabilities.
    """

    name: ClassVar[str] = "ssil"
    slots: ClassVar[frozenset[str]] = frozenset({"task_loss"})
    terms: ClassVar[tuple[str, ...]] = ("distill",)
    needs_memory: ClassVar[bool] = True

    lamb: float = 0.25
    temperature: float = 2.0

    def __post_init__(self) -> None:
        """Refuse a negative weight and a temperature that divides by zero."""
        if not self.lamb >= 0:
            raise ConfigError(f"components.ssil.lamb: found {self.lamb}; give a number of at least 0")
        if not self.temperature > 0:
            raise ConfigError(f"components.ssil.temperature: found {self.temperature}; give a number above 0")

    def init_state(self, network: Network) -> State:
        """No teacher before the first experience ends."""
        return {"teacher": None, "groups": ()}

    def task_loss(self, step: Step, state: State) -> Tensor:
        """Cross-entropy under separated softmaxes."""
        experience, batch = step.context.experience, step.batch
        old = tuple(sorted(set(experience.past) - set(experience.classes)))
        return separated_cross_entropy(
            step.output.logits, batch.y, new=experience.classes, old=old, weight_B=batch.weight_B
        )

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """Distillation of each old experience's classes, from the second experience on."""
        if state["teacher"] is None or self.lamb == 0:
            return {}
        with torch.no_grad():
            teacher = state["teacher"](step.batch.x)
        loss_K = distillation(
            step.output.logits, teacher.logits, groups=state["groups"], temperature=self.temperature
        )
        return {"distill": self.lamb * loss_K}

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """The model as it is now teaches the next experience; a class stays in the group it first came in."""
        known = {c for group in state["groups"] for c in group}
        new = tuple(sorted(set(context.experience.classes) - known))
        return {"teacher": freeze(network), "groups": (*state["groups"], new) if new else state["groups"]}
