"""Tensors of padded batches: rows moved in their memory format, and a count read from the device while it works.

Shape suffixes: n rows.
"""

from __future__ import annotations

import torch
from torch import Tensor


class DeviceCount:
    """Reads a number from a device without stopping what has been launched after it."""

    def __init__(self, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._device = device
        self._host = torch.zeros((), dtype=torch.long, pin_memory=cuda)
        self._event = torch.cuda.Event() if cuda else None

    def start(self, number: Tensor) -> None:
        """Begin to copy a number to the host."""
        self._host.copy_(number, non_blocking=True)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._device))

    def wait(self) -> int:
        """Return the number."""
        if self._event is not None:
            self._event.synchronize()
        return int(self._host)


class HostCopy:
    """A copy of a tensor on the host, made while the device works.

    Args:
        values: The tensor.
        into: Where to write it, in pinned memory; new memory if not given.
    """

    def __init__(self, values: Tensor, *, into: Tensor | None = None) -> None:
        self._event: torch.cuda.Event | None = None
        cuda = values.is_cuda
        self._host = torch.empty_like(values, device="cpu", pin_memory=cuda) if into is None else into
        self._host.copy_(values, non_blocking=cuda)
        if cuda:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(values.device))

    def is_ready(self) -> bool:
        """Whether the copy is complete."""
        return self._event is None or self._event.query()

    def wait(self) -> Tensor:
        """Return the copy when it is complete."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


def is_channels_last(values: Tensor) -> bool:
    """Whether a tensor has the layout channels last, and no other."""
    return values.dim() == 4 and not values.is_contiguous() and values.is_contiguous(memory_format=torch.channels_last)


def zeros_for_batch(tensor: Tensor, batch: int) -> Tensor:
    """Zeros for a whole batch, in the memory format of a tensor."""
    form = torch.channels_last if is_channels_last(tensor) else torch.contiguous_format
    return torch.zeros(
        (batch, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device
    ).contiguous(memory_format=form)  # fmt: skip


def kind_of(values: Tensor) -> tuple[torch.dtype, tuple[int, ...], torch.device]:
    """Type, shape of a row and device: batches of one kind can be joined, and computed by one recorded graph."""
    return values.dtype, tuple(values.shape[1:]), values.device


def remaining_first(remains_n: Tensor) -> Tensor:
    """Row numbers: of the rows that remain, in order, then of the others.

    >>> remaining_first(torch.tensor([False, True, False, True]))
    tensor([1, 3, 0, 2])
    """
    row_n = torch.arange(len(remains_n), device=remains_n.device)
    front_n = remains_n.cumsum(0)
    place_n = torch.where(remains_n, front_n - 1, front_n[-1] + row_n - front_n)
    return torch.empty_like(row_n).scatter_(0, place_n, row_n)


def gather_rows(values: Tensor, order_n: Tensor, into: Tensor) -> None:
    """Write rows of a tensor to another one of the same type, in the memory format of that one."""
    if is_channels_last(into):
        values, into = values.permute(0, 2, 3, 1), into.permute(0, 2, 3, 1)
    torch.index_select(values, 0, order_n, out=into)
