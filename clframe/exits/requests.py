"""Requests of a server, and the samples between two segments with everything carried for them.

Shape suffixes: r rows, C classes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from clframe.exits.dynamic import ActiveSamples
from clframe.nn.backbones.base import tap_of


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

    @property
    def kind(self) -> tuple[object, ...]:
        """Shape, type and device of the input: those of a batch are the same."""
        return self.x.shape, self.x.dtype, self.x.device


@dataclass(eq=False)
class Chunk:
    """Samples with everything carried for them: of inputs of one shape and type."""

    rows: ActiveSamples
    requests: list[Request]

    @property
    def kind(self) -> tuple[object, ...]:
        """Shape, type and device of the inputs."""
        return self.requests[0].kind

    def pick(self, keep: Sequence[int], *, confident: bool) -> Chunk:
        """Copies of some samples."""
        if len(keep) == len(self.requests):
            return Chunk(self.rows.map(torch.clone, confident=confident), self.requests)
        keep_r = torch.tensor(keep, device=tap_of(self.rows.value).device)
        rows = self.rows.map(lambda values: values.index_select(0, keep_r), confident=confident)
        return Chunk(rows, [self.requests[at] for at in keep])


def join_rows(parts: Sequence[ActiveSamples], *, confident: bool) -> ActiveSamples:
    """Samples of several batches as one batch."""
    columns = zip(*(part.carried(confident=confident) for part in parts), strict=True)
    joined = iter([torch.cat(column) if len(column) > 1 else column[0] for column in columns])
    return parts[0].map(lambda _: next(joined), confident=confident)
