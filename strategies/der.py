"""Dark experience replay: hold on to what the network said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

from torch import Tensor

from clframe.core.component import Component
from clframe.core.types import Batch, Pool, State, Step, StepContext
from clframe.errors import ConfigError
from clframe.functional.losses import Columns, logit_matching
from clframe.nn.features import feature_reader
from clframe.nn.frozen import logits_reader
from clframe.nn.network import Network
from clframe.replay.buffers import Budget, Selection
from clframe.replay.joining import Replay


@dataclass(frozen=True, kw_only=True)
class DER(Component):
    """Dark experience replay (DER): replayed samples are to keep the logits that were stored with them.

    The loss is ``CE(new) + alpha * mean (logits - stored)^2``: every exit against its own logits, stored with each
    sample of the memory; replayed samples have no part in the cross-entropy. Use it as a stronger replay where
    logits fit in memory: it costs classes times exits numbers for each sample, no teacher and no further pass.
    Buzzega et al., "Dark Experience for General Continual Learning: a Strong, Simple Baseline" (2020).

    Samples and logits are stored at the end of each experience, not augmented and in evaluation mode, as the code
    of the paper on auxiliary classifiers (Szatkowski et al., 2025) and Avalanche do; the original stores them on
    the way, as training sees them, and replays them at once. On an online stream the two are the same but for that
    mode.

    Args:
        alpha: Weight of the term; published values are 0.1 to 0.5.
        memory: Samples kept: in all, or of each class.
        budget: What ``memory`` counts; see ``er``.
        selection: Which samples are kept, see ``er``; ``reservoir`` is the published way.
        replay: ``half``: half of every batch is new, followed by as many replayed; ``extra``: as many replayed as
            a whole batch of new ones, times ``ratio``; ``fixed``: always ``replayed``.
        ratio: With ``extra``, replayed samples for each new one.
        replayed: Samples replayed with each batch where ``replay`` is ``fixed``.
        columns: Logits compared: ``padded``, all of today's with 0 for classes that came later, which is near the
            original, whose network has outputs for all classes from the start; or those ``stored``: nothing then
            tells old samples from later classes, unless another component does.
    """

    name: ClassVar[str] = "der"
    slots: ClassVar[frozenset[str]] = frozenset({"batch"})
    terms: ClassVar[tuple[str, ...]] = ("logits",)
    weight: ClassVar[str] = "alpha"
    keeps_memory: ClassVar[bool] = True

    alpha: float = 0.3
    memory: int = 200
    budget: Budget = "total"
    selection: Selection = "reservoir"
    replay: Literal["half", "extra", "fixed"] = "half"
    ratio: float = 1.0
    replayed: int = 32
    columns: Columns = "padded"

    def __post_init__(self) -> None:
        """Refuse a negative weight and sizes that mean nothing."""
        if not self.alpha >= 0:
            raise ConfigError(f"components.{self.name}.alpha: found {self.alpha}; give a number of at least 0")
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
        """New samples, then replayed ones that weigh nothing in the cross-entropy; their stored logits."""
        return self._replay.make_batch(batch, context, state, stored=("logits",))

    def losses(self, step: Step, state: State) -> Mapping[str, Tensor]:
        """The distance from the stored logits, from the second experience on."""
        stored_RKC = step.batch.extras.get("logits")
        if stored_RKC is None:
            return {}
        old = [logits_BC[-stored_RKC.shape[0] :] for logits_BC in step.output.logits]
        return {"logits": self.alpha * logit_matching(old, stored_RKC, columns=self.columns)}

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Make room, then keep samples of this experience and what every exit says of them."""
        samples = context.experience.samples
        read = logits_reader(network, samples)
        return self._replay.renewed(
            context, state, features=feature_reader(network, samples), targets=lambda index: {"logits": read(index)}
        )
