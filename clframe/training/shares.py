"""Shares of a batch: which rows each of several processes computes, and where they are among the gathered ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Share:
    """The rows of a batch that a process computes."""

    size: int
    """Rows of the whole batch."""
    rows: Tensor
    """Indices of the own rows."""
    parts: tuple[int, ...]
    """Own rows of each part; empty for a batch of one part."""
    most: int
    """Rows of the largest share."""
    order: Tensor
    """Place of every row of the batch among the gathered shares, each padded to ``most`` rows."""

    @property
    def count(self) -> int:
        """Number of the own rows."""
        return len(self.rows)

    def on(self, device: torch.device) -> Share:
        """Return the share with its indices on a device."""
        if self.rows.device == device:
            return self
        return replace(self, rows=self.rows.to(device), order=self.order.to(device))


def divide(size: int, parts: Sequence[int], *, rank: int, world: int) -> Share:
    """Divide a batch: process r computes rows r, r + world, ... of every part.

    Args:
        size: Rows of the batch.
        parts: Sizes of its parts; empty for one.
        rank: The process.
        world: Number of processes.

    >>> [divide(5, (), rank=r, world=2).rows.tolist() for r in (0, 1)]
    [[0, 2, 4], [1, 3]]
    >>> divide(6, (4, 2), rank=1, world=2).rows.tolist(), divide(6, (4, 2), rank=1, world=2).parts
    ([1, 3, 5], (2, 1))
    >>> divide(5, (), rank=0, world=2).order.tolist()
    [0, 3, 1, 4, 2]
    """
    sizes = tuple(parts) or (size,)
    shares: list[list[int]] = [[] for _ in range(world)]
    first = 0
    for part in sizes:
        for r, rows in enumerate(shares):
            rows.extend(range(first + r, first + part, world))
        first += part
    most = max(map(len, shares))
    order = [0] * size
    for r, rows in enumerate(shares):
        for place, row in enumerate(rows):
            order[row] = r * most + place
    own = tuple(len(range(rank, part, world)) for part in parts)
    return Share(size, torch.tensor(shares[rank], dtype=torch.long), own, most, torch.tensor(order, dtype=torch.long))
