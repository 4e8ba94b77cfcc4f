"""Data in memory: one tensor of inputs as stored, one of targets, and how the model wants them.

Data that does not fit is :class:`~clframe.data.lazy.DatasetSamples`; both are :class:`Loadable`, and
:class:`EpochLoader` serves either in the same order with the same augmentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, Protocol, TypeVar

import torch
from torch import Generator, Tensor

from clframe.data.augmentation import Augmentation, augmented
from clframe.errors import DataError
from clframe.seeding import derive_seed, epoch_order, generator_for


class Loadable(Protocol):
    """Samples that a loader can serve, wherever they are."""

    @property
    def y(self) -> Tensor:
        """targets_N."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""

    @property
    def nbytes(self) -> int:
        """Bytes kept in memory."""

    def __len__(self) -> int: ...

    def raw(self, index: Tensor) -> Tensor:
        """The stored inputs at ``index``."""

    def prepare(self, raw: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Stored inputs as the model wants them; augmented first where a ``generator`` is given."""

    def batches(
        self, order: Tensor | None, size: int, *, generator: Generator | None, seed: int
    ) -> Iterator[list[Tensor]]:
        """``[x, y]`` of ``size`` samples at a time, in ``order``, or in their own where that is None.

        ``seed`` is for reading that is random itself.
        """

    def subset(self, index: Tensor) -> Any:
        """The samples at ``index``, in that order, as samples of the same kind."""

    def joined(self, others: Sequence[Any]) -> Any:
        """These samples and ``others`` of the same kind."""

    def extended(self, raw: Tensor, y: Tensor) -> Any:
        """These samples and others as a memory holds them: stored inputs and targets."""

    def to(self, device: torch.device | str) -> Any:
        """The same samples with batches made on ``device``."""


CACHE_LINE = 64
AT_ONCE = 2**20
"""Bytes of float32 inputs that are made in one go, where they are many batches: what a core's cache holds."""

SamplesT = TypeVar("SamplesT", bound=Loadable)


@dataclass(frozen=True, eq=False)
class TensorSamples:
    """Samples that live in memory: batches are index operations, nothing is loaded one by one.

    Args:
        x: Inputs as stored, [N, ...]; integers are kept as they are until a batch is made.
        y: targets_N.
        mean: Per channel, in units of the stored inputs; one value for all or one for each of dim 1.
        std: Likewise; empty where inputs are token ids, which are nothing to normalize and stay whole numbers.
        augment: What training does to stored inputs before it normalizes them, in order.
        view: How these samples see what is stored, as a function of a batch that keeps shape and dtype (the
            domain of a domain-incremental stream); None as it is. Everything but ``x`` is seen through it.
    """

    x: Tensor
    y: Tensor
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    augment: tuple[Augmentation, ...] = ()
    view: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        """Refuse arrays that do not belong together."""
        if len(self.x) != len(self.y):
            raise DataError(
                f"data: {len(self.x)} inputs but {len(self.y)} labels; give one label for each input"
            )
        if self.x.is_floating_point() and not bool(torch.isfinite(self.x).all()):
            raise DataError("data: inputs hold NaN or infinite values; clean them before training")

    def __len__(self) -> int:
        return len(self.y)

    def raw(self, index: Tensor) -> Tensor:
        """The stored inputs at ``index``, as these samples see them."""
        return self._seen(self.x.index_select(0, index.to(self.x.device)))  # half the time of x[index]

    def prepare(self, raw: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Normalized float32 inputs, ``(raw - mean) / std`` per channel, or ids, in memory of their own.

        Training passes a ``generator``: inputs are then augmented first, by choices drawn from it.
        """
        raw = raw.to(self.x.device, non_blocking=True)
        if generator is not None:
            raw = augmented(raw, self.augment, generator)
        return self._normalize(raw, owned=False)

    def batch(self, index: Tensor, *, generator: Generator | None = None) -> list[Tensor]:
        """``[x, y]`` of the samples at ``index``, inputs prepared as :meth:`prepare` does."""
        x = self.raw(index)
        if generator is not None:
            x = augmented(x, self.augment, generator)
        return [self._normalize(x, owned=True), self.y.index_select(0, index)]

    def batches(
        self, order: Tensor | None, size: int, *, generator: Generator | None = None, seed: int = 0
    ) -> Iterator[list[Tensor]]:
        """``[x, y]`` of ``size`` samples at a time; nothing is random in reading, so ``seed`` is not used."""
        if order is not None:
            at_once = self._at_once(size, generator)
            for index in order.to(self.x.device).split(size * at_once):
                made = self.batch(index, generator=generator)
                if at_once == 1:
                    yield made
                    continue
                # The parts of an unsafe split have version counters of their own, as if made one by one: what
                # is written into one batch does not spoil the graph of another.
                yield from map(list, zip(*(part.unsafe_split(size) for part in made), strict=True))
            return
        for x, y in zip(self.x.split(size), self.y.split(size), strict=True):
            yield [self.prepare(self._seen(x), generator=generator), y]

    def subset(self, index: Tensor) -> TensorSamples:
        """The samples at ``index``, in that order."""
        index = index.to(self.x.device)
        return replace(self, x=self.x[index], y=self.y[index])

    def joined(self, others: Sequence[TensorSamples]) -> TensorSamples:
        """These samples and ``others``, all prepared like these."""
        parts = (self, *others)
        y = torch.cat([p.y for p in parts])
        if all(p.view is self.view for p in others):
            return replace(self, x=torch.cat([p.x for p in parts]), y=y)
        return replace(self, x=torch.cat([p._seen(p.x) for p in parts]), y=y, view=None)

    def extended(self, raw: Tensor, y: Tensor) -> TensorSamples:
        """These samples and others as a memory holds them: stored inputs and targets."""
        x = torch.cat([self._seen(self.x), raw.to(self.x.device)])
        return replace(self, x=x, y=torch.cat([self.y, y.to(self.y.device)]), view=None)

    def to(self, device: torch.device | str) -> TensorSamples:
        """The same samples on another device."""
        return replace(self, x=self.x.to(device), y=self.y.to(device))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.x.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes that inputs and targets occupy."""
        return self.x.nbytes + self.y.nbytes

    def _at_once(self, size: int, generator: Generator | None) -> int:
        """How many batches of ``size`` to make in one go: small ones cost little more than one of them.

        One, where choices are drawn for each batch, and where not all would begin at a whole cache line, as
        tensors of their own do: a matrix product may round differently then.
        """
        draws = generator is not None and not all(augmentation.is_identity for augmentation in self.augment)
        nbytes = 4 * size * prod(self.input_shape)
        return 1 if draws or nbytes % CACHE_LINE else max(1, AT_ONCE // max(1, nbytes))

    def _seen(self, stored: Tensor) -> Tensor:
        return stored if self.view is None else self.view(stored)

    def _normalize(self, raw: Tensor, *, owned: bool) -> Tensor:
        """Write into ``raw`` only where it is ``owned``: what is stored must stay as it is."""
        if not self.std:
            ids = raw.long()
            return ids.clone() if ids is raw and not owned else ids
        if raw.dtype != torch.float32:
            raw, owned = raw.to(torch.float32), True
        if self._is_normalized:
            return raw if owned else raw.clone()
        scale, shift = self._scale_shift
        return (raw.mul_(scale) if owned else raw.mul(scale)).add_(shift)

    @cached_property
    def _is_normalized(self) -> bool:
        return not any(self.mean) and all(s == 1 for s in self.std)

    @cached_property
    def _scale_shift(self) -> tuple[Tensor, Tensor]:
        shape = (-1,) + (1,) * (self.x.ndim - 2) if len(self.mean) > 1 else ()
        std = torch.tensor(self.std, dtype=torch.float64)
        mean = torch.tensor(self.mean, dtype=torch.float64)
        scale, shift = (1 / std).float().reshape(shape), (-mean / std).float().reshape(shape)
        return scale.to(self.x.device), shift.to(self.x.device)


def concatenate(parts: Sequence[SamplesT]) -> SamplesT:
    """All samples of all parts, which are of one kind and prepared like the first."""
    if len(parts) == 1:
        return parts[0]
    joined: SamplesT = parts[0].joined(parts[1:])
    return joined


class EpochLoader:
    """Batches of one experience, in an order that is a function of (seed, experience, epoch) alone.

    Set :attr:`epoch` before iterating. Shuffling is training: batches are augmented as the samples say,
    with choices that are a function of the same three numbers. Without shuffling the order is that of the
    samples and nothing is augmented. The last batch may be smaller.

    >>> data = TensorSamples(torch.arange(6).reshape(3, 2), torch.tensor([0, 1, 1]))
    >>> [len(y) for _, y in EpochLoader(data, 2)]
    [2, 1]
    """

    def __init__(
        self,
        samples: Loadable,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        experience: int = 0,
    ) -> None:
        self.samples = samples
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.experience = experience
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def __iter__(self) -> Iterator[list[Tensor]]:
        samples, place = self.samples, (self.experience, self.epoch)
        seed = derive_seed(self.seed, "read", *place)
        if not self.shuffle:
            return samples.batches(None, self.batch_size, generator=None, seed=seed)
        order = epoch_order(len(samples), seed=self.seed, experience=self.experience, epoch=self.epoch)
        generator = generator_for(self.seed, "augment", *place)
        return samples.batches(order, self.batch_size, generator=generator, seed=seed)
