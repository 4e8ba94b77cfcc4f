"""Runners of single segments for batches that samples join and leave: as they are, or by CUDA graphs.

Shape suffixes: n samples of a batch.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from clframe.exits.captured_segments import WARM
from clframe.exits.dynamic import ActiveSamples, DynamicNetwork, evaluating
from clframe.exits.segments import buckets_of, divide, run_segment
from clframe.nn.backbones.base import tap_of
from clframe.nn.graphs import CudaGraphs, Graphs


class SegmentRunner(Protocol):
    """Runs the segments of a network: :class:`PlainRunner`, or one that uses graphs."""

    @property
    def segments(self) -> int:
        """Number of segments."""

    def run(self, segment: int, rows: ActiveSamples) -> ActiveSamples:
        """Run a segment: the rows with their scores, and ``done_n``, None at the last segment, where all stop.

        The next run may overwrite what is returned. On CUDA it may still be computed.
        """


class PlainRunner:
    """Runs segments of a network as they are, in evaluation mode without gradients."""

    def __init__(self, dynamic: DynamicNetwork) -> None:
        self.dynamic, self._segments = dynamic, divide(dynamic)

    @property
    def segments(self) -> int:
        """Number of segments."""
        return len(self._segments)

    @torch.no_grad()
    def run(self, segment: int, rows: ActiveSamples) -> ActiveSamples:
        """Run a segment; see :class:`SegmentRunner`."""
        if not self.dynamic.network.training:
            run_segment(self.dynamic, self._segments[segment], rows)
            return rows
        with evaluating(self.dynamic.network):
            run_segment(self.dynamic, self._segments[segment], rows)
        return rows


class GraphRunner:
    """Runs segments of a network by CUDA graphs, recorded for the batch sizes of :func:`buckets_of` with eight parts.

    The first runs of a segment in a size are eager, as are all if it cannot be recorded. Inputs and outputs of every
    recorded segment and size are kept: about ten times those of a whole batch. Parameters must not be replaced.

    Args:
        dynamic: The network and its policy, on a CUDA device.
        max_batch: Largest number of samples.
        graphs: What records; CUDA graphs on the network's device if not given.

    Attributes:
        sizes: Batch sizes that are recorded; others are padded.
        failure: Reason why a segment cannot be recorded; empty where all can.
    """

    def __init__(self, dynamic: DynamicNetwork, *, max_batch: int, graphs: Graphs | None = None) -> None:
        self._plain = PlainRunner(dynamic)
        self._graphs = CudaGraphs(dynamic.network.final.weight.device) if graphs is None else graphs
        self._confident = dynamic.policy.fallback == "confident"
        self.sizes = buckets_of(max_batch, parts=8)
        self._seen: Counter[tuple[object, ...]] = Counter()
        self._recorded: dict[tuple[object, ...], tuple[ActiveSamples, ActiveSamples, Callable[[], None]]] = {}
        self.failure = ""

    @property
    def segments(self) -> int:
        """Number of segments."""
        return self._plain.segments

    @torch.no_grad()
    def run(self, segment: int, rows: ActiveSamples) -> ActiveSamples:
        """Run a segment; see :class:`SegmentRunner`."""
        tap = tap_of(rows.value)
        count = len(tap)
        size = self.sizes[bisect_left(self.sizes, count)]
        key = (segment, size, tap.shape[1:], tap.dtype)
        if key not in self._recorded:
            self._seen[key] += 1
            if self.failure or self._seen[key] <= WARM or not self._record(key, segment, rows, size):
                return self._plain.run(segment, rows)
        inputs, outputs, replay = self._recorded[key]
        pairs = (each.carried(confident=self._confident) for each in (rows, inputs))
        for values, into in zip(*pairs, strict=True):
            into[:count].copy_(values)
        replay()
        return _first(outputs, count, confident=self._confident)

    def _record(self, key: tuple[object, ...], segment: int, rows: ActiveSamples, size: int) -> bool:
        """Record a segment in a size; False where it cannot be recorded."""

        def padded(values: Tensor) -> Tensor:
            repeated = values.index_select(0, torch.arange(size, device=values.device) % len(values))
            return repeated.clone(memory_format=torch.preserve_format)

        inputs, found = rows.map(padded, confident=self._confident), list[ActiveSamples]()

        def work() -> None:
            found.append(self._plain.run(segment, inputs.map(lambda values: values, confident=self._confident)))

        try:
            replay = self._graphs.record(work)
        except RuntimeError as error:
            self.failure = " ".join(str(error).split())[:160]
            return False
        self._recorded[key] = (inputs, found[0], replay)
        return True


def _first(rows: ActiveSamples, count: int, *, confident: bool) -> ActiveSamples:
    """The first rows, with their scores."""
    found = rows.map(lambda values: values[:count], confident=confident)
    for name in ("scores_nC", "exit_n", "done_n"):
        values = getattr(rows, name)
        setattr(found, name, None if values is None else values[:count])
    return found
