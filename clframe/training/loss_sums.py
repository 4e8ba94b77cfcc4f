"""Sums of loss terms over steps, on the device, from which log entries take means."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

Snapshot = tuple[dict[str, Tensor], int]
"""Copies of the sums, and the steps in them."""


class LossSums:
    """Sums of every loss term since the last log entry.

    Attributes:
        sums: By name, such as ``lwf/distill``; of a term with one value per exit, one sum per exit.
        steps: Number of steps in the sums.
        in_place: Whether the tensors of ``sums`` remain the same ones, into which a CUDA graph adds.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0
        self.in_place = False

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Add the terms of a step."""
        for name, value in terms.items():
            known = self.sums.get(name)
            # A clone, because the sum is added to in place and the term may be part of the graph.
            self.sums[name] = value.detach().clone() if known is None else known.add_(value.detach())
        self.steps += 1

    def flush(self) -> dict[str, float]:
        """Return the mean of each term over the steps, summed over exits, and start again from zero.

        Synchronizes with the device.
        """
        steps, self.steps = self.steps, 0
        means = {}
        if steps:
            totals = torch.stack([value.sum().double() for value in self.sums.values()]).tolist()
            means = {f"loss/{name}": total / steps for name, total in zip(self.sums, totals, strict=True)}
        if not self.in_place:
            self.sums = {}
        elif steps:
            for value in self.sums.values():
                value.zero_()
        return means

    def restrict(self, names: Collection[str]) -> None:
        """Drop the sums of all other terms."""
        self.sums = {name: value for name, value in self.sums.items() if name in names}

    def snapshot(self) -> Snapshot:
        """Return copies of the sums, and the number of steps."""
        return {name: value.clone() for name, value in self.sums.items()}, self.steps

    def restore(self, snapshot: Snapshot) -> None:
        """Restore :meth:`snapshot`."""
        sums, self.steps = snapshot
        self.sums = {name: value.clone() for name, value in sums.items()}
