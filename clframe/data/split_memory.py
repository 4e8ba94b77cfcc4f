"""A memory of which a part is never trained on, and as much of each new class beside it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal, cast

import torch
from torch import Generator, Tensor

from clframe.core.types import Experience, Pool, Samples, State
from clframe.data.memory import Budget, MemoryPolicy
from clframe.data.samples import Loadable
from clframe.functional.seeding import generator_for


@dataclass(frozen=True)
class SplitMemory:
    """Two memories within one budget, both balanced: samples for training, and samples held out from it.

    Of the q samples that a class may have, ``ceil(share * (q - 1))`` are held out: at least one of two, never the
    only one. As many of a new class are kept from training while it is learnt, so that classes have equally many
    held-out samples, and no model has ever been trained on one of them. A class of fewer than q samples gives up
    that share of what it has.

    As state it is the memory for training (``x``, ``y``, ...), with the other one as ``held``, and the ``seed`` by
    which the next experience's samples are split.

    Args:
        size: Samples kept in both together: in all, or of each class.
        budget: What ``size`` counts.
        selection: Which samples are kept for training; those held out are random.
        share: Of the samples that are held out, above 0 and below 1.

    >>> memory = SplitMemory(20, "total", "balanced", 0.1)
    >>> memory.rooms([0, 1]), memory.rooms(range(10)), memory.rooms(range(20))
    ((9, 1), (1, 1), (1, 0))
    """

    size: int
    budget: Budget
    selection: Literal["balanced", "herding"]
    share: float

    def empty(self) -> State:
        """Both memories at the start of a run."""
        policy = MemoryPolicy(self.size, self.budget, self.selection)
        return {**policy.empty(), "held": policy.empty(), "seed": 0}

    def rooms(self, owners: tuple[int, ...] | list[int] | range) -> tuple[int, int]:
        """How many samples of each class are kept for training, and how many are held out.

        Args:
            owners: The classes, as often as they come.
        """
        room = self.size if self.budget == "per_class" else self.size // len(set(owners))
        held = self._held_of(room)
        return room - held, held

    def held_out(self, y_N: Tensor, memory: State) -> Tensor:
        """index_H of the new samples that are not trained on, ascending: a function of its arguments alone.

        Args:
            y_N: Targets of the experience.
            memory: As it was before the experience.
        """
        y_N, before = y_N.cpu(), memory["owner"]
        classes = y_N.unique().tolist()
        owners = (*before, *classes)
        quota = MemoryPolicy(self.rooms(owners)[1], "per_class").quotas(owners)
        chosen = [torch.empty(0, dtype=torch.long)]
        for portion, c in enumerate(classes, len(before)):
            index = (y_N == c).nonzero().flatten()
            order = torch.randperm(len(index), generator=generator_for(memory["seed"], "held", c))
            chosen.append(index[order[: min(quota[portion], self._held_of(len(index)))]])
        return torch.cat(chosen).sort().values

    def pool(self, samples: Pool, memory: State) -> Pool:
        """What an epoch runs over: the new samples that are trained on, and the memory's."""
        trained, _ = self._parts(samples, memory)
        pool = cast(Pool, trained)
        return pool if memory["x"] is None else pool.extended(memory["x"], memory["y"])

    def renewed(
        self,
        memory: State,
        experience: Experience,
        *,
        generator: Generator,
        features: Callable[[Samples], Callable[[Tensor], Tensor]],
    ) -> State:
        """Both memories after ``experience``, each of its samples in the one it was in while it was learnt.

        Args:
            memory: As it was before.
            experience: The one just learnt.
            generator: Draws what is random.
            features: A reader of features for given samples; read by herding only.
        """
        trained, held = self._parts(experience.samples, memory)
        room, held_room = self.rooms((*memory["owner"], *experience.classes))
        policies = MemoryPolicy(room, "per_class", self.selection), MemoryPolicy(held_room, "per_class")
        kept = policies[0].renewed(
            memory, replace(experience, samples=trained), generator=generator, features=features(trained)
        )
        held_memory = policies[1].renewed(
            memory["held"], replace(experience, samples=held), generator=generator, features=features(held)
        )
        seed = int(torch.randint(2**31, (), generator=generator))
        return {**kept, "held": held_memory, "seed": seed}

    def _held_of(self, room: int) -> int:
        return ceil(self.share * max(room - 1, 0))

    def _parts(self, samples: Samples, memory: State) -> tuple[Samples, Samples]:
        """The samples that are trained on, and those that are held out."""
        held_H = self.held_out(samples.y, memory)
        trained_N = torch.ones(len(samples), dtype=torch.bool)
        trained_N[held_H] = False
        whole = cast(Loadable, samples)  # what components see of it does not say so, but it can be cut
        return whole.subset(trained_N.nonzero().flatten()), whole.subset(held_H)
