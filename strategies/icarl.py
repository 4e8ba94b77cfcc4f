"""iCaRL: one-against-all losses, distillation, and nearest-class-mean prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from clframe.core.component import Component
from clframe.core.types import State, Step, StepContext
from clframe.errors import ConfigError
from clframe.functional.class_incremental import binary_cross_entropy, binary_distillation, nearest_mean_scores
from clframe.functional.losses import cross_entropy
from clframe.nn.features import TapPooling, class_sums, embed_tap
from clframe.nn.frozen import freeze
from clframe.nn.network import Network
from clframe.replay.buffers import BufferSamples


@dataclass(frozen=True, kw_only=True)
class ICaRL(Component):
    """Incremental classifier and representation learning (iCaRL): predict by the nearest mean of stored samples.

    ``L_k = sum over new classes of BCE(target) + lamb * sum over old classes of BCE(teacher_k's sigmoid)`` at every
    exit k, on new and stored samples alike. Each exit predicts the class whose stored samples have the nearest mean in
    its own features (normalized to length 1); the scores are minus the squared distances d^2. Means are computed at the
    end of each experience. Rebuffi et al., "iCaRL: Incremental Classifier and Representation Learning" (2017).

    Use it for class-incremental streams with a replay buffer, as in ``er(selection=herding, replay=concatenate) +
    icarl``. Cost: one forward pass of the teacher per step, a copy of the network, and a pass over the buffer per
    experience.

    The code of the paper on auxiliary classifiers (Szatkowski et al., 2025) differs at exits: features are the
    flattened map after 2x2 max pooling (``pooling: max``), and scores are ``-(d^2)^2`` (``scores: fourth``), which
    predict the same classes with other confidences; the preset ``icarl_paper`` sets both.

    Args:
        loss: ``binary`` as published, or ``softmax``: cross-entropy over all classes with the same distillation, as in
            FACIL and the paper on auxiliary classifiers.
        lamb: Weight of the distillation; 1 in both.
        pooling: Features of the exits before the last: ``mean``, a map averaged over its positions; ``max``, a map
            max-pooled by 2x2 and flattened, of four times fewer positions but many more numbers. Of tokens both use the
            first. The last exit always averages, as the network's own classifier does.
        scores: ``squared``: ``-d^2``; ``fourth``: ``-d^4``.
    """

    name: ClassVar[str] = "icarl"
    capturable: ClassVar[bool] = True
    distributed: ClassVar[bool] = True
    slots: ClassVar[frozenset[str]] = frozenset({"task_loss", "logits"})
    terms: ClassVar[tuple[str, ...]] = ("distill",)
    needs_memory: ClassVar[bool] = True

    loss: Literal["binary", "softmax"] = "binary"
    lamb: float = 1.0
    pooling: TapPooling = "mean"
    scores: Literal["squared", "fourth"] = "squared"

    def __post_init__(self) -> None:
        """Validate the options."""
        if not self.lamb >= 0:
            raise ConfigError(f"components.icarl.lamb: found {self.lamb}; give a number of at least 0")

    def taps(self, network: Network) -> Sequence[str]:
        """Return the taps of the exits."""
        return tuple(dict.fromkeys(network.exit_taps))

    def init_state(self, network: Network) -> State:
        """Return a state without teacher and means."""
        return {"teacher": None, "taps": network.exit_taps, "sums": None, "known_C": None}

    def task_loss(self, step: Step, state: State) -> Tensor:
        """Return the one-against-all cross-entropy over the new classes, or the cross-entropy over all."""
        logits, batch = step.output.logits, step.batch
        if self.loss == "softmax":
            return cross_entropy(logits, batch.y, weight_B=batch.weight_B)
        return binary_cross_entropy(
            logits, batch.y, classes=step.context.experience.classes, weight_B=batch.weight_B
        )

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """Return the one-against-all distillation over the old classes, from the second experience on."""
        experience = step.context.experience
        old = tuple(sorted(set(experience.past) - set(experience.classes)))
        if state["teacher"] is None or not old or self.lamb == 0:
            return {}
        teacher = step.run(state["teacher"])
        loss_K = binary_distillation(
            step.output.logits, teacher.logits, classes=old, weight_B=step.batch.weight_B
        )
        return {"distill": self.lamb * loss_K}

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Store a frozen copy as the next teacher, and the class means of the buffer."""
        state = {**state, "teacher": freeze(network)}
        if context.memory is None:
            return state
        stored = BufferSamples(context.memory, context.experience.samples)
        sums, count_C = class_sums(network, stored, pooling=self.pooling)
        return {**state, "sums": sums, "known_C": count_C > 0}

    def adjust_exit_logits(self, exit: int, logits_BC: Tensor, taps: Mapping[str, Tensor], state: State) -> Tensor:
        """Return minus the powered distance to each class mean; the logits until means exist."""
        if state["sums"] is None:
            return logits_BC
        # The last exit always averages, as in class_sums().
        pooling = self.pooling if exit < len(state["taps"]) - 1 else "mean"
        features_BF = embed_tap(taps[state["taps"][exit]], pooling=pooling)
        scores_BC = nearest_mean_scores(features_BF, state["sums"][exit], state["known_C"], classes=logits_BC.shape[1])
        return -scores_BC.square() if self.scores == "fourth" else scores_BC
