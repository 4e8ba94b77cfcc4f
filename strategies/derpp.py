"""Dark experience replay with labels: hold on to what the network said, and to what was true."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from torch import Tensor

from clframe.core.component import Component
from clframe.core.types import Batch, Pool, State, Step, StepContext
from clframe.errors import ConfigError
from clframe.functional.losses import Columns, cross_entropy, logit_matching
from clframe.nn.features import feature_reader
from clframe.nn.frozen import logits_reader
from clframe.nn.network import Network
from clframe.replay.buffers import Budget, Selection
from clframe.replay.joining import Replay


@dataclass(frozen=True, kw_only=True)
class DERpp(Component):
    """Dark experience replay ++ (DER++): replayed samples keep their stored logits and are learnt by their labels.

    The loss is ``CE(new) + alpha * mean (logits(m1) - stored(m1))^2 + beta * CE(m2)`` for two draws m1 and m2 from
    memory: every exit against its own logits, stored with each sample, and against the labels. Use it where logits
    fit in memory, as the usual choice among replay methods. Costs classes times exits numbers for each sample, and
    a batch that is longer by both draws. Buzzega et al., "Dark Experience for General Continual Learning: a Strong,
    Simple Baseline" (2020).

    Samples and logits are stored at the end of each experience, not augmented and in evaluation mode, as the code
    of the paper on auxiliary classifiers (Szatkowski et al., 2025) and Avalanche do; the original stores them on
    the way, as training sees them, and replays them at once. On an online stream the two are the same but for that
    mode.

    Args:
        alpha: Weight of the logits' term; published values are 0.1 to 0.5.
        beta: Weight of the replayed cross-entropy; published values are 0.5 and 1.
        draws: ``two``: the cross-entropy has a draw of its own, as published; ``one``: both terms share one.
        memory: Samples kept: in all, or of each class.
        budget: What ``memory`` counts; see ``er``.
        selection: Which samples are kept, see ``er``; ``reservoir`` is the published way.
        replay: How many samples a draw has. ``half``: half of every batch is new, followed by draws of the same
            size; ``extra``: as many as a whole batch of new ones, times ``ratio``; ``fixed``: always ``replayed``.
        ratio: With ``extra``, samples of a draw for each new one.
        replayed: Samples of a draw where ``replay`` is ``fixed``.
        columns: Logits compared: those ``stored``, or all of today's with 0 for classes that came later
            (``padded``), which is near the original, whose network has outputs for all classes from the start.
    """

    name: ClassVar[str] = "derpp"
    slots: ClassVar[frozenset[str]] = frozenset({"batch"})
    terms: ClassVar[tuple[str, ...]] = ("logits", "replay")
    keeps_memory: ClassVar[bool] = True

    alpha: float = 0.1
    beta: float = 0.5
    draws: Literal["one", "two"] = "two"
    memory: int = 200
    budget: Budget = "total"
    selection: Selection = "reservoir"
    replay: Literal["half", "extra", "fixed"] = "half"
    ratio: float = 1.0
    replayed: int = 32
    columns: Columns = "stored"

    def __post_init__(self) -> None:
        """Refuse negative weights and sizes that mean nothing."""
        for option, found in (("alpha", self.alpha), ("beta", self.beta)):
            if not found >= 0:
                raise ConfigError(f"components.{self.name}.{option}: found {found}; give a number of at least 0")
        _ = self._replay  # made now, it refuses sizes now

    @cached_property
    def _replay(self) -> Replay:
        return Replay(
            owner=self.name,
            memory=self.memory,
            budget=self.budget,
            selection=self.selection,
            how=self.replay,
            ratio=self.ratio,
            replayed=self.replayed,
            scale=0.0,
        )

    def acts_at(self) -> tuple[str, ...]:
        """At ``pool`` only where batches are halved."""
        return self._replay.acting(super().acts_at())

    def check(self, *, classes: int) -> None:
        """The memory must have room for one sample of each class."""
        self._replay.check(classes=classes)

    def init_state(self, network: Network) -> State:
        """An empty memory."""
        return self._replay.empty()

    def training_set(self, samples: Pool, size: int, state: State) -> tuple[Pool, int]:
        """New data in half batches, once there is something to replay."""
        return self._replay.training_set(samples, size, state)

    def make_batch(self, batch: Batch, context: StepContext, state: State) -> Batch:
        """New samples, then one draw or two that weigh nothing in the cross-entropy; the first one's logits."""
        return self._replay.make_batch(batch, context, state, stored=("logits",), draws=2 if self.draws == "two" else 1)

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """The distance from the stored logits and the replayed cross-entropy, from the second experience on."""
        stored_RKC = step.batch.extras.get("logits")
        if stored_RKC is None:
            return {}
        end, drawn = step.batch.y.shape[0], stored_RKC.shape[0]
        first = end - drawn if self.draws == "one" else end - 2 * drawn
        matched = [logits_BC[first : first + drawn] for logits_BC in step.output.logits]
        replayed = [logits_BC[end - drawn :] for logits_BC in step.output.logits]
        return {
            "logits": self.alpha * logit_matching(matched, stored_RKC, columns=self.columns),
            "replay": self.beta * cross_entropy(replayed, step.batch.y[end - drawn :]),
        }

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Make room, then keep samples of this experience and what every exit says of them."""
        samples = context.experience.samples
        read = logits_reader(network, samples)
        return self._replay.renewed(
            context, state, features=feature_reader(network, samples), targets=lambda index: {"logits": read(index)}
        )
