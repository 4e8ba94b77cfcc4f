"""Loss decoupling: weight the loss among new classes and against old ones differently."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from clframe.core.component import Component
from clframe.core.types import State, Step
from clframe.errors import ConfigError
from clframe.functional.class_incremental import decoupled_cross_entropy
from clframe.functional.losses import cross_entropy


@dataclass(frozen=True, kw_only=True)
class LODE(Component):
    """Loss decoupling (LODE): split the loss of new samples into a part among new classes and a part against old ones.

    ``L_k = c * CE(among new) + rho * (new classes / old classes) * CE(new against old) + CE(replayed samples)`` at
    every exit k, each the mean over its samples. Lowering the logits of old classes causes forgetting, and has a
    smaller weight here; learning the new classes keeps its full weight. In the first experience it is the plain
    cross-entropy. Liang and Li, "Loss Decoupling for Task-Agnostic Continual Learning" (2023).

    Use it for class-incremental streams with a replay buffer, as in ``er(replay=half) + lode``. Cost: none.

    Args:
        c: Weight of the part among new classes: 1, or 4 with exits.
        rho: Weight of the part against old classes, times their ratio: 0.1, or 0.5 with exits.
    """

    name: ClassVar[str] = "lode"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    slots: ClassVar[frozenset[str]] = frozenset({"task_loss"})
    needs_memory: ClassVar[bool] = True

    c: float = 1.0
    rho: float = 0.1

    def __post_init__(self) -> None:
        """Validate the weights."""
        for key in ("c", "rho"):
            if not getattr(self, key) >= 0:
                raise ConfigError(f"components.lode.{key}: found {getattr(self, key)}; give a number of at least 0")

    def task_loss(self, step: Step, state: State) -> Tensor:
        """Return the decoupled loss of new samples plus the cross-entropy of old ones."""
        experience, batch = step.context.experience, step.batch
        old = tuple(sorted(set(experience.past) - set(experience.classes)))
        if not old:
            return cross_entropy(step.output.logits, batch.y, weight_B=batch.weight_B)
        return decoupled_cross_entropy(
            step.output.logits,
            batch.y,
            new=experience.classes,
            old=old,
            inner=self.c,
            outer=self.rho * len(experience.classes) / len(old),
            weight_B=batch.weight_B,
        )
