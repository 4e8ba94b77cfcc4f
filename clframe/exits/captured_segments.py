"""Segments of dynamic inference recorded as graphs, with the buffers that they read and write.

Shape suffixes: n rows of a bucket, B samples, C classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from clframe.errors import UnsupportedError, reason_of
from clframe.exits.active_samples import ActiveSamples
from clframe.exits.decisions import Prediction
from clframe.exits.dynamic import DynamicNetwork
from clframe.exits.row_buffers import DeviceCount, gather_rows, kind_of, remaining_first, zeros_for_batch
from clframe.exits.segments import Segment, run_segment
from clframe.nn.graphs import Graphs, WeightWatch

WARM: Final = 2
"""Eager runs of a segment in a bucket before it is recorded: cuDNN chooses its algorithms in them."""


@dataclass(frozen=True)
class RecordedSegment:
    """Replays of a segment in one bucket."""

    compute: Callable[[], None]
    remove: Callable[[], None] | None
    """Writes results and moves the remaining rows to the front; None for the last segment."""


class SegmentGraphs:
    """The segments of a network for inputs of one shape and type, run one after the other on at most ``batch`` samples.

    Args:
        dynamic: The network and its policy, in evaluation mode.
        segments: Its segments.
        x: Inputs, of which one is run to find the shapes of everything.
        batch: Largest number of samples.
        graphs: What records.

    Attributes:
        recordings: By segment and bucket.
        inputs: What each segment reads, for a whole batch.
    """

    def __init__(
        self, dynamic: DynamicNetwork, segments: tuple[Segment, ...], x: Tensor, *, batch: int, graphs: Graphs
    ) -> None:
        self.kind = kind_of(x)
        self.segments, self.recordings = segments, dict[tuple[int, int], RecordedSegment]()
        self._dynamic, self._batch, self._graphs = dynamic, batch, graphs
        self._stops, self._watch = dynamic.stops(), WeightWatch(dynamic)
        self._seen: Counter[tuple[int, int]] = Counter()
        rows = ActiveSamples(x[:1])
        self.inputs: list[ActiveSamples] = []
        for segment in segments:
            self.inputs.append(rows.map(lambda tensor: zeros_for_batch(tensor, batch)))
            run_segment(dynamic, segment, rows)  # a stopped row stays, so that scores get the widest type of all exits
        assert rows.scores_nC is not None
        self._scores_BC = rows.scores_nC.new_zeros(batch + 1, rows.scores_nC.shape[1])
        self._exit_B = torch.zeros(batch + 1, dtype=torch.long, device=x.device)
        self._row_B = torch.arange(batch, device=x.device)
        self._indices_B = [torch.zeros_like(self._row_B) for _ in segments]
        self._alive = torch.zeros(len(segments), dtype=torch.long, device=x.device).unbind()
        self._count = DeviceCount(x.device)

    @property
    def memory(self) -> int:
        """Bytes of the inputs of all segments and of the results."""
        carried = [tensor for rows in self.inputs for tensor in rows.carried()]
        return sum(tensor.numel() * tensor.element_size() for tensor in (*carried, self._scores_BC, self._exit_B))

    def has_changed(self) -> bool:
        """Whether graphs would compute another network than the present one."""
        return self._stops is not self._dynamic.stops() or self._watch.has_changed()

    def begin(self, x: Tensor) -> None:
        """Write the inputs of the first segment."""
        first = self.inputs[0].value
        assert isinstance(first, Tensor)
        first[: len(x)].copy_(x)
        self.set_alive(0, len(x))

    def set_alive(self, k: int, count: int) -> None:
        """Set the number of samples that reach a segment."""
        self._alive[k].fill_(count)

    def launch(self, k: int, bucket: int) -> None:
        """Run a segment and remove stopped samples; on CUDA without waiting for the end.

        Raises:
            UnsupportedError: The segment cannot be recorded.
        """
        recording = self.recordings.get((k, bucket))
        if recording is None and self._seen[k, bucket] >= WARM:
            recording = self._record(k, bucket)
        if recording is not None:
            recording.compute()
            if recording.remove is not None:
                self._count.start(self._alive[k + 1])
                recording.remove()  # runs while the host waits for the count
            return
        self._seen[k, bucket] += 1
        rows, keep_n = self._compute(k, bucket)
        if self.segments[k].exit is not None:
            self._count.start(self._alive[k + 1])
            self._remove(k, bucket, rows, keep_n)

    def remaining(self, k: int) -> int:
        """Wait for the number of samples that remain after a segment that has been launched."""
        return 0 if self.segments[k].exit is None else self._count.wait()

    def results(self, count: int) -> Prediction:
        """Predictions of the first ``count`` samples."""
        return Prediction(self._scores_BC[:count].clone(), self._exit_B[:count].clone())

    def _record(self, k: int, bucket: int) -> RecordedSegment:
        found: list[tuple[ActiveSamples, Tensor]] = []
        try:
            compute = self._graphs.record(lambda: found.append(self._compute(k, bucket)))
            remove = None
            if self.segments[k].exit is not None:
                # What the first graph leaves for this one is in their pool: nothing else may run between them.
                remove = self._graphs.record(lambda: self._remove(k, bucket, *found[0]))
        except RuntimeError as error:
            raise UnsupportedError(f"a segment cannot be recorded ({reason_of(error, most=160)})") from error
        self.recordings[k, bucket] = RecordedSegment(compute, remove)
        return self.recordings[k, bucket]

    def _compute(self, k: int, bucket: int) -> tuple[ActiveSamples, Tensor]:
        """Run a segment on a bucket and count the samples that remain.

        Returns:
            All rows with what they carry, and the mask of those that remain: samples, not padding, that have not
            stopped.
        """
        rows = self.inputs[k].map(lambda tensor: tensor[:bucket])
        valid_n = self._row_B[:bucket] < self._alive[k]
        if k == 0:
            self._indices_B[0][:bucket] = self._row_B[:bucket].masked_fill(~valid_n, self._batch)
        run_segment(self._dynamic, self.segments[k], rows)
        if self.segments[k].exit is None:
            self._write(k, bucket, rows)
            return rows, valid_n
        assert rows.done_n is not None
        keep_n = valid_n & ~rows.done_n
        self._alive[k + 1].copy_(keep_n.sum())
        return rows, keep_n

    def _remove(self, k: int, bucket: int, rows: ActiveSamples, keep_n: Tensor) -> None:
        """Write the results of all rows, and the rows that remain, in order, to the inputs of the next segment."""
        self._write(k, bucket, rows)
        order_n = remaining_first(keep_n)
        carried = (each.carried() for each in (rows, self.inputs[k + 1]))
        for values, into in zip(*carried, strict=True):
            gather_rows(values, order_n, into[:bucket])
        index_n = self._indices_B[k][:bucket].index_select(0, order_n)
        self._indices_B[k + 1][:bucket] = index_n.masked_fill_(self._row_B[:bucket] >= self._alive[k + 1], self._batch)

    def _write(self, k: int, bucket: int, rows: ActiveSamples) -> None:
        """Write scores and exits; those of samples that remain are overwritten later, padding has a row at the end."""
        assert rows.scores_nC is not None and rows.exit_n is not None
        index_n = self._indices_B[k][:bucket]
        self._scores_BC.index_copy_(0, index_n, rows.scores_nC.to(self._scores_BC.dtype))
        self._exit_B.index_copy_(0, index_n, rows.exit_n)
