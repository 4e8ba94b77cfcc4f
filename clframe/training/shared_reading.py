"""Batches of a data set that is read from files, of which each of several processes reads its share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from clframe.data.lazy import DatasetSamples
from clframe.data.reader import Reader, Request
from clframe.data.samples import Loadable
from clframe.seeding import derive_seed
from clframe.training.distributed import Group
from clframe.training.shares import Share


class SharedReader:
    """A :class:`~clframe.data.reader.Reader` whose batches are read by all processes together and gathered.

    Random transforms of the data set are a function of the batch and of the process: equal in every process, but not
    those of one device.

    Args:
        reader: Reads the share of this process.
        group: The processes.
        device: Where batches are gathered.
    """

    def __init__(self, reader: Reader, group: Group, device: torch.device) -> None:
        self._reader, self._group, self._device = reader, group, device

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return self._reader.shape

    def read(self, indices: list[int], *, seed: int) -> Tensor:
        """Read and stack samples in this process."""
        return self._reader.read(indices, seed=seed)

    def stream(self, requests: Sequence[Request], *, pinned: bool) -> Iterator[Tensor]:
        """Iterate over the requested batches; see :meth:`Reader.stream <clframe.data.reader.Reader.stream>`."""
        shares = [self._group.share(len(indices)) for indices, _ in requests]
        own = [_own_request(*pair, rank=self._group.rank) for pair in zip(requests, shares, strict=True)]
        for raw, share in zip(self._reader.stream(own, pinned=pinned), shares, strict=True):
            if share is None:
                yield raw
                continue
            yield self._group.gather(raw.to(self._device, non_blocking=True), share.on(self._device))


def _own_request(request: Request, share: Share | None, *, rank: int) -> Request:
    indices, seed = request
    if share is None:  # fewer samples than processes: each reads all
        return request
    return [indices[row] for row in share.rows.tolist()], derive_seed(seed, "share", rank)


def read_together(samples: Loadable, group: Group | None) -> Loadable:
    """Return the samples with a reader that all processes share, if they are read from files.

    Args:
        samples: Samples in memory or not.
        group: The processes; None for one.
    """
    if group is None or not isinstance(samples, DatasetSamples):
        return samples
    # Inputs of a replay buffer are on the CPU, where they join those that were read.
    device = samples.device if samples.buffer is None else torch.device("cpu")
    reader: Any = SharedReader(samples.reader, group, device)
    return cast(Loadable, replace(samples, reader=reader))
