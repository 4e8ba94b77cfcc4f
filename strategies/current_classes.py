"""Cross-entropy among the classes of the current experience."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from clframe.core.component import Component
from clframe.core.types import State, Step
from clframe.functional.class_incremental import separated_cross_entropy
from clframe.functional.losses import cross_entropy


@dataclass(frozen=True, kw_only=True)
class CurrentClasses(Component):
    """Current classes: the cross-entropy of new samples is over the classes of their experience only, at every exit.

    ``L_k = mean of log sum_{c in S} exp z_c - z_y``, S the classes of the experience for a sample of one of them, and
    all classes so far for any other, such as a replayed one. So new samples do not lower the logits of old classes.
    Masana et al., "Class-Incremental Learning: Survey and Performance Evaluation on Image Classification" (2022), and
    the code of the paper on auxiliary classifiers (Szatkowski et al., 2025) train methods without a memory like this.

    Use it without a replay buffer, as in ``lwf + current_classes``; with one, see ``er_ace`` and ``ssil``. In the first
    experience, and where all classes recur, it changes nothing. Cost: none.
    """

    name: ClassVar[str] = "current_classes"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    slots: ClassVar[frozenset[str]] = frozenset({"task_loss"})

    def task_loss(self, step: Step, state: State) -> Tensor:
        """Return the cross-entropy of each exit among the classes of the experience."""
        experience, batch = step.context.experience, step.batch
        new, known = experience.classes, experience.classes_so_far
        if len(new) == len(known):
            return cross_entropy(step.output.logits, batch.y, weight_B=batch.weight_B)
        return separated_cross_entropy(step.output.logits, batch.y, new=new, old=known, weight_B=batch.weight_B)
