"""Experience replay: keep a few samples, show them again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from clframe.core.component import Component
from clframe.core.types import Batch, Moment, Pool, State
from clframe.data.memory import Budget, MemoryPolicy, Selection, drawn
from clframe.errors import ConfigError
from clframe.nn.features import feature_reader
from clframe.nn.network import Network


@dataclass(frozen=True, kw_only=True)
class ER(Component):
    """Experience replay (ER): every batch is joined by samples of earlier classes from a small memory.

    A batch of B new samples is followed by replayed ones, drawn with replacement; the cross-entropy is taken
    over both. Rolnick et al., "Experience Replay for Continual Learning" (2019); Chaudhry et al., "On Tiny
    Episodic Memories in Continual Learning" (2019).

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
    replay: Literal["extra", "fixed", "half", "concatenate"] = "extra"
    ratio: float = 1.0
    replayed: int = 32
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse sizes that mean nothing."""
        if self.memory < 1:
            raise ConfigError(f"components.er.memory: found {self.memory}; give at least 1 sample")
        if self.budget == "per_class" and self.selection in ("random", "reservoir"):
            raise ConfigError(
                f"components.er.budget: found per_class with selection {self.selection}, which knows no "
                f"classes; use total, or select balanced or herding"
            )
        if not 0 < self.ratio <= 1000:
            raise ConfigError(f"components.er.ratio: found {self.ratio}; give a number above 0, at most 1000")
        if self.replayed < 1:
            raise ConfigError(f"components.er.replayed: found {self.replayed}; give at least 1 sample")
        if not self.scale >= 0:
            raise ConfigError(f"components.er.scale: found {self.scale}; give a number of at least 0")
        if self.replay == "concatenate" and self.scale not in (0, 1):
            raise ConfigError(
                f"components.er.scale: found {self.scale} with replay concatenate, which weighs all samples alike; "
                f"leave it at 1, or take extra, fixed or half"
            )

    def acts_at(self) -> tuple[str, ...]:
        """At ``pool`` or ``batch``, whichever the way of replay needs."""
        unused = {"concatenate": {"batch"}, "half": set[str]()}.get(self.replay, {"pool"})
        return tuple(hook for hook in super().acts_at() if hook not in unused)

    @property
    def policy(self) -> MemoryPolicy:
        """What the memory keeps."""
        return MemoryPolicy(self.memory, self.budget, self.selection)

    def check(self, *, classes: int) -> None:
        """A memory that is shared by classes must have room for one sample of each."""
        by_class = self.budget == "total" and self.selection in ("balanced", "herding")
        if by_class and self.memory < classes:
            raise ConfigError(
                f"components.er.memory: found {self.memory} for {classes} classes; give at least {classes}, "
                f"one sample of each"
            )

    def init(self, network: Network) -> State:
        """An empty memory."""
        return self.policy.empty()

    def pool(self, samples: Pool, size: int, state: State) -> tuple[Pool, int]:
        """Memory and new data, or new data in half batches; the new data alone while the memory is empty."""
        if state["x"] is None:
            return samples, size
        if self.replay == "half":
            return samples, -(-size // 2)
        return samples.extended(state["x"], state["y"]), size

    def batch(self, batch: Batch, moment: Moment, state: State) -> Batch:
        """New samples first, then replayed ones."""
        if state["x"] is None:
            return batch
        size = batch.y.shape[0]
        ratio = self.ratio if self.replay == "extra" else 1
        count = self.replayed if self.replay == "fixed" else -int(-ratio * size // 1)
        index = drawn(state, count, generator=moment.generator)
        samples = moment.experience.samples
        x = samples.prepare(state["x"].index_select(0, index), generator=moment.generator).to(batch.x.device)
        y = state["y"].index_select(0, index).to(batch.y.device)
        weight_B = None
        if self.scale != 1:
            weight_B = torch.ones(size + count, device=batch.x.device)
            weight_B[size:] = self.scale
        return Batch(torch.cat([batch.x, x]), torch.cat([batch.y, y]), weight_B)

    def advance(self, network: Network, moment: Moment, state: State) -> State:
        """Make room, then keep samples of this experience."""
        experience = moment.experience
        features = feature_reader(network, experience.samples)
        return self.policy.renewed(state, experience, generator=moment.generator, features=features)
