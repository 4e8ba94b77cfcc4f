"""Memories: which samples of a stream are kept for replay, as a component's state of plain tensors.

Shape suffixes: M kept samples, N samples of one experience, F features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from clframe.core.types import Experience, State
from clframe.functional.memory import (
    appended,
    balanced_choice,
    balanced_trim,
    herding,
    quotas,
    reservoir,
    upload,
)

Budget = Literal["total", "per_class"]
Selection = Literal["balanced", "herding", "random", "reservoir"]


@dataclass(frozen=True)
class MemoryPolicy:
    """What a memory keeps, decided at the end of every experience.

    A memory is a mapping: ``x``, inputs as stored (None while it is empty), ``y``, and whatever else the
    policy or the component that owns it keeps of each sample. Nothing else is needed to go on from a
    checkpoint.

    Args:
        size: Samples kept: in all, or of each class.
        budget: ``"total"``, a fixed number shared by all classes so far; ``"per_class"``, a fixed number for
            each of them (with balanced and herding only).
        selection: ``"balanced"``, the same number of each class, at random; ``"herding"``, the same number
            of each class, nearest to its mean in feature space; ``"random"``, the same number from each
            experience, whatever their classes; ``"reservoir"``, every sample seen so far with the same
            probability.
    """

    size: int
    budget: Budget = "total"
    selection: Selection = "balanced"

    def empty(self) -> State:
        """The memory at the start of a run.

        ``group`` numbers the portions that trimming treats alike, and ``owner`` says whom each of them
        belongs to: a class, or an experience. A reservoir keeps each sample's ``key`` instead.
        """
        y = torch.empty(0, dtype=torch.long)
        if self.selection == "reservoir":
            return {"x": None, "y": y, "key": torch.empty(0, dtype=torch.float64)}
        return {"x": None, "y": y, "group": y, "owner": ()}

    def renewed(
        self,
        memory: State,
        experience: Experience,
        *,
        generator: Generator,
        features: Callable[[Tensor], Tensor],
        targets: Callable[[Tensor], Mapping[str, Tensor]] | None = None,
    ) -> State:
        """The memory after ``experience``: kept samples first, then fresh ones.

        Args:
            memory: As it was before.
            experience: The one just learnt.
            generator: Draws what is random.
            features: features_NF of the experience's samples at an index; called by herding only.
            targets: What else to keep of the fresh samples at an index, by name, such as their logits; one
                row for each. Rows that are wider than those kept before widen them by ``-inf``.
        """
        y_N = experience.samples.y.cpu()
        if self.selection == "reservoir":
            key_N = torch.rand(len(y_N), generator=generator, dtype=torch.float64)
            kept, fresh = reservoir(memory["key"], key_N, self.size)
            owner, columns = {}, {"key": key_N[fresh]}
        else:
            group_N, owners = self._portions(y_N, experience, memory["owner"])
            quota = self.quotas(owners)
            old = len(memory["owner"])
            kept = balanced_trim(memory["group"], {g: quota[g] for g in range(old)})
            room = {g: quota[g] for g in range(old, len(owners))}
            fresh = (
                _herded(group_N, room, features)
                if self.selection == "herding"
                else balanced_choice(group_N, room, generator=generator)
            )
            owner, columns = {"owner": owners}, {"group": group_N[fresh]}
        x = experience.samples.raw(fresh)
        columns = {"x": x, "y": y_N[fresh].to(x.device), **columns, **(targets(fresh) if targets else {})}
        if memory["x"] is not None:
            columns = {
                name: appended(memory[name][kept.to(memory[name].device)], new)
                for name, new in columns.items()
            }
        return {**columns, **owner}

    def quotas(self, owners: tuple[int, ...]) -> dict[int, int]:
        """Samples that each portion may hold: its owner's share, divided among the portions of that owner.

        >>> MemoryPolicy(10).quotas((0, 1, 0))
        {0: 3, 2: 2, 1: 5}
        """
        named = list(dict.fromkeys(owners))
        share = dict.fromkeys(named, self.size) if self.budget == "per_class" else quotas(self.size, named)
        return {
            portion: room
            for owner in named
            for portion, room in quotas(share[owner], [g for g, o in enumerate(owners) if o == owner]).items()
        }

    def _portions(
        self, y_N: Tensor, experience: Experience, before: tuple[int, ...]
    ) -> tuple[Tensor, tuple[int, ...]]:
        """The portion of each new sample, numbered after those ``before``, and the owners of all portions."""
        if self.selection == "random":
            return torch.full_like(y_N, len(before)), (*before, experience.index)
        number = {c: len(before) + i for i, c in enumerate(experience.classes)}
        group_N = torch.tensor([number[c] for c in y_N.tolist()], dtype=torch.long)
        return group_N, (*before, *experience.classes)


def drawn(memory: State, count: int, *, generator: Generator) -> Tensor:
    """index_K of ``count`` kept samples, drawn with replacement, where the samples are."""
    index = torch.randint(memory["y"].shape[0], (count,), generator=generator)  # len() of a tensor is slow
    return upload(index, memory["x"].device)


def _herded(group_N: Tensor, room: Mapping[int, int], features: Callable[[Tensor], Tensor]) -> Tensor:
    """The first ``room`` samples of each group in the order of herding."""
    chosen = [torch.empty(0, dtype=torch.long)]
    for group, count in room.items():
        members = (group_N == group).nonzero().flatten()
        if len(members):
            chosen.append(members[herding(features(members), count).cpu()])
    return torch.cat(chosen)
