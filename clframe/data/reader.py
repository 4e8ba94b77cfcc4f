"""Reading a torch dataset batch by batch, in this process or in workers that stay."""

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
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from clframe.errors import ClframeError, ConfigError, DataError

Request = tuple[list[int], int]
"""The samples of a batch, and the seed of whatever the dataset draws while it reads them."""


class Reader:
    """Reads samples of one dataset, all of one shape.

    Workers are started by the first :meth:`stream` and then stay: one DataLoader serves every epoch of
    every experience. A stream that is begun while another is still being read gets a DataLoader of its own.

    Args:
        dataset: Map-style; ``dataset[i]`` is an image, or a tuple that begins with one.
        num_workers: Processes that read; None chooses by the machine, 0 reads in this one.

    Raises:
        ConfigError: A negative number of workers.
    """

    def __init__(self, dataset: Any, *, num_workers: int | None = None) -> None:
        if num_workers is not None and num_workers < 0:
            raise ConfigError(f"data.num_workers: found {num_workers}; give at least 0")
        self.dataset = dataset
        self.num_workers = default_workers() if num_workers is None else num_workers
        self._idle: dict[bool, list[DataLoader[Any]]] = {False: [], True: []}
        # Workers that the garbage collector ends, along with a strategy that holds the reader, take seconds: it
        # has closed the queue that would tell them. Those that nothing refers to any more end at once.
        self._ending = weakref.finalize(self, _clear, self._idle)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, in this process or another, starts workers of its own."""
        return partial(Reader, num_workers=self.num_workers), (self.dataset,)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample, that of the first."""
        with seeded(0):
            return tuple(_image(self.dataset, 0).shape)

    def read(self, indices: list[int], *, seed: int) -> Tensor:
        """The samples at ``indices``, stacked, read in this process.

        Raises:
            DataError: A sample that cannot be read or is of another shape.
        """
        return _unless_error(self._table[indices, seed])

    def stream(self, requests: Sequence[Request], *, pinned: bool) -> Iterator[Tensor]:
        """The batches asked for, in order.

        Args:
            requests: The batches.
            pinned: Whether to put them into pinned memory, from where a copy to the GPU need not wait.

        Raises:
            DataError: A sample that cannot be read or is of another shape.
        """
        if self.num_workers == 0:
            for request in requests:
                batch = _unless_error(self._table[request])
                yield batch.pin_memory() if pinned else batch
            return
        idle = self._idle[pinned]
        loader = idle.pop() if idle else self._start(pinned=pinned)
        assert isinstance(loader.sampler, _Requests)
        loader.sampler.requests = requests
        try:
            for result in loader:
                yield _unless_error(result)
        except (ClframeError, GeneratorExit):  # left early: the workers drop what they have read ahead
            idle.append(loader)
            raise
        except BaseException:  # a worker has died: this loader is not used again
            del loader
            raise
        idle.append(loader)

    def close(self) -> None:
        """End all idle workers; the next stream starts new ones."""
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
            collate_fn=_unchanged,
            generator=torch.Generator(),  # or starting workers would draw from the run's global one
        )


def default_workers() -> int:
    """Half the cores, up to 8; none of up to four, where reading would only take them from training."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if cores <= 4 else min(8, cores // 2)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Python's, numpy's and torch's global CPU generators seeded within, and as they were afterwards."""
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

    What is wrong with a batch is returned, not raised: an exception would come out of a worker with its
    traceback as message.
    """

    def __init__(self, dataset: Any, shape: tuple[int, ...]) -> None:
        self._dataset = dataset
        self._shape = shape

    def __getitem__(self, request: Request) -> Tensor | ClframeError:
        indices, seed = request
        if not indices:
            return torch.empty(0, *self._shape, dtype=torch.uint8)
        try:
            with seeded(seed):
                images = [_image(self._dataset, i) for i in indices]
        except ClframeError as error:
            return error
        for i, image in zip(indices, images, strict=True):
            if image.shape != self._shape:
                return DataError(
                    f"data: sample {i} has shape {tuple(image.shape)}, sample 0 has {self._shape}; give all "
                    f"samples one size and number of channels"
                )
        return torch.stack(images)


class _Requests(Sampler[Request]):
    """The batches of the next epoch, whatever they are then."""

    def __init__(self) -> None:
        self.requests: Sequence[Request] = ()

    def __iter__(self) -> Iterator[Request]:
        return iter(self.requests)


def _image(dataset: Any, index: int) -> Tensor:
    """Sample ``index`` as a tensor, channels first."""
    try:
        sample = dataset[index]
        image = sample[0] if isinstance(sample, (tuple, list)) else sample
        if isinstance(image, Tensor):
            return image
        array = np.array(image)  # of PIL images; a copy that may be written to
    except ClframeError:
        raise
    except Exception as error:  # whatever reading and decoding may end in
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise DataError(f"data: sample {index} cannot be read ({reason}); mend or remove it") from None
    pixels = torch.from_numpy(array)
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def _unless_error(result: Tensor | ClframeError) -> Tensor:
    if isinstance(result, ClframeError):
        raise result
    return result


def _clear(idle: dict[bool, list[DataLoader[Any]]]) -> None:
    for loaders in idle.values():
        loaders.clear()


def _unchanged(batch: Any) -> Any:
    """A collate function must be picklable."""
    return batch
