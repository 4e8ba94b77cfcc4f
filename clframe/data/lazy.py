"""Samples of a torch dataset that are read batch by batch, optionally in worker processes.

For data that does not fit in memory and for datasets with random transforms. Order, augmentation and normalization
are those of samples in memory, on the device and bit for bit.
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
from clframe.data.samples import TensorSamples, as_labels
from clframe.errors import DataError
from clframe.seeding import derive_seed

CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class DatasetSamples:
    """Samples of a map-style torch dataset, with the interface of :class:`~clframe.data.samples.TensorSamples`.

    Args:
        reader: Reads the dataset; shared by all subsets, so that worker processes are reused across experiences.
        index: index_N into the dataset; -1 - k refers to row k of ``buffer``. With ``views``, sample i of a dataset of
            n samples under view v has index i + v * n.
        y: targets_N.
        mean: Per channel, in units of the dataset's inputs.
        std: As ``mean``.
        augment: Augmentations in training, applied in order before normalization.
        view: Function of a batch of the dataset's inputs; None: unchanged.
        device: Device of the batches.
        buffer: Inputs of a replay buffer, which are not in the dataset; None without any.
        paths: File of each sample of the dataset; empty if unknown.
        views: Views of samples of several domains, instead of ``view``; empty for those of one.
    """

    reader: Reader
    index: Tensor
    y: Tensor
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    augment: tuple[Augmentation, ...] = ()
    view: Callable[[Tensor], Tensor] | None = None
    device: torch.device = CPU
    buffer: Tensor | None = None
    paths: tuple[str, ...] = ()
    views: tuple[Callable[[Tensor], Tensor] | None, ...] = ()

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
        paths: tuple[str, ...] = (),
    ) -> DatasetSamples:
        """Return all samples of ``dataset``.

        Args:
            dataset: ``dataset[i]`` is an image, or a tuple that starts with one: a tensor or a PIL image.
            y: targets_N, in the dataset's order.
            mean: Per channel, in units of the dataset's inputs (PIL images: 0 to 255).
            std: As ``mean``.
            augment: Augmentations in training.
            num_workers: Worker processes; None chooses by the number of cores, 0 reads in this process.
            paths: File of each sample, by which they are recognized; empty if unknown.

        Raises:
            DataError: The number of labels is not the number of samples, or they are not whole numbers.

        >>> images = torch.arange(12, dtype=torch.uint8).reshape(3, 1, 2, 2)
        >>> DatasetSamples.of(images, torch.tensor([0, 1, 1]), num_workers=0).raw(torch.tensor([2])).flatten()
        tensor([ 8,  9, 10, 11], dtype=torch.uint8)
        """
        y = as_labels(y)
        if len(dataset) != len(y):
            raise DataError(f"data: found {len(dataset)} inputs and {len(y)} labels; give one label per input")
        index = torch.arange(len(dataset))
        return cls(Reader(dataset, num_workers=num_workers), index, y, mean, std, augment, paths=paths)

    def __len__(self) -> int:
        return len(self.y)

    def raw(self, index: Tensor) -> Tensor:
        """The dataset's inputs at ``index`` with the view applied, read in this process, on the device."""
        wanted = self.index[index.cpu()]
        return self._assemble(self.reader.read(self._stored(wanted), seed=0), wanted).to(self.device)

    def prepare(self, raw: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Convert as :meth:`TensorSamples.prepare <clframe.data.samples.TensorSamples.prepare>` does."""
        return self._preparer.prepare(raw, generator=generator)

    def batches(
        self, order: Tensor | None, size: int, *, generator: Generator | None = None, seed: int = 0, first: int = 0
    ) -> Iterator[list[Tensor]]:
        """Iterate over ``[x, y]`` of ``size`` samples each.

        Random transforms of the dataset are a function of ``seed`` and the index of the batch, whatever the number
        of workers.
        """
        index, y = self.index, self.y
        if order is not None:
            index, y = index[order], y.index_select(0, upload(order, self.device))
        parts = index.split(size)[first:]
        requests = [(self._stored(part), derive_seed(seed, k)) for k, part in enumerate(parts, start=first)]
        read = self.reader.stream(requests, pinned=self.device.type == "cuda")
        for raw, part, y_B in zip(read, parts, y.split(size)[first:], strict=True):
            yield [self.prepare(self._assemble(raw, part), generator=generator), y_B]

    def subset(self, index: Tensor) -> DatasetSamples:
        """Return the samples at ``index``, in that order, without reading them."""
        return replace(self, index=self.index[index.cpu()], y=self.y[index.to(self.y.device)])

    def concat(self, others: Sequence[DatasetSamples]) -> DatasetSamples:
        """Return these samples followed by ``others`` of the same dataset.

        Raises:
            DataError: Samples of different datasets.
        """
        if any(other.reader is not self.reader for other in others):
            raise DataError(
                "data: found samples of different datasets that are read batch by batch; raise "
                "benchmark.memory_gb, or concatenate the datasets with torch's ConcatDataset"
            )
        parts = (self, *others)
        if any(part.views or part.view is not self.view for part in parts):
            views: list[Callable[[Tensor], Tensor] | None] = []
            for view in (view for part in parts for view in part.views or (part.view,)):
                if all(view is not known for known in views):
                    views.append(view)
            parts = tuple(part._under(views) for part in parts)
        result = parts[0]
        for other in parts[1:]:
            shift = 0 if result.buffer is None else len(result.buffer)
            index = other.index.where(other.index >= 0, other.index - shift)
            buffers = [b for b in (result.buffer, other.buffer) if b is not None]
            result = replace(
                result,
                index=torch.cat([result.index, index]),
                y=torch.cat([result.y, other.y.to(result.y.device)]),
                buffer=torch.cat(buffers) if buffers else None,
            )
        return result

    def with_stored(self, raw: Tensor, y: Tensor) -> DatasetSamples:
        """Return these samples followed by samples of a replay buffer: inputs of the dataset, and targets."""
        return self.concat([replace(self, index=-1 - torch.arange(len(y)), y=y, buffer=raw.cpu())])

    def to(self, device: torch.device | str) -> DatasetSamples:
        """Return the same samples with batches on another device."""
        return replace(self, y=self.y.to(device), device=torch.device(device))

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return self.reader.shape

    @property
    def nbytes(self) -> int:
        """Bytes of memory used: labels, indices, and inputs of a replay buffer."""
        return self.index.nbytes + self.y.nbytes + (0 if self.buffer is None else self.buffer.nbytes)

    @cached_property
    def _preparer(self) -> TensorSamples:
        """Empty samples in memory that share the code of augmentation and normalization."""
        nothing = torch.empty(0, *self.input_shape, dtype=torch.uint8, device=self.device)
        return TensorSamples(nothing, self.y[:0], self.mean, self.std, self.augment)

    def _assemble(self, read: Tensor, index_B: Tensor) -> Tensor:
        """Inputs at ``index_B``: those read from the dataset, with the view applied, and those of the buffer."""
        viewed = self._apply_views(read, index_B[index_B >= 0]) if len(read) else read
        if self.buffer is None:
            return viewed
        from_buffer = index_B < 0
        batch = torch.empty((len(index_B), *self.input_shape), dtype=self.buffer.dtype)
        batch[~from_buffer] = viewed.to(batch.dtype)
        batch[from_buffer] = self.buffer[-1 - index_B[from_buffer]]
        return batch

    def _stored(self, index_B: Tensor) -> list[int]:
        """Places in the dataset of the samples at ``index_B``, without those of the buffer."""
        stored = index_B[index_B >= 0]
        return (stored % len(self.reader.dataset) if self.views else stored).tolist()

    def _apply_views(self, read: Tensor, index_S: Tensor) -> Tensor:
        if not self.views:
            return read if self.view is None else self.view(read)
        view_S, viewed = index_S // len(self.reader.dataset), read.clone()
        for number in view_S.unique().tolist():
            view, rows = self.views[number], view_S == number
            if view is not None:
                viewed[rows] = view(read[rows])
        return viewed

    def _under(self, views: Sequence[Callable[[Tensor], Tensor] | None]) -> DatasetSamples:
        """The same samples with indices into ``views``, which include their own."""
        count = len(self.reader.dataset)
        number = torch.tensor([[view is one for one in views].index(True) for view in self.views or (self.view,)])
        moved = self.index % count + number[(self.index // count).clamp(min=0)] * count
        return replace(self, index=moved.where(self.index >= 0, self.index), view=None, views=tuple(views))
