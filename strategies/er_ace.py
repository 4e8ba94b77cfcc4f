"""Asymmetric cross-entropy: keep new classes from lowering the logits of old ones."""

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
    samples: learning a class does not lower the logits of old ones, which is what makes representations drift. Caccia
    et al., "New Insights on Reducing Abrupt Representation Change in Online Continual Learning" (2022).

    Use it with a replay component, as in ``er + er_ace``; it is strongest on online streams, where few samples are seen
    once. Cost: none. A sample is new if its class belongs to this experience; if classes reappear, all of theirs are.

    Args:
        over: Classes present: those of the new samples of a ``batch``, as published, or of the ``experience``.
        rehearse: Classes of the second term. ``all``, as published: there the buffer admits new samples during the
            experience and so learns to separate them from the old ones; here the new samples of the batch represent
            them, weighted by the share of classes that are new. ``past``: only the classes in a buffer that is filled
            at the end of experiences; new classes are then predicted too rarely.
    """

    name: ClassVar[str] = "er_ace"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    slots: ClassVar[frozenset[str]] = frozenset({"task_loss"})
    needs_memory: ClassVar[bool] = True

    over: Literal["batch", "experience"] = "batch"
    rehearse: Literal["all", "past"] = "all"

    def init_state(self, network: Network) -> State:
        """Return a state without new classes."""
        return {"new": None, "share": 0.0}

    def before_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Mark this experience's classes as new_C; None in the first experience."""
        experience = context.experience
        if not experience.past:
            return {"new": None, "share": 0.0}
        new_C = torch.zeros(network.classes, dtype=torch.bool)
        new_C[list(experience.classes)] = True
        share = len(experience.classes) / len(experience.classes_so_far) if self.rehearse == "all" else 0.0
        return {"new": new_C.to(network.final.weight.device), "share": share}

    def task_loss(self, step: Step, state: State) -> Tensor:
        """Return one value per exit: plain cross-entropy in the first experience, asymmetric afterwards."""
        logits, y_B, weight_B = step.output.logits, step.batch.y, step.batch.weight_B
        if state["new"] is None:
            return cross_entropy(logits, y_B, weight_B=weight_B)
        new_C = state["new"].to(y_B.device)
        new_B = new_C.index_select(0, y_B)
        # Several samples of a class write the same value, so the result does not depend on their order.
        present_C = torch.zeros_like(new_C).scatter(0, y_B, new_B) if self.over == "batch" else new_C
        return asymmetric_cross_entropy(
            logits, y_B, new_B=new_B, present_C=present_C, share=state["share"], weight_B=weight_B
        )
