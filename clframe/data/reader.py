"""Reader of a torch dataset, batch by batch, in this process or in persistent worker processes."""

from __future__ import annotations

import os
import random
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from clframe.data.images import count_channels, to_pixels
from clframe.errors import ClframeError, ConfigError, DataError

Request = tuple[list[int], int]
"""Indices of the samples of a batch, and the seed of the dataset's random transforms."""


class Reader:
    """Reader of one dataset, whose samples all have one shape.

    The first :meth:`stream` starts the workers, which are reused: one DataLoader serves every epoch of every
    experience. A stream that starts while another is being read uses another DataLoader.

    Args:
        dataset: Map-style; ``dataset[i]`` is an image, or a tuple that starts with one.
        num_workers: Worker processes; None chooses by the number of cores, 0 reads in this process.

    Raises:
        ConfigError: A negative number of workers.
    """

    def __init__(self, dataset: Any, *, num_workers: int | None = None) -> None:
        if num_workers is not None and num_workers < 0:
            raise ConfigError(f"data.num_workers: found {num_workers}; give at least 0")
        self.dataset = dataset
        self.num_workers = default_workers() if num_workers is None else num_workers
        self._idle: dict[bool, list[DataLoader[Any]]] = {False: [], True: []}
        # If the reader is part of a reference cycle, the garbage collector may close the queue of the workers before
        # it ends them, and they then take seconds to stop. Dropping the loaders first ends them immediately.
        self._finalizer = weakref.finalize(self, _clear, self._idle)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the dataset without the workers: a copy starts new ones."""
        return partial(Reader, num_workers=self.num_workers), (self.dataset,)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample, that of the first."""
        with temporary_seed(0):
            return tuple(_read_sample(self.dataset, 0).shape)

    def read(self, indices: list[int], *, seed: int) -> Tensor:
        """Read and stack the samples at ``indices`` in this process.

        Raises:
            DataError: A sample that cannot be read or has another shape.
        """
        return _raise_if_error(self._table[indices, seed])

    def stream(self, requests: Sequence[Request], *, pinned: bool) -> Iterator[Tensor]:
        """Iterate over the requested batches.

        Args:
            requests: The batches, in order.
            pinned: Whether to return them in pinned memory, for asynchronous copies to a GPU.

        Raises:
            DataError: A sample that cannot be read or has another shape.
        """
        if self.num_workers == 0:
            for request in requests:
                batch = _raise_if_error(self._table[request])
                yield batch.pin_memory() if pinned else batch
            return
        idle = self._idle[pinned]
        loader = idle.pop() if idle else self._start(pinned=pinned)
        assert isinstance(loader.sampler, _Requests)
        loader.sampler.requests = requests
        try:
            for result in loader:
                yield _raise_if_error(result)
        except (ClframeError, GeneratorExit):  # stopped early: the workers discard the batches they have prefetched
            idle.append(loader)
            raise
        except BaseException:  # a worker has died: this loader cannot be reused
            del loader
            raise
        idle.append(loader)

    def close(self) -> None:
        """Stop all idle workers; the next stream starts new ones."""
        _clear(self._idle)

    @cached_property
    def _table(self) -> _Batches:
        return _Batches(self.dataset, self.shape)

    def _start(self, *, pinned: bool) -> DataLoader[Any]:
        return DataLoader(
            self._table,
            batch_size=None,  # a request is a whole batch
            sampler=_Requests(),
            num_workers=self.num_workers,
            persistent_workers=True,
            pin_memory=pinned,
            collate_fn=_identity,
            generator=torch.Generator(),  # or starting workers would draw from the run's global one
        )


def default_workers() -> int:
    """Half of the cores, up to 8; 0 on up to four cores, which training needs itself."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if cores <= 4 else min(8, cores // 2)


@contextmanager
def temporary_seed(seed: int) -> Iterator[None]:
    """Seed the global CPU generators of Python, numpy and torch inside the block and restore them afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class _Batches(Dataset[Any]):
    """A dataset whose samples are whole batches.

    Errors are returned, not raised: the message of an exception raised in a worker would be its traceback.
    """

    def __init__(self, dataset: Any, shape: tuple[int, ...]) -> None:
        self._dataset = dataset
        self._shape = shape

    def __getitem__(self, request: Request) -> Tensor | ClframeError:
        indices, seed = request
        if not indices:
            return torch.empty(0, *self._shape, dtype=torch.uint8)
        try:
            with temporary_seed(seed):
                images = [_read_sample(self._dataset, i) for i in indices]
        except ClframeError as error:
            return error
        for i, image in zip(indices, images, strict=True):
            if image.shape != self._shape:
                return DataError(
                    f"data: sample {i} has shape {tuple(image.shape)}, sample 0 has {self._shape}; give all "
                    f"samples the same size and number of channels"
                )
        return torch.stack(images)


class _Requests(Sampler[Request]):
    """Sampler of a persistent DataLoader: the requests of the next epoch, set before it is iterated."""

    def __init__(self) -> None:
        self.requests: Sequence[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)


def _read_sample(dataset: Any, index: int) -> Tensor:
    """Read sample ``index`` as a tensor, channels first."""
    try:
        sample = dataset[index]
        image = sample[0] if isinstance(sample, (tuple, list)) else sample
        if isinstance(image, Tensor):
            return image
        if isinstance(image, Image.Image):
            return to_pixels(image, channels=count_channels(image, f"data: sample {index}"))
        array = np.array(image)
    except ClframeError:
        raise
    except Exception as error:  # the exceptions of decoders and transforms are not documented
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"data: sample {index} cannot be read ({reason}); fix or remove it") from None
    pixels = torch.from_numpy(array)
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def _raise_if_error(result: Tensor | ClframeError) -> Tensor:
    if isinstance(result, ClframeError):
        raise result
    return result


def _clear(idle: dict[bool, list[DataLoader[Any]]]) -> None:
    for loaders in idle.values():
        loaders.clear()


def _identity(batch: Any) -> Any:
    """Collate function that changes nothing: at module level, since workers pickle it."""
    return batch
