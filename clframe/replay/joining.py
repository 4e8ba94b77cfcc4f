"""Replay: how a memory and new data meet, whoever keeps the memory and whatever its samples are used for.

Shape suffixes: B batch, M kept samples, R replayed ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from clframe.core.types import Batch, Pool, State, StepContext
from clframe.errors import ConfigError
from clframe.replay.buffers import Budget, MemoryPolicy, Selection, drawn

Joining = Literal["extra", "fixed", "half", "concatenate"]
"""``extra``: as many as a batch has, times a ratio; ``fixed``: always as many; ``half``: batches of half the size,
joined by as many; ``concatenate``: one pool of memory and new data."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A memory and the way in which it joins training, as a field of the component that keeps it.

    >>> Replay(owner="er", memory=10, how="extra", ratio=0.5).count(5)
    3

    Args:
        owner: The component, for its name in messages.
        memory: See :class:`~clframe.replay.buffers.MemoryPolicy`, as for the next two.
        budget: What ``memory`` counts.
        selection: Which samples are kept.
        how: How they join.
        ratio: With ``extra``, replayed samples for each new one.
        replayed: With ``fixed``, how many.
        scale: Weight of a replayed sample in the task loss; a new one weighs one.

    Raises:
        ConfigError: Sizes that mean nothing.
    """

    owner: str
    memory: int
    budget: Budget = "total"
    selection: Selection = "balanced"
    how: Joining = "extra"
    ratio: float = 1.0
    replayed: int = 32
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse sizes that mean nothing, in the name of the owner's options."""
        where = f"components.{self.owner}"
        if self.memory < 1:
            raise ConfigError(f"{where}.memory: found {self.memory}; give at least 1 sample")
        if self.budget == "per_class" and self.selection in ("random", "reservoir"):
            raise ConfigError(
                f"{where}.budget: found per_class with selection {self.selection}, which knows no "
                f"classes; use total, or select balanced or herding"
            )
        if not 0 < self.ratio <= 1000:
            raise ConfigError(f"{where}.ratio: found {self.ratio}; give a number above 0, at most 1000")
        if self.replayed < 1:
            raise ConfigError(f"{where}.replayed: found {self.replayed}; give at least 1 sample")
        if not self.scale >= 0:
            raise ConfigError(f"{where}.scale: found {self.scale}; give a number of at least 0")
        if self.how == "concatenate" and self.scale not in (0, 1):
            raise ConfigError(
                f"{where}.scale: found {self.scale} with replay concatenate, which weighs all samples alike; "
                f"leave it at 1, or take extra, fixed or half"
            )

    @cached_property
    def policy(self) -> MemoryPolicy:
        """What the memory keeps."""
        return MemoryPolicy(self.memory, self.budget, self.selection)

    @property
    def by_class(self) -> bool:
        """Whether classes share the memory."""
        return self.budget == "total" and self.selection in ("balanced", "herding")

    @property
    def hooks(self) -> frozenset[str]:
        """Which of the hooks of the slot ``batch`` this way of joining needs."""
        at_pool, at_batch = self.how in ("half", "concatenate"), self.how != "concatenate"
        return frozenset({*(["training_set"] if at_pool else []), *(["make_batch"] if at_batch else [])})

    def acting(self, hooks: Sequence[str]) -> tuple[str, ...]:
        """Of the ``hooks`` of a component that has both, those that this way of joining needs."""
        return tuple(hook for hook in hooks if hook not in {"training_set", "make_batch"} - self.hooks)

    def check(self, *, classes: int) -> None:
        """Refuse a memory without room for one sample of each class (ConfigError)."""
        if self.budget == "total" and self.memory < classes:
            raise ConfigError(
                f"components.{self.owner}.memory: found {self.memory} for {classes} classes; give at least "
                f"{classes}, one sample of each"
            )

    def empty(self) -> State:
        """The memory at the start of a run."""
        return self.policy.empty()

    def count(self, size: int) -> int:
        """How many samples are replayed with ``size`` new ones."""
        if self.how == "fixed":
            return self.replayed
        ratio = self.ratio if self.how == "extra" else 1
        return -int(-ratio * size // 1)

    def training_set(self, samples: Pool, size: int, state: State) -> tuple[Pool, int]:
        """Memory and new data, or new data in half batches; the new data alone while the memory is empty."""
        if state["x"] is None or self.how in ("extra", "fixed"):
            return samples, size
        if self.how == "half":
            return samples, -(-size // 2)
        return samples.extended(state["x"], state["y"]), size

    def make_batch(
        self, batch: Batch, context: StepContext, state: State, *, stored: Sequence[str] = (), draws: int = 1
    ) -> Batch:
        """New samples first, then replayed ones, drawn with replacement; the batch itself while there are none.

        Args:
            batch: New samples.
            context: Draws, and prepares as the experience does.
            state: The memory.
            stored: What else the memory keeps of its samples that the batch shall bring, for those of the first draw.
            draws: How often to draw.
        """
        if state["x"] is None:
            return batch
        index_R, *more = [self.drawn(batch, context, state) for _ in range(draws)]
        extras = {key: state[key].index_select(0, index_R).to(batch.x.device) for key in stored}
        return replace(self.joined(batch, torch.cat([index_R, *more]), context, state), extras=extras)

    def drawn(self, batch: Batch, context: StepContext, state: State) -> Tensor:
        """index_R of as many kept samples as are replayed with ``batch``."""
        return drawn(state, self.count(batch.y.shape[0]), generator=context.generator)

    def joined(self, batch: Batch, index_R: Tensor, context: StepContext, state: State) -> Batch:
        """The batch followed by the kept samples at ``index_R``, augmented as new ones are."""
        device, size = batch.x.device, batch.y.shape[0]
        raw = state["x"].index_select(0, index_R)
        x = context.experience.samples.prepare(raw, generator=context.generator).to(batch.x)
        y = state["y"].index_select(0, index_R).to(device)
        weight_B = None
        if self.scale != 1:
            weight_B = torch.ones(size + y.shape[0], device=device)
            weight_B[size:] = self.scale
        return Batch(torch.cat([batch.x, x]), torch.cat([batch.y, y]), weight_B)

    def renewed(
        self,
        context: StepContext,
        state: State,
        *,
        features: Callable[[Tensor], Tensor],
        targets: Callable[[Tensor], Mapping[str, Tensor]] | None = None,
    ) -> State:
        """Room made, then samples of this experience kept; see :meth:`MemoryPolicy.renewed`."""
        return self.policy.renewed(
            state, context.experience, generator=context.generator, features=features, targets=targets
        )
