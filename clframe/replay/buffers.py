"""Replay buffers: state of plain tensors, and the policies that fill them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Literal, cast

import torch
from torch import Generator, Tensor

from clframe.core.types import Experience, Pool, State
from clframe.data.augmentation import upload
from clframe.data.samples import Loadable
from clframe.nn.types import Samples
from clframe.replay.selection import appended, balanced_choice, balanced_trim, herding, quotas, reservoir
from clframe.seeding import generator_for


@dataclass(frozen=True, eq=False)
class Kept:
    """What a memory holds as :class:`~clframe.nn.types.Samples`.

    Args:
        memory: ``x``, inputs as stored, and ``y``; not empty.
        like: Samples of an experience; those of the memory are prepared like them.
    """

    memory: State
    like: Samples

    @property
    def y(self) -> Tensor:
        """targets_N."""
        y_N: Tensor = self.memory["y"]
        return y_N

    def __len__(self) -> int:
        return len(self.y)

    def raw(self, index: Tensor) -> Tensor:
        """The stored inputs at ``index``."""
        x: Tensor = self.memory["x"]
        return x.index_select(0, index.to(x.device))

    def prepare(self, raw: Tensor, *, generator: Generator | None = None) -> Tensor:
        """As the experience prepares its own."""
        return self.like.prepare(raw, generator=generator)


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
