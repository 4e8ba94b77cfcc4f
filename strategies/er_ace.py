"""Asymmetric cross-entropy: new classes do not push the old ones down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clframe.core.component import Component
from clframe.core.types import State, Step, StepContext
from clframe.functional.losses import asymmetric_cross_entropy, cross_entropy
from clframe.nn.network import Network


@dataclass(frozen=True, kw_only=True)
class ERACE(Component):
    """Asymmetric cross-entropy (ER-ACE): new samples compete among the new classes, replayed ones among all.

    The loss is ``CE(new, over the classes present) + CE(replayed, over all classes)``, each a mean over its own
    samples: learning a class does not push the old ones down, which is what makes representations drift. Compose
    it with a replay component, as in ``er + er_ace``; it costs nothing. Best where few samples are seen once,
    online. Caccia et al., "New Insights on Reducing Abrupt Representation Change in Online Continual Learning" (2022).

    A sample is new where its class is among this experience's; where classes come back, all are.

    Args:
        over: Classes present: those of the new samples of a ``batch``, as published, or of the ``experience``.
        rehearse: Classes of the second term: ``all``, as published, where the memory takes in new samples on the way
            and so learns to tell them from the old ones; new samples of the batch stand for them, with the share of
            classes that are new. ``past``: only what an end-of-experience memory holds; new classes then win too
            seldom.
    """

    name: ClassVar[str] = "er_ace"
    slots: ClassVar[frozenset[str]] = frozenset({"task_loss"})
    needs_memory: ClassVar[bool] = True

    over: Literal["batch", "experience"] = "batch"
    rehearse: Literal["all", "past"] = "all"

    def init_state(self, network: Network) -> State:
        """No class is new yet."""
        return {"new": None, "share": 0.0}

    def before_experience(self, network: Network, context: StepContext, state: State) -> State:
        """new_C, which classes are this experience's; none are told apart while there are no others."""
        experience = context.experience
        if not experience.past:
            return {"new": None, "share": 0.0}
        new_C = torch.zeros(network.classes, dtype=torch.bool)
        new_C[list(experience.classes)] = True
        share = len(experience.classes) / len(experience.classes_so_far) if self.rehearse == "all" else 0.0
        return {"new": new_C.to(network.final.weight.device), "share": share}

    def task_loss(self, step: Step, state: State) -> Tensor:
        """One value per exit: plain cross-entropy in the first experience, asymmetric after it."""
        logits, y_B, weight_B = step.output.logits, step.batch.y, step.batch.weight_B
        if state["new"] is None:
            return cross_entropy(logits, y_B, weight_B=weight_B)
        new_C = state["new"].to(y_B.device)
        new_B = new_C.index_select(0, y_B)
        # A class is written as often as it has samples, each time with the same answer.
        present_C = torch.zeros_like(new_C).scatter(0, y_B, new_B) if self.over == "batch" else new_C
        return asymmetric_cross_entropy(
            logits, y_B, new_B=new_B, present_C=present_C, share=state["share"], weight_B=weight_B
        )
