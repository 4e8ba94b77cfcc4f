"""Data in memory: one tensor of inputs as stored, one of targets, and how the model wants them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clframe.errors import DataError
from clframe.functional.seeding import epoch_order


@dataclass(frozen=True, eq=False)
class TensorSamples:
    """Samples that live in memory: batches are index operations, nothing is loaded one by one.

    Args:
        x: Inputs as stored, [N, ...]; integers are kept as they are until a batch is made.
        y: targets_N.
        mean: Per channel, in units of the stored inputs; one value for all or one for each of dim 1.
        std: Likewise.
        device: Where batches are made.
    """

    x: Tensor
    y: Tensor
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        """Refuse arrays that do not belong together."""
        if len(self.x) != len(self.y):
            raise DataError(f"data: {len(self.x)} inputs but {len(self.y)} labels; give one label for each input")
        if self.x.is_floating_point() and not bool(torch.isfinite(self.x).all()):
            raise DataError("data: inputs hold NaN or infinite values; clean them before training")

    def __len__(self) -> int:
        return len(self.y)

    def raw(self, index: Tensor) -> Tensor:
        """The stored inputs at ``index``."""
        return self.x[index.to(self.x.device)]

    def prepare(self, raw: Tensor) -> Tensor:
        """Normalized float32 inputs: ``(raw - mean) / std`` per channel."""
        raw = raw.to(self.x.device, non_blocking=True)
        scale, shift = self._scale_shift
        return raw.to(torch.float32).mul_(scale).add_(shift)

    def subset(self, index: Tensor) -> TensorSamples:
        """The samples at ``index``, in that order."""
        index = index.to(self.x.device)
        return replace(self, x=self.x[index], y=self.y[index])

    def to(self, device: torch.device | str) -> TensorSamples:
        """The same samples on another device."""
        return replace(self, x=self.x.to(device), y=self.y.to(device))

    @property
    def nbytes(self) -> int:
        """Bytes that inputs and targets occupy."""
        return self.x.nbytes + self.y.nbytes

    @property
    def _scale_shift(self) -> tuple[Tensor, Tensor]:
        cached = self.__dict__.get("_cached_scale_shift")
        if cached is None:
            shape = (-1,) + (1,) * (self.x.ndim - 2) if len(self.mean) > 1 else ()
            std = torch.tensor(self.std, dtype=torch.float64)
            mean = torch.tensor(self.mean, dtype=torch.float64)
            pair = ((1 / std).float().reshape(shape), (-mean / std).float().reshape(shape))
            cached = tuple(t.to(self.x.device) for t in pair)
            self.__dict__["_cached_scale_shift"] = cached  # a cache, not a field: frozen stays true
        return cached


def concatenate(parts: Sequence[TensorSamples]) -> TensorSamples:
    """All samples of all parts, which share one normalization."""
    if len(parts) == 1:
        return parts[0]
    return replace(
        parts[0], x=torch.cat([p.x for p in parts]), y=torch.cat([p.y for p in parts])
    )


class EpochLoader:
    """Batches of one experience, in an order that is a function of (seed, experience, epoch) alone.

    Set :attr:`epoch` before iterating. Without shuffling the order is that of the samples. The last batch
    may be smaller.

    >>> data = TensorSamples(torch.arange(6).reshape(3, 2), torch.tensor([0, 1, 1]))
    >>> [len(y) for _, y in EpochLoader(data, 2)]
    [2, 1]
    """

    def __init__(
        self,
        samples: TensorSamples,
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
        samples, size = self.samples, self.batch_size
        if not self.shuffle:
            for x, y in zip(samples.x.split(size), samples.y.split(size), strict=True):
                yield [samples.prepare(x), y]
            return
        order = epoch_order(len(samples), seed=self.seed, experience=self.experience, epoch=self.epoch)
        for index in order.to(samples.x.device).split(size):
            yield [samples.prepare(samples.x[index]), samples.y[index]]
