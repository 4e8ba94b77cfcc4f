"""Replay buffers: states of plain tensors, and the policies that fill them."""

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
from clframe.options import convert_fields
from clframe.replay.selection import append_rows, balanced_choice, balanced_trim, herding, quotas, reservoir
from clframe.seeding import generator_for


@dataclass(frozen=True, eq=False)
class BufferSamples:
    """The samples of a buffer as :class:`~clframe.nn.types.Samples`.

    Args:
        memory: A buffer that is not empty: stored inputs ``x`` and targets ``y``.
        like: Samples of an experience, whose normalization and augmentation the buffer shares.
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
        """Convert stored inputs to inputs of the model as the experience does."""
        return self.like.prepare(raw, generator=generator)


Budget = Literal["total", "per_class"]
Selection = Literal["balanced", "herding", "random", "reservoir"]


@dataclass(frozen=True)
class MemoryPolicy:
    """Selection of the stored samples at the end of every experience.

    A buffer is a mapping: ``x``, stored inputs (None while it is empty), ``y``, and other columns of the policy or the
    component, one row per sample. It is the complete state: checkpoints need nothing else.

    Args:
        size: Number of samples: total, or per class.
        budget: ``"total"``: divided among all classes so far; ``"per_class"``: for each of them (with balanced and
            herding only).
        selection: ``"balanced"``: the same number per class, at random; ``"herding"``: the same number per class,
            nearest to its mean in feature space; ``"random"``: the same number per experience; ``"reservoir"``: every
            sample seen so far with the same probability.

    Raises:
        ConfigError: Another word, or a size that is not a whole number.
    """

    size: int
    budget: Budget = "total"
    selection: Selection = "balanced"

    def __post_init__(self) -> None:
        """Check the words."""
        convert_fields(self, where="MemoryPolicy")

    def empty(self) -> State:
        """Return an empty buffer.

        ``group`` is the index of each sample's portion: samples of one class, or of one experience, that were added
        together. ``owner`` is that class or experience, per portion. A reservoir has each sample's ``key`` instead.
        """
        y = torch.empty(0, dtype=torch.long)
        if self.selection == "reservoir":
            return {"x": None, "y": y, "key": torch.empty(0, dtype=torch.float64)}
        return {"x": None, "y": y, "group": y, "owner": ()}

    def update(
        self,
        memory: State,
        experience: Experience,
        *,
        generator: Generator,
        features: Callable[[Tensor], Tensor],
        targets: Callable[[Tensor], Mapping[str, Tensor]] | None = None,
    ) -> State:
        """Return the buffer after ``experience``: the remaining samples, then new ones.

        Args:
            memory: The buffer before.
            experience: The experience just learned.
            generator: Source of all draws.
            features: Function from an index to features_NF of the experience's samples; called by herding only.
            targets: Function from an index to other columns of the new samples, by name, such as logits. Rows that are
                wider than those stored before widen them by ``-inf``.
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
                _select_by_herding(group_N, room, features)
                if self.selection == "herding"
                else balanced_choice(group_N, room, generator=generator)
            )
            owner, columns = {"owner": owners}, {"group": group_N[fresh]}
        x = experience.samples.raw(fresh)
        columns = {"x": x, "y": y_N[fresh].to(x.device), **columns, **(targets(fresh) if targets else {})}
        if memory["x"] is not None:
            columns = {
                name: append_rows(memory[name][kept.to(memory[name].device)], new)
                for name, new in columns.items()
            }
        return {**columns, **owner}

    def quotas(self, owners: tuple[int, ...]) -> dict[int, int]:
        """Capacity of each portion: the share of its owner, divided among the portions of that owner.

        If an owner has more portions than its share has samples, early and late ones have a place alike, see
        :func:`~clframe.replay.selection.quotas`.

        >>> MemoryPolicy(10).quotas((0, 1, 0))
        {0: 3, 2: 2, 1: 5}
        """
        every = self.budget == "per_class"
        if len(set(owners)) == len(owners):  # nearly always, so that hundreds of classes cost no call each
            shares = dict.fromkeys(owners, self.size) if every else quotas(self.size, owners)
            return dict(enumerate(shares.values()))
        portions: dict[int, list[int]] = {}
        for portion, owner in enumerate(owners):
            portions.setdefault(owner, []).append(portion)
        shares = dict.fromkeys(portions, self.size) if every else quotas(self.size, list(portions))
        found: dict[int, int] = {}
        for owner, own in portions.items():
            found |= quotas(shares[owner], own, salt=owner + 1)
        return found

    def _portions(
        self, y_N: Tensor, experience: Experience, before: tuple[int, ...]
    ) -> tuple[Tensor, tuple[int, ...]]:
        """Portion of each new sample, numbered after those ``before``, and the owners of all portions."""
        if self.selection == "random":
            return torch.full_like(y_N, len(before)), (*before, experience.index)
        number = {c: len(before) + i for i, c in enumerate(experience.classes)}
        group_N = torch.tensor([number[c] for c in y_N.tolist()], dtype=torch.long)
        return group_N, (*before, *experience.classes)


def sample_indices(memory: State, count: int, *, generator: Generator) -> Tensor:
    """index_K of ``count`` stored samples, drawn with replacement, on the device of the buffer."""
    index = torch.randint(memory["y"].shape[0], (count,), generator=generator)  # len() of a tensor is slow
    return upload(index, memory["x"].device)


def add_to_reservoir(memory: State, columns: Mapping[str, Tensor], size: int, *, generator: Generator) -> State:
    """Offer samples to a reservoir of ``size``: every sample ever offered is stored with the same probability.

    Samples that leave are overwritten in place, so that a step does not copy the memory.

    Args:
        memory: The reservoir, see :meth:`MemoryPolicy.empty`.
        columns: ``x``, ``y``, and what else the memory stores of each sample, one row per sample. Rows wider than those
            stored widen them by ``-inf``.
        size: Largest number of samples.
        generator: Draws the keys.
    """
    key_N = torch.rand(len(columns["x"]), generator=generator, dtype=torch.float64)
    kept, fresh = reservoir(memory["key"], key_N, size)
    if not len(fresh):
        return memory
    device = columns["x"].device
    new = {name: rows[fresh.to(rows.device)].to(device) for name, rows in columns.items()}
    new["key"] = key_N[fresh]
    if memory["x"] is None:
        return {**memory, **new}
    leaves_M = torch.ones(len(memory["key"]), dtype=torch.bool)
    leaves_M[kept] = False
    slots = leaves_M.nonzero().flatten()
    return {**memory, **{name: _overwrite(memory[name], rows, slots) for name, rows in new.items()}}


def _overwrite(stored: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """Write the first ``rows`` into ``slots`` of ``stored``, in place where they are as wide, and append the others."""
    if stored.ndim > 1 and stored.shape[-1] != rows.shape[-1]:
        stored, rows = append_rows(stored, rows[:0]), append_rows(rows, stored[:0])
    stored.index_copy_(0, upload(slots, stored.device), rows[: len(slots)])
    return torch.cat([stored, rows[len(slots) :]]) if len(rows) > len(slots) else stored


def _select_by_herding(group_N: Tensor, room: Mapping[int, int], features: Callable[[Tensor], Tensor]) -> Tensor:
    """Select the first ``room`` samples of each group in the order of herding."""
    chosen = [torch.empty(0, dtype=torch.long)]
    for group, count in room.items():
        members = (group_N == group).nonzero().flatten()
        if len(members):
            chosen.append(members[herding(features(members), count).cpu()])
    return torch.cat(chosen)


@dataclass(frozen=True)
class SplitMemory:
    """Two balanced buffers within one budget: samples to train on, and held-out samples.

    Of the q samples of a class, ``ceil(share * (q - 1))`` are held out: at least one of two, never the only one. The
    same number of a new class is excluded from training while it is learned, so that classes have equally many
    held-out samples, on which no model has ever been trained. Of a class with fewer than q samples, the same share of
    its samples is held out.

    The state is the buffer for training (``x``, ``y``, ...), the other one as ``held``, and the ``seed`` of the split
    of the next experience.

    Args:
        size: Samples of both buffers together: total, or per class.
        budget: Meaning of ``size``, see :class:`MemoryPolicy`.
        selection: Selection of the samples to train on; those held out are random.
        share: Fraction of the held-out samples, above 0 and below 1.

    >>> memory = SplitMemory(20, "total", "balanced", 0.1)
    >>> memory.capacities([0, 1]), memory.capacities(range(10)), memory.capacities(range(20))
    ((9, 1), (1, 1), (1, 0))
    """

    size: int
    budget: Budget
    selection: Literal["balanced", "herding"]
    share: float

    def empty(self) -> State:
        """Return two empty buffers."""
        policy = MemoryPolicy(self.size, self.budget, self.selection)
        return {**policy.empty(), "held": policy.empty(), "seed": 0}

    def capacities(self, owners: tuple[int, ...] | list[int] | range) -> tuple[int, int]:
        """Number of samples of each class to train on, and number of those held out.

        Args:
            owners: The classes; duplicates are allowed.
        """
        room = self.size if self.budget == "per_class" else self.size // len(set(owners))
        held = self._held_out_count(room)
        return room - held, held

    def held_out(self, y_N: Tensor, memory: State) -> Tensor:
        """index_H of the new samples to hold out, ascending; a function of its arguments only.

        Args:
            y_N: Targets of the experience.
            memory: The state before the experience.
        """
        y_N, before = y_N.cpu(), memory["owner"]
        classes = y_N.unique().tolist()
        owners = (*before, *classes)
        quota = MemoryPolicy(self.capacities(owners)[1], "per_class").quotas(owners)
        chosen = [torch.empty(0, dtype=torch.long)]
        for portion, c in enumerate(classes, len(before)):
            index = (y_N == c).nonzero().flatten()
            order = torch.randperm(len(index), generator=generator_for(memory["seed"], "held", c))
            chosen.append(index[order[: min(quota[portion], self._held_out_count(len(index)))]])
        return torch.cat(chosen).sort().values

    def training_pool(self, samples: Pool, memory: State) -> Pool:
        """Samples of an epoch: the new samples to train on, and those of the buffer."""
        trained, _ = self._split(samples, memory)
        pool = cast(Pool, trained)
        return pool if memory["x"] is None else pool.with_stored(memory["x"], memory["y"])

    def update(
        self,
        memory: State,
        experience: Experience,
        *,
        generator: Generator,
        features: Callable[[Samples], Callable[[Tensor], Tensor]],
    ) -> State:
        """Return both buffers after ``experience``; samples that were held out while it was learned stay held out.

        Args:
            memory: The state before.
            experience: The experience just learned.
            generator: Source of all draws.
            features: Function from samples to a reader of their features; called by herding only.
        """
        trained, held = self._split(experience.samples, memory)
        room, held_room = self.capacities((*memory["owner"], *experience.classes))
        policies = MemoryPolicy(room, "per_class", self.selection), MemoryPolicy(held_room, "per_class")
        kept = policies[0].update(
            memory, replace(experience, samples=trained), generator=generator, features=features(trained)
        )
        held_memory = policies[1].update(
            memory["held"], replace(experience, samples=held), generator=generator, features=features(held)
        )
        # Releases of torch draw ranges from 2**28 to 2**32 differently; larger ones are the same in all of them.
        seed = int(torch.randint(2**62, (), generator=generator)) % 2**31
        return {**kept, "held": held_memory, "seed": seed}

    def _held_out_count(self, room: int) -> int:
        return ceil(self.share * max(room - 1, 0))

    def _split(self, samples: Samples, memory: State) -> tuple[Samples, Samples]:
        """Split samples into those to train on and those to hold out."""
        held_H = self.held_out(samples.y, memory)
        trained_N = torch.ones(len(samples), dtype=torch.bool)
        trained_N[held_H] = False
        whole = cast(Loadable, samples)  # the type that components see has no subset()
        return whole.subset(trained_N.nonzero().flatten()), whole.subset(held_H)
