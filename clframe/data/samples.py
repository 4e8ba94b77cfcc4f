"""Samples in memory.

:class:`TensorSamples` holds one tensor of stored inputs and one of targets. Data that does not fit in memory is
:class:`~clframe.data.lazy.DatasetSamples`. Both are :class:`Loadable`:
:class:`~clframe.data.epoch_loader.EpochLoader` reads either in the same order and with the same augmentation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf, isfinite, prod
from numbers import Real
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Generator, Tensor

from clframe.data.augmentation import Augmentation, apply_augmentations
from clframe.errors import DataError
from clframe.options import format_value


class Loadable(Protocol):
    """Samples that :class:`~clframe.data.epoch_loader.EpochLoader` can read, in memory or not."""

    @property
    def y(self) -> Tensor:
        """targets_N."""

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory used."""

    def __len__(self) -> int: ...

    def raw(self, index: Tensor) -> Tensor:
        """The stored inputs at ``index``."""

    def prepare(self, raw: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Convert stored inputs to inputs of the model, augmented first if a ``generator`` is given."""

    def batches(
        self, order: Tensor | None, size: int, *, generator: Generator | None, seed: int, first: int = 0
    ) -> Iterator[list[Tensor]]:
        """Iterate over ``[x, y]`` of ``size`` samples each, in ``order``; None: in the order of storage.

        ``seed`` seeds random transforms of the data set itself. With an ``order``, the batches before number
        ``first`` are left out without reading them.
        """

    def subset(self, index: Tensor) -> Any:
        """Return the samples at ``index``, in that order, as the same type."""

    def concat(self, others: Sequence[Any]) -> Any:
        """Return these samples followed by ``others`` of the same type."""

    def with_stored(self, raw: Tensor, y: Tensor) -> Any:
        """Return these samples followed by samples of a replay buffer: stored inputs and targets."""

    def to(self, device: torch.device | str) -> Any:
        """Return the same samples with batches on ``device``."""


CACHE_LINE = 64
"""Bytes; to its multiples torch aligns the tensors that it allocates."""
CHUNK_BYTES = 2**20
"""Bytes of float32 inputs that several small batches are made from together: they fit a core's cache."""

SamplesT = TypeVar("SamplesT", bound=Loadable)


def as_tensor(values: Any, what: str) -> Tensor:
    """Return a tensor or an array as a tensor without gradient.

    Args:
        values: The tensor, or an array of numpy.
        what: Name of the values in messages.

    Raises:
        DataError: Another kind of value, complex or sparse values, or an array of a type that tensors do not have.
    """
    try:
        found = torch.from_numpy(_readable(values)) if isinstance(values, np.ndarray) else values
    except (TypeError, ValueError) as error:
        raise DataError(f"data: found {what} in an array that torch cannot read ({error}); convert it") from None
    if isinstance(found, Tensor) and (found.is_complex() or found.layout != torch.strided):
        kind = "complex numbers" if found.is_complex() else f"a tensor of layout {found.layout}"
        raise DataError(f"data: found {kind} as {what}; give a dense tensor of whole or real numbers")
    if not isinstance(found, Tensor) or not found.ndim:
        kind = "a single number" if isinstance(found, Tensor) else f"a {type(values).__name__}"
        raise DataError(f"data: found {kind} as {what}; give a tensor or an array, with a row for each sample")
    return found.detach() if found.requires_grad else found


def _readable(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The array itself, or a copy of one whose byte order or strides tensors do not have."""
    if not values.dtype.isnative:
        return values.astype(values.dtype.newbyteorder("="))
    return values.copy() if any(stride < 0 for stride in values.strides) else values


def as_labels(values: Any) -> Tensor:
    """Return labels as targets_N, int64.

    Raises:
        DataError: They are not one whole number for each sample.
    """
    y = as_tensor(values, "labels")
    if y.ndim != 1:
        raise DataError(f"data: found labels of shape {list(y.shape)}; give one class for each sample, as [{len(y)}]")
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise DataError(f"data: found labels of type {y.dtype}; give whole numbers, as by y.long()")
    return y.long()


def check_normalization(mean: Sequence[float], std: Sequence[float], *, channels: int) -> None:
    """Raise DataError for a mean and standard deviation that cannot normalize inputs with ``channels`` channels."""
    for name, values in (("mean", mean), ("standard deviation", std)):
        if not isinstance(values, Sequence) or not all(isinstance(value, Real) for value in values):
            raise DataError(f"data: found {format_value(values)} as {name}; give a tuple of numbers such as (0.5,)")
    if not std:
        return
    if len(mean) != len(std) or len(std) not in (1, channels):
        numbers = "1" if channels == 1 else f"1 or {channels}"
        raise DataError(
            f"data: found {len(mean)} mean(s) and {len(std)} standard deviation(s) for inputs with {channels} "
            f"channel(s); give {numbers} of both"
        )
    wrong = next((value for value in std if not 0 < value < inf), None)
    if wrong is not None:
        raise DataError(f"data: found the standard deviation {wrong}; give finite numbers above 0")
    wrong = next((value for value in mean if not isfinite(value)), None)
    if wrong is not None:
        raise DataError(f"data: found the mean {wrong}; give finite numbers")


@dataclass(frozen=True, eq=False)
class TensorSamples:
    """Samples in memory, batched by index operations.

    Args:
        x: Stored inputs [N, ...], converted to float32 per batch; an array of numpy shares its memory.
        y: targets_N, whole numbers of any type, stored as int64.
        mean: Per channel, in units of the stored inputs: one value for all channels or one for each of dim 1.
        std: As ``mean``. Empty for token ids, which are not normalized and stay integers.
        augment: Augmentations of stored inputs in training, applied in order before normalization.
        view: Function of a batch of stored inputs that preserves shape and dtype: the domain of a
            domain-incremental stream. Applied wherever inputs are read; None: unchanged.
    """

    x: Tensor
    y: Tensor
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    augment: tuple[Augmentation, ...] = ()
    view: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        """Raise DataError for unequal lengths, labels that are not classes, and inputs that are not finite."""
        object.__setattr__(self, "x", as_tensor(self.x, "inputs"))
        object.__setattr__(self, "y", as_labels(self.y))
        check_normalization(self.mean, self.std, channels=self.x.shape[1] if self.x.ndim > 1 else 1)
        if len(self.x) != len(self.y):
            raise DataError(f"data: found {len(self.x)} inputs and {len(self.y)} labels; give one label per input")
        if self.x.is_floating_point() and not bool(torch.isfinite(self.x).all()):
            raise DataError("data: found NaN or infinite inputs; clean them before training")
        if self.x.dtype == torch.float64 and len(self) and not bool(self.x.float().isfinite().all()):
            raise DataError("data: found inputs that overflow float32, in which batches are; scale them")
        if self.view is not None and not callable(self.view):
            raise DataError(f"data: found {format_value(self.view)} as view; give a function of stored inputs, or None")
        if not isinstance(self.augment, Sequence) or not all(callable(part) for part in self.augment):
            raise DataError(f"data: found {format_value(self.augment)} as augment; give a tuple of augmentations")

    def __len__(self) -> int:
        return len(self.y)

    def raw(self, index: Tensor) -> Tensor:
        """The stored inputs at ``index``, with the view applied."""
        return self._apply_view(self.x.index_select(0, index.to(self.x.device)))  # twice as fast as x[index]

    def prepare(self, raw: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Convert stored inputs to inputs of the model: ``(raw - mean) / std`` per channel in float32, or int64 ids.

        The result never shares memory with ``raw``. With a ``generator`` (in training), inputs are augmented first.
        """
        raw = raw.to(self.x.device, non_blocking=True)
        if generator is not None:
            raw = apply_augmentations(raw, self.augment, generator)
        return self._normalize(raw, owned=False)

    def batch(self, index: Tensor, *, generator: Generator | None = None) -> list[Tensor]:
        """``[x, y]`` of the samples at ``index``, prepared as in :meth:`prepare`."""
        x = self.raw(index)
        if generator is not None:
            x = apply_augmentations(x, self.augment, generator)
        return [self._normalize(x, owned=True), self.y.index_select(0, index)]

    def batches(
        self, order: Tensor | None, size: int, *, generator: Generator | None = None, seed: int = 0, first: int = 0
    ) -> Iterator[list[Tensor]]:
        """Iterate over ``[x, y]`` of ``size`` samples each; reading tensors is not random, so ``seed`` is unused."""
        if order is not None:
            order = order[first * size :] if first else order
            batches_per_chunk = self._batches_per_chunk(size, generator)
            for index in order.to(self.x.device).split(size * batches_per_chunk):
                chunk = self.batch(index, generator=generator)
                if batches_per_chunk == 1:
                    yield chunk
                    continue
                # Results of unsafe_split have separate version counters, so that an in-place change of one batch
                # does not invalidate the autograd graph of another.
                yield from map(list, zip(*(part.unsafe_split(size) for part in chunk), strict=True))
            return
        for x, y in zip(self.x.split(size), self.y.split(size), strict=True):
            yield [self.prepare(self._apply_view(x), generator=generator), y]

    def subset(self, index: Tensor) -> TensorSamples:
        """Return the samples at ``index``, in that order."""
        index = index.to(self.x.device)
        return replace(self, x=self.x[index], y=self.y[index])

    def concat(self, others: Sequence[TensorSamples]) -> TensorSamples:
        """Return these samples followed by ``others``, with the normalization and augmentation of these."""
        parts = (self, *others)
        y = torch.cat([p.y for p in parts])
        if all(p.view is self.view for p in others):
            return replace(self, x=torch.cat([p.x for p in parts]), y=y)
        return replace(self, x=torch.cat([p._apply_view(p.x) for p in parts]), y=y, view=None)

    def with_stored(self, raw: Tensor, y: Tensor) -> TensorSamples:
        """Return these samples followed by samples of a replay buffer: stored inputs and targets."""
        # Buffers store inputs with the view of their experience applied: it must not be applied again.
        x = torch.cat([self._apply_view(self.x), raw.to(self.x.device)])
        return replace(self, x=x, y=torch.cat([self.y, y.to(self.y.device)]), view=None)

    def to(self, device: torch.device | str) -> TensorSamples:
        """Return the same samples on another device."""
        return replace(self, x=self.x.to(device), y=self.y.to(device))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.x.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes of inputs and targets."""
        return self.x.nbytes + self.y.nbytes

    def _batches_per_chunk(self, size: int, generator: Generator | None) -> int:
        """Number of batches that are read by one index operation: for small batches, calls dominate the cost.

        1 if augmentation draws per batch. 1 also if batches would not start at a cache line, as separately allocated
        tensors do: matrix products may round differently with another alignment.
        """
        draws = generator is not None and not all(augmentation.is_identity for augmentation in self.augment)
        nbytes = 4 * size * prod(self.input_shape)
        return 1 if draws or nbytes % CACHE_LINE else max(1, CHUNK_BYTES // max(1, nbytes))

    def _apply_view(self, stored: Tensor) -> Tensor:
        return stored if self.view is None else self.view(stored)

    def _normalize(self, raw: Tensor, *, owned: bool) -> Tensor:
        """Normalize; writes into ``raw`` only if it is ``owned``, that is, no view of stored inputs."""
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
    """Concatenate samples of one type, with the normalization and augmentation of the first."""
    if len(parts) == 1:
        return parts[0]
    concatenated: SamplesT = parts[0].concat(parts[1:])
    return concatenated
