"""Experience replay: keep a few samples, show them again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from clframe.core.component import Component
from clframe.core.types import Batch, Moment, State
from clframe.errors import ConfigError
from clframe.functional.memory import balanced_choice, balanced_trim, quotas
from clframe.nn.network import Network


@dataclass(frozen=True, kw_only=True)
class ER(Component):
    """Experience replay (ER): every batch is joined by samples of earlier classes from a small memory.

    The memory holds ``memory`` samples in all, the same number of each class so far, chosen at random. A
    batch of B new samples is followed by ``ceil(ratio * B)`` replayed ones, drawn with replacement; the
    cross-entropy is taken over both. Rolnick et al., "Experience Replay for Continual Learning" (2019);
    Chaudhry et al., "On Tiny Episodic Memories in Continual Learning" (2019).

    Args:
        memory: Samples kept in all.
        ratio: Replayed samples for each new one.
        scale: Weight of a replayed sample in the cross-entropy; a new one weighs one.
    """

    name: ClassVar[str] = "er"
    slots: ClassVar[frozenset[str]] = frozenset({"batch"})
    weight: ClassVar[str] = "scale"

    memory: int = 200
    ratio: float = 1.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Refuse sizes that mean nothing."""
        if self.memory < 1:
            raise ConfigError(f"components.er.memory: found {self.memory}; give at least 1 sample")
        if not self.ratio > 0:
            raise ConfigError(f"components.er.ratio: found {self.ratio}; give a number above 0")
        if not self.scale >= 0:
            raise ConfigError(f"components.er.scale: found {self.scale}; give a number of at least 0")

    def check(self, *, classes: int) -> None:
        """A memory must have room for one sample of each class."""
        if self.memory < classes:
            raise ConfigError(
                f"components.er.memory: found {self.memory} for {classes} classes; give at least {classes}, "
                f"one sample of each"
            )

    def init(self, network: Network) -> State:
        """An empty memory; ``group`` numbers the (experience, class) pair each sample came from."""
        none = torch.empty(0, dtype=torch.long)
        return {"x": None, "y": none, "group": none, "groups": 0}

    def batch(self, batch: Batch, moment: Moment, state: State) -> Batch:
        """New samples first, then as many replayed ones as ``ratio`` says."""
        if state["x"] is None:
            return batch
        size = len(batch.y)
        count = -int(-self.ratio * size // 1)
        index = torch.randint(len(state["y"]), (count,), generator=moment.generator)
        x = moment.experience.samples.prepare(state["x"][index]).to(batch.x.device)
        y = state["y"][index].to(batch.y.device)
        weight_B = None
        if self.scale != 1:
            weight_B = torch.ones(size + count, device=batch.x.device)
            weight_B[size:] = self.scale
        return Batch(torch.cat([batch.x, x]), torch.cat([batch.y, y]), weight_B)

    def advance(self, network: Network, moment: Moment, state: State) -> State:
        """Make room, then keep random samples of each class of this experience."""
        experience, samples = moment.experience, moment.experience.samples
        old, groups = state["groups"], state["groups"] + len(experience.classes)
        quota = quotas(self.memory, range(groups))
        kept = balanced_trim(state["group"], {g: quota[g] for g in range(old)})
        y = samples.y.cpu()
        number = {c: old + i for i, c in enumerate(experience.classes)}
        fresh = balanced_choice(y, {c: quota[g] for c, g in number.items()}, generator=moment.generator)
        x, y = samples.raw(fresh), y[fresh]
        group = torch.tensor([number[c] for c in y.tolist()], dtype=torch.long)
        if state["x"] is not None:
            x = torch.cat([state["x"][kept], x])
        return {
            "x": x,
            "y": torch.cat([state["y"][kept], y]),
            "group": torch.cat([state["group"][kept], group]),
            "groups": groups,
        }
