"""Requests of a server, and the samples between two segments with everything carried for them.

Shape suffixes: r rows, C classes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from clframe.exits.active_samples import ActiveSamples
from clframe.exits.row_buffers import kind_of
from clframe.nn.backbones.stages import tap_of


class Answer(NamedTuple):
    """Prediction of one request."""

    scores_C: Tensor
    """On the host."""
    exit: int


@dataclass(eq=False)
class Request:
    """A sample without a batch dimension, and the answer that its caller waits for."""

    x: Tensor
    number: int
    since: float
    answer: asyncio.Future[Answer]
    kind: tuple[object, ...] = field(init=False)
    """Type, shape and device of the input: those of a batch are the same."""

    def __post_init__(self) -> None:
        """Determine the kind once: it is compared for every batch while the request is in the queue."""
        self.kind = kind_of(self.x.unsqueeze(0))


@dataclass(eq=False)
class Chunk:
    """Samples with everything carried for them: of inputs of one shape and type."""

    rows: ActiveSamples
    requests: list[Request]
    shared: bool = False
    """Whether the next run of the segment before overwrites the rows."""

    @property
    def kind(self) -> tuple[object, ...]:
        """Type, shape and device of the inputs."""
        return self.requests[0].kind

    def own(self) -> None:
        """Copy rows that would be overwritten."""
        if self.shared:
            self.rows, self.shared = self.rows.map(torch.clone), False

    def pick(self, keep: Sequence[int]) -> Chunk:
        """Copies of some samples; the samples as they are if all are kept."""
        if len(keep) == len(self.requests):
            return self
        keep_r = torch.tensor(keep, device=tap_of(self.rows.value).device)
        rows = self.rows.map(lambda values: values.index_select(0, keep_r))
        return Chunk(rows, [self.requests[at] for at in keep])


def join_rows(parts: Sequence[ActiveSamples]) -> ActiveSamples:
    """Samples of several batches as one batch."""
    columns = zip(*(part.carried() for part in parts), strict=True)
    joined = iter([torch.cat(column) if len(column) > 1 else column[0] for column in columns])
    return parts[0].map(lambda _: next(joined))  # ``map`` has the order of ``carried``


def first_rows(rows: ActiveSamples, count: int) -> ActiveSamples:
    """Views of the first rows."""
    return rows.map(lambda values: values[:count])
