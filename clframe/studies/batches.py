"""Data of a target: batches that are made when they are asked for, as often as that is.

Shape suffixes: B batch, T tokens, N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol, overload

import torch
from torch import Tensor

from clframe.analysis.places import Inputs
from clframe.data.source import Data
from clframe.errors import ConfigError


class Batch(NamedTuple):
    """What a model is called with, and what is known of it."""

    inputs: Inputs
    """One tensor, or tensors by the names of the model's arguments."""
    targets: Tensor | None
    """targets_B, or targets_BT of a language model with -100 where nothing is asked; None without labels."""
    tokens: Tensor | Mapping[str, Tensor] | None
    """mask_BT of tokens that count, or one for each kind of tokens by its name; None where all do."""


class Batches(Sequence[Batch]):
    """Batches made one at a time, anew whenever they are asked for.

    Args:
        makers: One for each batch.
    """

    def __init__(self, makers: Sequence[Callable[[], Batch]]) -> None:
        self._makers = tuple(makers)

    def __len__(self) -> int:
        return len(self._makers)

    @overload
    def __getitem__(self, at: int) -> Batch: ...
    @overload
    def __getitem__(self, at: slice) -> Batches: ...
    def __getitem__(self, at: int | slice) -> Batch | Batches:
        """One batch, or some that are made later."""
        return Batches(self._makers[at]) if isinstance(at, slice) else self._makers[at]()


class Part(Protocol):
    """Training, validation or test data of a target."""

    def __len__(self) -> int:
        """Number of samples."""

    def batches(self, *, size: int = 64, limit: int | None = None) -> Batches:
        """All samples, or ``limit`` spread evenly over them, ``size`` at a time."""


class SamplePart:
    """A part over samples of a benchmark.

    Args:
        samples: One after the other.
        place: From prepared inputs to inputs on the model's device, in its type.
        tokens: From inputs to the mask of tokens that count; None where all do.
    """

    def __init__(
        self,
        samples: Sequence[Data],
        *,
        place: Callable[[Tensor], Tensor],
        tokens: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.samples, self.place, self.tokens = tuple(samples), place, tokens

    def __len__(self) -> int:
        return sum(map(len, self.samples))

    def batches(self, *, size: int = 64, limit: int | None = None) -> Batches:
        """See :class:`Part`."""
        chosen, start, makers = spread(len(self), limit), 0, list[Callable[[], Batch]]()
        for samples in self.samples:
            inside = chosen[(chosen >= start) & (chosen < start + len(samples))] - start
            makers += [partial(self._made, samples, index) for index in inside.split(size) if len(index)]
            start += len(samples)
        return Batches(makers)

    def _made(self, samples: Data, index: Tensor) -> Batch:
        inputs = self.place(samples.prepare(samples.raw(index)))
        targets = samples.y[index.to(samples.y.device)].to(inputs.device)
        return Batch(inputs, targets, None if self.tokens is None else self.tokens(inputs))


def spread(count: int, limit: int | None) -> Tensor:
    """index_N of ``limit`` of ``count`` samples at even distances, of all where there are no more.

    Raises:
        ConfigError: A limit below 1.

    >>> spread(10, 4).tolist(), spread(3, 4).tolist()
    ([0, 2, 5, 7], [0, 1, 2])
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: found {limit}; give at least 1")
    if limit is None or limit >= count:
        return torch.arange(count)
    return torch.arange(limit) * count // limit
