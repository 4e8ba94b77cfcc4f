"""iCaRL: one-against-all losses, distillation, and the nearest class mean as answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from clframe.core.component import Component
from clframe.core.types import State, Step, StepContext
from clframe.errors import ConfigError
from clframe.functional.class_incremental import binary_cross_entropy, binary_distillation, mean_scores
from clframe.functional.losses import cross_entropy
from clframe.nn.features import class_sums, embedded
from clframe.nn.frozen import freeze
from clframe.nn.network import Network
from clframe.nn.types import Output
from clframe.replay.buffers import Kept


@dataclass(frozen=True, kw_only=True)
class ICaRL(Component):
    """Incremental classifier and representation learning (iCaRL): the nearest mean of kept samples answers.

    ``L_k = sum over new classes of BCE(target) + lamb * sum over old classes of BCE(teacher_k's sigmoid)`` at every
    exit k, on new and kept samples alike. Each exit answers with the class whose kept samples have the nearest mean
    in its own features (a tap averaged over its map, or its first token, brought to length 1); the scores are minus
    the squared distances. Means are taken at the end of each experience. For class-incremental streams with a
    memory, as in ``er(selection=herding, replay=concatenate) + icarl``. Costs one forward pass of the teacher a
    step, a copy of the network, and a pass over the memory for each experience. Rebuffi et al., "iCaRL: Incremental
    Classifier and Representation Learning" (2017).

    Args:
        loss: ``binary`` as published, or ``softmax``: cross-entropy over all classes with the same distillation, as
            in FACIL and the auxiliary classifiers (2025).
        lamb: Weight of the distillation; 1 in both.
    """

    name: ClassVar[str] = "icarl"
    slots: ClassVar[frozenset[str]] = frozenset({"task_loss", "logits"})
    terms: ClassVar[tuple[str, ...]] = ("distill",)
    needs_memory: ClassVar[bool] = True

    loss: Literal["binary", "softmax"] = "binary"
    lamb: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a negative weight."""
        if not self.lamb >= 0:
            raise ConfigError(f"components.icarl.lamb: found {self.lamb}; give a number of at least 0")

    def taps(self, network: Network) -> Sequence[str]:
        """Where the exits are."""
        return tuple(dict.fromkeys(network.exit_taps))

    def init_state(self, network: Network) -> State:
        """No teacher and no means before the first experience ends."""
        return {"teacher": None, "taps": network.exit_taps, "sums": None, "known_C": None}

    def task_loss(self, step: Step, state: State) -> Tensor:
        """One-against-all cross-entropy over the new classes, or cross-entropy over all."""
        logits, batch = step.output.logits, step.batch
        if self.loss == "softmax":
            return cross_entropy(logits, batch.y, weight_B=batch.weight_B)
        return binary_cross_entropy(
            logits, batch.y, classes=step.context.experience.classes, weight_B=batch.weight_B
        )

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """One-against-all distillation over the old classes, from the second experience on."""
        experience = step.context.experience
        old = tuple(sorted(set(experience.past) - set(experience.classes)))
        if state["teacher"] is None or not old or self.lamb == 0:
            return {}
        with torch.no_grad():
            teacher = state["teacher"](step.batch.x)
        loss_K = binary_distillation(
            step.output.logits, teacher.logits, classes=old, weight_B=step.batch.weight_B
        )
        return {"distill": self.lamb * loss_K}

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """The model as it is now teaches the next experience; the means are those of the memory as it is now."""
        state = {**state, "teacher": freeze(network)}
        if context.memory is None:
            return state
        sums, count_C = class_sums(network, Kept(context.memory, context.experience.samples))
        return {**state, "sums": sums, "known_C": count_C > 0}

    def adjust_logits(self, output: Output, state: State) -> Output:
        """Minus the squared distance to each class mean, at every exit; logits before there are means."""
        if state["sums"] is None:
            return output
        scores = [
            mean_scores(embedded(output.taps[tap]), sum_CF, state["known_C"], classes=logits_BC.shape[1])
            for tap, sum_CF, logits_BC in zip(state["taps"], state["sums"], output.logits, strict=True)
        ]
        return output._replace(logits=tuple(scores))
