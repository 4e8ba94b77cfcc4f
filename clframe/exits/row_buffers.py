"""Tensors of padded batches: rows moved in their memory format, and a count read from the device while it works.

Shape suffixes: n rows.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    """Copies of tensors on the host, made while the device works."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._event: torch.cuda.Event | None = None
        device = tensors[0].device
        if device.type != "cuda":
            self.tensors = [tensor.to("cpu", copy=True) for tensor in tensors]
            return
        self.tensors = [
            torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            for tensor in tensors
        ]
        self._event = torch.cuda.Event()
        self._event.record(torch.cuda.current_stream(device))

    def is_ready(self) -> bool:
        """Whether the copies are complete."""
        return self._event is None or self._event.query()


def is_channels_last(values: Tensor) -> bool:
    """Whether a tensor has the layout channels last, and no other."""
    return values.dim() == 4 and not values.is_contiguous() and values.is_contiguous(memory_format=torch.channels_last)


def zeros_for_batch(tensor: Tensor, batch: int) -> Tensor:
    """Zeros for a whole batch, in the memory format of a tensor."""
    form = torch.channels_last if is_channels_last(tensor) else torch.contiguous_format
    return torch.zeros(
        (batch, *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device
    ).contiguous(memory_format=form)  # fmt: skip


def gather_rows(values: Tensor, order_n: Tensor, into: Tensor) -> None:
    """Write rows of a tensor to another one of the same type, in the memory format of that one."""
    if is_channels_last(into):
        values, into = values.permute(0, 2, 3, 1), into.permute(0, 2, 3, 1)
    torch.index_select(values, 0, order_n, out=into)
