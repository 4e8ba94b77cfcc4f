"""Data that stays where it is: samples of a torch dataset, read batch by batch, in workers if wanted.

For sets that do not fit in memory and for datasets with transforms of their own. Everything after reading
is that of data in memory: order, augmentation and normalization, on the device, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor

from clframe.data.augmentation import Augmentation, upload
from clframe.data.reader import Reader
from clframe.data.samples import TensorSamples
from clframe.errors import DataError
from clframe.seeding import derive_seed

CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class DatasetSamples:
    """Samples of a map-style torch dataset; like :class:`~clframe.data.samples.TensorSamples` otherwise.

    Args:
        reader: Reads the dataset; shared by all subsets, so that its workers outlive experiences.
        index: index_N into the dataset; -1 - k stands for row k of ``kept``.
        y: targets_N.
        mean: Per channel, in units of what the dataset gives.
        std: Likewise.
        augment: What training does to inputs before it normalizes them, in order.
        view: How these samples see what the dataset gives, as a function of a batch; None as it is.
        device: Where batches are made.
        kept: Inputs that came out of a memory and are in no dataset; None where there are none.
    """

    reader: Reader
    index: Tensor
    y: Tensor
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    augment: tuple[Augmentation, ...] = ()
    view: Callable[[Tensor], Tensor] | None = None
    device: torch.device = CPU
    kept: Tensor | None = None

    @classmethod
    def of(
        cls,
        dataset: Any,
        y: Tensor,
        *,
        mean: tuple[float, ...] = (0.0,),
        std: tuple[float, ...] = (1.0,),
        augment: tuple[Augmentation, ...] = (),
        num_workers: int | None = None,
    ) -> DatasetSamples:
        """All samples of ``dataset``.

        Args:
            dataset: ``dataset[i]`` is an image, or a tuple that begins with one: a tensor or a PIL image.
            y: targets_N, in the dataset's order.
            mean: Per channel, in units of what the dataset gives (PIL images: 0 to 255).
            std: Likewise.
            augment: What training does to inputs before it normalizes them.
            num_workers: Processes that read; None chooses by the machine, 0 reads in this one.

        Raises:
            DataError: Labels that are not one for each sample.

        >>> images = torch.arange(12, dtype=torch.uint8).reshape(3, 1, 2, 2)
        >>> DatasetSamples.of(images, torch.tensor([0, 1, 1]), num_workers=0).raw(torch.tensor([2])).flatten()
        tensor([ 8,  9, 10, 11], dtype=torch.uint8)
        """
        if len(dataset) != len(y):
            raise DataError(f"data: {len(dataset)} inputs but {len(y)} labels; give one label for each input")
        index = torch.arange(len(dataset))
        return cls(Reader(dataset, num_workers=num_workers), index, y, mean, std, augment)

    def __len__(self) -> int:
        return len(self.y)

    def raw(self, index: Tensor) -> Tensor:
        """The inputs at ``index`` as the dataset gives them, read in this process, on the device."""
        wanted = self.index[index.cpu()]
        stored = wanted[wanted >= 0].tolist()
        return self._assembled(self.reader.read(stored, seed=0), wanted).to(self.device)

    def prepare(self, raw: Tensor, *, generator: Generator | None = None) -> Tensor:
        """As data in memory is prepared."""
        return self._kind.prepare(raw, generator=generator)

    def batches(
        self, order: Tensor | None, size: int, *, generator: Generator | None = None, seed: int = 0
    ) -> Iterator[list[Tensor]]:
        """``[x, y]`` of ``size`` samples at a time.

        What the dataset itself draws, in transforms say, is a function of ``seed`` and the batch's number, in
        workers as in this process.
        """
        index, y = self.index, self.y
        if order is not None:
            index, y = index[order], y.index_select(0, upload(order, self.device))
        parts = index.split(size)
        requests = [(part[part >= 0].tolist(), derive_seed(seed, k)) for k, part in enumerate(parts)]
        read = self.reader.stream(requests, pinned=self.device.type == "cuda")
        for raw, part, y_B in zip(read, parts, y.split(size), strict=True):
            yield [self.prepare(self._assembled(raw, part), generator=generator), y_B]

    def subset(self, index: Tensor) -> DatasetSamples:
        """The samples at ``index``, in that order; nothing is read."""
        return replace(self, index=self.index[index.cpu()], y=self.y[index.to(self.y.device)])

    def joined(self, others: Sequence[DatasetSamples]) -> DatasetSamples:
        """These samples and ``others`` of the same dataset, all prepared like these."""
        if any(other.reader is not self.reader or other.view is not self.view for other in others):
            raise DataError(
                "data: found parts of different datasets or domains, to be read batch by batch; raise the "
                "limit of data in memory, or join the datasets with torch's ConcatDataset"
            )
        result = self
        for other in others:
            shift = 0 if result.kept is None else len(result.kept)
            index = other.index.where(other.index >= 0, other.index - shift)
            kept = [k for k in (result.kept, other.kept) if k is not None]
            result = replace(
                result,
                index=torch.cat([result.index, index]),
                y=torch.cat([result.y, other.y.to(result.y.device)]),
                kept=torch.cat(kept) if kept else None,
            )
        return result

    def extended(self, raw: Tensor, y: Tensor) -> DatasetSamples:
        """These samples and others as a memory holds them: inputs as the dataset gave them, and targets."""
        return self.joined([replace(self, index=-1 - torch.arange(len(y)), y=y, kept=raw.cpu())])

    def to(self, device: torch.device | str) -> DatasetSamples:
        """The same samples with batches made on another device."""
        return replace(self, y=self.y.to(device), device=torch.device(device))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return self.reader.shape

    @property
    def nbytes(self) -> int:
        """Bytes in memory: labels, places in the dataset, and inputs out of a memory."""
        return self.index.nbytes + self.y.nbytes + (0 if self.kept is None else self.kept.nbytes)

    @cached_property
    def _kind(self) -> TensorSamples:
        """No samples, prepared the same way: one piece of code prepares what is in memory and what is not."""
        nothing = torch.empty(0, *self.input_shape, dtype=torch.uint8, device=self.device)
        return TensorSamples(nothing, self.y[:0], self.mean, self.std, self.augment)

    def _assembled(self, read: Tensor, wanted_B: Tensor) -> Tensor:
        """What was read and what was kept, in the order in which ``wanted_B`` asks for them."""
        seen = read if self.view is None or not len(read) else self.view(read)
        if self.kept is None:
            return seen
        ours = wanted_B < 0
        batch = torch.empty((len(wanted_B), *self.input_shape), dtype=self.kept.dtype)
        batch[~ours] = seen.to(batch.dtype)
        batch[ours] = self.kept[-1 - wanted_B[ours]]
        return batch
