"""Runners of single segments for batches that samples join and leave: as they are, or by CUDA graphs.

Shape suffixes: n samples of a batch, C classes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from clframe.errors import ConfigError, DataError, reason_of
from clframe.exits.active_samples import ActiveSamples
from clframe.exits.captured_segments import WARM
from clframe.exits.dynamic import DynamicNetwork
from clframe.exits.row_buffers import HostCopy, gather_rows, kind_of, remaining_first, zeros_for_batch
from clframe.exits.segments import Segment, divide, octaves_of, run_segment
from clframe.exits.server_requests import first_rows, join_rows
from clframe.nn.backbones.stages import tap_of
from clframe.nn.frozen import evaluating
from clframe.nn.graphs import CudaGraphs, Graphs, WeightWatch


@dataclass(eq=False)
class SegmentRun:
    """A segment that has been launched on a batch; on CUDA it may still be computed."""

    rows: ActiveSamples | None
    """All rows, maybe with more at the end, with everything carried for them; None after the last segment. The next run
    of the segment may overwrite them."""
    copy: HostCopy
    """Scores, exit and whether it stops (1) of each sample, in their order, as columns."""
    dtype: torch.dtype
    """Type of the scores."""
    remaining_first: bool = False
    """Whether ``rows`` starts with the samples that do not stop, in order; else it has the order of the batch."""

    def is_ready(self) -> bool:
        """Whether :meth:`results` would not wait."""
        return self.copy.is_ready()

    def results(self) -> tuple[Tensor, list[int], list[bool]]:
        """Wait for scores_nC on the host, the exit and whether it stops of each sample."""
        found = self.copy.wait().clone()  # a later run overwrites the memory of the copy
        exits, stops = found[:, -2:].T.tolist()
        return found[:, :-2].to(self.dtype), [int(exit) for exit in exits], [stop > 0 for stop in stops]


class SegmentRunner(Protocol):
    """Runs the segments of a network: :class:`PlainRunner`, or one that uses graphs."""

    @property
    def segments(self) -> int:
        """Number of segments."""

    @property
    def max_batch(self) -> int | None:
        """Largest number of samples of a batch; None without a limit."""

    @property
    def concurrent(self) -> bool:
        """Whether a segment may be launched while others are computed; never itself before its results are there."""

    def launch(self, segment: int, parts: Sequence[ActiveSamples]) -> SegmentRun:
        """Run a segment on the samples of all parts as one batch, without waiting for the device.

        The results of the runs that made the parts must have been waited for.
        """


class PlainRunner:
    """Runs segments of a network as they are, in evaluation mode without gradients."""

    def __init__(self, dynamic: DynamicNetwork) -> None:
        self.dynamic, self._segments, self._stops = dynamic, divide(dynamic), dynamic.stops()

    @property
    def segments(self) -> int:
        """Number of segments."""
        return len(self._segments)

    @property
    def max_batch(self) -> int | None:
        """None: any number of samples."""
        return None

    @property
    def concurrent(self) -> bool:
        """False: one segment at a time."""
        return False

    @torch.no_grad()
    def launch(self, segment: int, parts: Sequence[ActiveSamples]) -> SegmentRun:
        """Run a segment; see :class:`SegmentRunner`."""
        rows = self.run(segment, join_rows(parts))
        assert rows.scores_nC is not None
        return SegmentRun(rows, HostCopy(self.pack(segment, rows)), rows.scores_nC.dtype)

    @torch.no_grad()
    def run(self, segment: int, rows: ActiveSamples) -> ActiveSamples:
        """Run a segment and return the rows with their scores, and ``done_n``, None where all stop."""
        network = self.dynamic.network
        with evaluating(network) if network.training else nullcontext():
            run_segment(self.dynamic, self._present(segment), rows)
        return rows

    def _present(self, segment: int) -> Segment:
        """A segment of the network as it is now: its ensemble may have been replaced, the number of exits may not."""
        if self._stops is not self.dynamic.stops():
            segments = divide(self.dynamic)
            if len(segments) != len(self._segments):
                raise ConfigError("runner: found other exits than before; make another runner and another server")
            self._segments, self._stops = segments, self.dynamic.stops()
        return self._segments[segment]

    def pack(self, segment: int, rows: ActiveSamples) -> Tensor:
        """Scores, exit and whether it stops of each sample as columns: one tensor is copied faster than three."""
        scores_nC, exit_n = rows.scores_nC, rows.exit_n
        assert scores_nC is not None and exit_n is not None
        done_n = rows.done_n if segment < self.segments - 1 else None
        stops_n = torch.ones_like(exit_n) if done_n is None else done_n.to(exit_n.dtype)
        dtype = torch.promote_types(scores_nC.dtype, torch.float32)  # shorter types have no place for all exits
        columns = (scores_nC, torch.stack((exit_n, stops_n), 1))
        return torch.cat([values.to(dtype) for values in columns], 1)


@dataclass(eq=False)
class _Buffers:
    """Tensors for a whole batch that the graphs of a segment read and write, for inputs of one shape and type."""

    inputs: ActiveSamples
    carried: list[Tensor]
    """All tensors of the inputs."""
    outputs: ActiveSamples | None
    """None after the last segment."""
    packed_nC: Tensor
    host_nC: Tensor
    dtype: torch.dtype
    replays: dict[int, Callable[[], None]] = field(default_factory=dict)
    """By batch size."""


class GraphRunner:
    """Runs segments of a network by CUDA graphs, recorded for the batch sizes of :func:`octaves_of`.

    Within a graph the samples that do not stop are moved to the front and the results are packed, so that the host
    launches three operations a segment. The first runs of a segment in a size are eager, as are all if it cannot be
    recorded: call :meth:`prepare` before requests arrive. The inputs and outputs of every segment are kept for a whole
    batch. After parameters have been replaced or moved the graphs are dropped and recorded again; values written in
    place are used as they are. Calls must not overlap.

    Args:
        dynamic: The network and its policy, on a CUDA device.
        max_batch: Largest number of samples.
        graphs: What records; CUDA graphs on the network's device if not given.

    Attributes:
        sizes: Batch sizes that are recorded; others are padded.
        failure: Reason why a segment cannot be recorded; empty where all can.
        eager: Number of runs that were not replayed.

    Raises:
        ConfigError: No CUDA device and no ``graphs``, a batch below 1, or more samples than ``max_batch``.
    """

    def __init__(
        self, dynamic: DynamicNetwork, *, max_batch: int, concurrent: bool | None = None, graphs: Graphs | None = None
    ) -> None:
        device = dynamic.network.final.weight.device
        if graphs is None and device.type != "cuda":
            raise ConfigError(f"runner: found a network on {device}; move it to a CUDA device, or use PlainRunner")
        if max_batch < 1:
            raise ConfigError(f"runner: found max_batch={max_batch}; give at least 1")
        self._plain, self.max_batch = PlainRunner(dynamic), max_batch
        self.concurrent = self.segments == 2 if concurrent is None else concurrent
        self._graphs = self._graphs_on(device) if graphs is None else [graphs] * self.segments
        self._watch_network()
        self.sizes = octaves_of(max_batch)
        self._seen: Counter[tuple[object, ...]] = Counter()
        self._buffers: dict[tuple[object, ...], _Buffers] = {}
        self.failure, self.eager = "", 0

    def _graphs_on(self, device: torch.device) -> list[Graphs]:
        """The graphs of each segment."""
        if not self.concurrent:
            return [CudaGraphs(device)] * self.segments
        return [CudaGraphs(device, priority=segment - self.segments) for segment in range(self.segments)]

    @property
    def segments(self) -> int:
        """Number of segments."""
        return self._plain.segments

    @property
    def recorded(self) -> int:
        """Number of recorded segments, over all sizes."""
        return sum(len(found.replays) for found in self._buffers.values())

    @torch.no_grad()
    def prepare(self, x: Tensor) -> None:
        """Record every segment in every size for inputs like ``x``, a batch of samples on the network's device.

        Raises:
            DataError: A batch without samples.
        """
        if not len(x):
            raise DataError("runner: found no sample to record with; give a batch of at least one")
        for size in reversed(self.sizes):
            first = ActiveSamples(x[torch.arange(size, device=x.device) % len(x)])
            for _ in range(WARM + 1):
                rows: ActiveSamples | None = first
                for segment in range(self.segments):
                    assert rows is not None
                    run = self.launch(segment, [first_rows(rows, size)])
                    run.copy.wait()
                    rows = run.rows
        self.eager = 0

    @torch.no_grad()
    def launch(self, segment: int, parts: Sequence[ActiveSamples]) -> SegmentRun:
        """Run a segment; see :class:`SegmentRunner`."""
        sizes = [len(tap_of(part.value)) for part in parts]
        count = sum(sizes)
        if count > self.max_batch:
            raise ConfigError(f"runner: found {count} samples; give {self.max_batch} at most, or raise max_batch")
        size = self.sizes[bisect_left(self.sizes, count)]
        buffers = self._recorded(segment, parts[0], size)
        if buffers is None:
            return self._run_eagerly(segment, parts)
        start = 0
        for part, rows in zip(parts, sizes, strict=True):
            for values, into in zip(part.carried(), buffers.carried, strict=True):
                into[start : start + rows].copy_(values)
            start += rows
        with self._graphs[segment].branch():
            buffers.replays[size]()
            copy = HostCopy(buffers.packed_nC[:count], into=buffers.host_nC[:count])
        # The graph holds the memory of the weights that it reads, so that they may be compared while it runs.
        if self._has_changed():
            self.reset()
            return self._run_eagerly(segment, parts)
        return SegmentRun(buffers.outputs, copy, buffers.dtype, remaining_first=True)

    def reset(self) -> None:
        """Drop all graphs and buffers, when what was launched is complete: its memory is used again."""
        device = self._plain.dynamic.network.final.weight.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._buffers.clear()
        self._seen.clear()
        for graphs in dict.fromkeys(self._graphs):
            graphs.release()
        self._watch_network()

    def _watch_network(self) -> None:
        dynamic = self._plain.dynamic
        self._watch, self._stops = WeightWatch(dynamic), dynamic.stops()

    def _has_changed(self) -> bool:
        """Whether graphs would compute another network than the present one."""
        return self._stops is not self._plain.dynamic.stops() or self._watch.has_changed()

    def _run_eagerly(self, segment: int, parts: Sequence[ActiveSamples]) -> SegmentRun:
        self.eager += 1
        return self._plain.launch(segment, parts)

    def _recorded(self, segment: int, rows: ActiveSamples, size: int) -> _Buffers | None:
        """Buffers of a segment that is recorded in a size, now at the latest; None where it runs eagerly."""
        key = (segment, *kind_of(tap_of(rows.value)))
        buffers = self._buffers.get(key)
        if buffers is not None and size in buffers.replays:
            return buffers
        sized = (*key, size)
        self._seen[sized] += 1
        if self.failure or self._seen[sized] <= WARM:
            return None
        if self._has_changed():
            self.reset()
            return None
        if buffers is None:
            buffers = self._buffers[key] = self._allocate(segment, rows)
        return buffers if self._record(buffers, segment, size) else None

    def _allocate(self, segment: int, rows: ActiveSamples) -> _Buffers:
        """Run one sample to find the shapes of everything."""

        def whole(values: Tensor) -> Tensor:
            return zeros_for_batch(values, self.max_batch)

        one = first_rows(rows, 1)
        inputs = one.map(whole)
        after = self._plain.run(segment, one)
        assert after.scores_nC is not None
        packed_nC = whole(self._plain.pack(segment, after))
        last = segment == self.segments - 1
        return _Buffers(
            inputs=inputs,
            carried=inputs.carried(),
            outputs=None if last else after.map(whole),
            packed_nC=packed_nC,
            host_nC=torch.zeros_like(packed_nC, device="cpu", pin_memory=packed_nC.is_cuda),
            dtype=after.scores_nC.dtype,
        )

    def _record(self, buffers: _Buffers, segment: int, size: int) -> bool:
        """Record a segment in a size; False where it cannot be recorded."""

        def work() -> None:
            rows = self._plain.run(segment, first_rows(buffers.inputs, size))
            buffers.packed_nC[:size].copy_(self._plain.pack(segment, rows))
            if buffers.outputs is None:
                return
            assert rows.done_n is not None
            # Padding is behind the samples of its kind, so the samples that remain come first whatever becomes of it.
            order_n = remaining_first(~rows.done_n)
            carried = (each.carried() for each in (rows, buffers.outputs))
            for values, into in zip(*carried, strict=True):
                gather_rows(values, order_n, into[:size])

        try:
            buffers.replays[size] = self._graphs[segment].record(work)
        except RuntimeError as error:
            self.failure = reason_of(error, most=160)
            return False
        return True
