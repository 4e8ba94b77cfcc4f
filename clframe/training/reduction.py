"""Gradients averaged over processes while the backward pass still computes others.

The first backward pass shows the order in which gradients become complete. From then on parameters are in buckets of
that order, and the sum of a bucket over the processes starts as soon as its last gradient is there. On a GPU it runs
on a stream of the communication library, next to the rest of the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch import distributed as dist

SIZE: Final = 2**23
"""Most values of a bucket: 32 MB in single precision."""


class GradientReduction:
    """Averages the gradients of a network over the processes of a group.

    Every process computes the same graph, so buckets start in the same order everywhere; the order itself is that of
    the first process.

    Args:
        parameters: Those that learn, in the same order in every process.
        world: Number of processes.
        size: Most values of a bucket.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, world: int, size: int = SIZE) -> None:
        self.parameters = tuple(parameters)
        self._world, self._size = world, size
        self._buckets: list[list[nn.Parameter]] | None = None
        self._bucket_of: list[int] = []
        self._missing: list[int] = []
        self._started: list[tuple[list[Tensor], Tensor, Any]] = []
        self._seen: list[int] = []
        self._active = False
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._note, index))
            for index, parameter in enumerate(self.parameters)
        ]

    def begin(self) -> None:
        """Start sums in the backward pass that follows, as soon as gradients are complete."""
        self._active, self._started, self._seen = True, [], []
        if self._buckets is not None:
            self._missing = [len(bucket) for bucket in self._buckets]

    @torch.no_grad()
    def finish(self) -> None:
        """Replace the gradients by their means; after the backward pass.

        A parameter without a gradient in one process may have one in another: it counts as zero.
        """
        self._active = False
        if self._buckets is None:
            order = [self._complete(self._seen)]
            dist.broadcast_object_list(order, 0)
            self._arrange(order[0])
        assert self._buckets is not None
        for bucket in self._buckets[len(self._started) :]:
            self._start(bucket)
        for rows, flat, work in self._started:
            work.wait()
            flat.div_(self._world)
            parts = flat.split([row.numel() for row in rows])
            torch._foreach_copy_(rows, [part.view(row.shape) for part, row in zip(parts, rows, strict=True)])
        self._started = []

    def close(self) -> None:
        """Remove the hooks of the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _complete(self, seen: Sequence[int]) -> list[int]:
        """Return every parameter's number, those without a gradient last."""
        known = set(seen)
        return [*seen, *(index for index in range(len(self.parameters)) if index not in known)]

    def _arrange(self, order: Sequence[int]) -> None:
        """Divide the parameters into buckets of at most ``size`` values of one type, or one parameter."""
        buckets: list[list[int]] = []
        count, kind = 0, None
        for index in order:
            parameter = self.parameters[index]
            if not buckets or parameter.dtype != kind or count + parameter.numel() > self._size:
                buckets.append([])
                count, kind = 0, parameter.dtype
            buckets[-1].append(index)
            count += parameter.numel()
        self._bucket_of = [0] * len(self.parameters)
        for number, bucket in enumerate(buckets):
            for index in bucket:
                self._bucket_of[index] = number
        self._buckets = [[self.parameters[index] for index in bucket] for bucket in buckets]

    def _note(self, index: int, parameter: nn.Parameter) -> None:
        """Note that a gradient is complete, and start the sums of the buckets that are."""
        if not self._active:
            return
        if self._buckets is None:
            self._seen.append(index)
            return
        self._missing[self._bucket_of[index]] -= 1
        with torch.no_grad():
            while len(self._started) < len(self._buckets) and self._missing[len(self._started)] == 0:
                self._start(self._buckets[len(self._started)])

    def _start(self, bucket: Sequence[nn.Parameter]) -> None:
        """Start the sum of a bucket over the processes."""
        # Sums of 16-bit numbers would lose digits, and gloo has none of them.
        wide = torch.float64 if bucket[0].dtype == torch.float64 else torch.float32
        present = [parameter.grad for parameter in bucket]
        tensors = [torch.zeros_like(p) if g is None else g for p, g in zip(bucket, present, strict=True)]
        rows = [in_memory_order(tensor) for tensor in tensors]
        flat = torch.cat([row.reshape(-1).to(wide) for row in rows])
        self._started.append((rows, flat, dist.all_reduce(flat, async_op=True)))


def in_memory_order(tensor: Tensor) -> Tensor:
    """Return a view whose elements are contiguous, where there is one: hundreds of copies are then one call."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1).view(-1)
    return tensor
