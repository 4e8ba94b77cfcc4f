"""Experience replay: keep a few samples, show them again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from clframe.core.component import Component
from clframe.core.types import Batch, Pool, State, StepContext
from clframe.nn.features import feature_reader
from clframe.nn.network import Network
from clframe.replay.buffers import Budget, MemoryPolicy, Selection
from clframe.replay.joining import Joining, Replay


@dataclass(frozen=True, kw_only=True)
class ER(Component):
    """Experience replay (ER): every batch is joined by samples of earlier classes from a small memory.

    A batch of B new samples is followed by replayed ones, drawn with replacement; the cross-entropy is taken
    over both. Rolnick et al., "Experience Replay for Continual Learning" (2019); Chaudhry et al., "On Tiny
    Episodic Memories in Continual Learning" (2019).

    Use it wherever samples may be stored: the first thing to try, and what other components read their replayed
    samples from. Costs the memory, held as stored in the data, and the training of the replayed samples: batches of
    twice the size as it stands, or by ``replay`` more steps.

    Args:
        memory: Samples kept: in all, or of each class.
        budget: ``total`` shares ``memory`` among the classes so far, ``per_class`` keeps it of each.
        selection: ``balanced`` keeps the same number of each class, at random; ``herding`` those nearest to
            the class mean in feature space (iCaRL); ``random`` the same number from each experience;
            ``reservoir`` any sample seen so far with the same probability.
        replay: How memory and new data meet. ``extra`` replays ``ceil(ratio * B)`` samples with each batch of
            B = ``trainer.batch_size`` new ones, ``fixed`` always ``replayed``. ``half`` keeps joined batches at
            ``trainer.batch_size``: half of it new (rounded up), as many old, so an epoch has twice the steps
            (ER and DER++ as the literature runs them). ``concatenate`` makes one pool of memory and new data,
            of which every epoch sees each sample once, in one shuffled order (iCaRL, BiC, "LwF + memory").
        ratio: With ``extra``, replayed samples for each new one; 1 makes half of every joined batch old, a
            batch of twice ``trainer.batch_size``.
        replayed: Samples replayed with each batch where ``replay`` is ``fixed``.
        scale: Weight of a replayed sample in the cross-entropy; a new one weighs one. A pool does not tell
            them apart, so ``concatenate`` takes 1 only.
    """

    name: ClassVar[str] = "er"
    slots: ClassVar[frozenset[str]] = frozenset({"batch"})
    weight: ClassVar[str] = "scale"
    keeps_memory: ClassVar[bool] = True

    memory: int = 200
    budget: Budget = "total"
    selection: Selection = "balanced"
    replay: Joining = "extra"
    ratio: float = 1.0
    replayed: int = 32
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse sizes that mean nothing."""
        _ = self._replay  # made now, it refuses them now

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
            scale=self.scale,
        )

    def acts_at(self) -> tuple[str, ...]:
        """At ``pool`` or ``batch``, whichever the way of replay needs."""
        return self._replay.acting(super().acts_at())

    @property
    def policy(self) -> MemoryPolicy:
        """What the memory keeps."""
        return self._replay.policy

    def check(self, *, classes: int) -> None:
        """A memory that is shared by classes must have room for one sample of each."""
        if self._replay.by_class:
            self._replay.check(classes=classes)

    def init_state(self, network: Network) -> State:
        """An empty memory."""
        return self._replay.empty()

    def training_set(self, samples: Pool, size: int, state: State) -> tuple[Pool, int]:
        """Memory and new data, or new data in half batches; the new data alone while the memory is empty."""
        return self._replay.training_set(samples, size, state)

    def make_batch(self, batch: Batch, context: StepContext, state: State) -> Batch:
        """New samples first, then replayed ones."""
        return self._replay.make_batch(batch, context, state)

    def after_experience(self, network: Network, context: StepContext, state: State) -> State:
        """Make room, then keep samples of this experience."""
        features = feature_reader(network, context.experience.samples)
        return self._replay.renewed(context, state, features=features)
