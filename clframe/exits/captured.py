"""Dynamic inference on a GPU as CUDA graphs: a few launches in the place of hundreds, and one wait for each removal.

The segments between removals of stopped samples (:mod:`clframe.exits.segments`) are recorded in a few sizes, the
buckets. A batch is padded to its bucket; rows that are padding are computed and ignored. After the exit at the end of a
segment the device counts the samples that remain, moves them to the front and writes the results of the others, while
the host reads the count and chooses the bucket of the next segment.

Shape suffixes: n rows of a bucket, B samples, C classes.
"""

from __future__ import annotations

import itertools
import logging
from bisect import bisect_left
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from statistics import median
from typing import Final

import torch
from torch import Tensor, nn

from clframe.accounting.measurement import time_call
from clframe.errors import ConfigError, DataError, UnsupportedError
from clframe.exits.captured_segments import WARM, SegmentGraphs
from clframe.exits.decisions import Prediction
from clframe.exits.dynamic import DynamicNetwork
from clframe.exits.row_buffers import kind_of
from clframe.exits.segments import buckets_of, cheapest_removals, divide
from clframe.nn.frozen import evaluating
from clframe.nn.graphs import CudaGraphs, Graphs

_log = logging.getLogger(__name__)

REPEATS: Final = 5
"""Timed runs of each segment and bucket when removals are chosen, and of graphs and the plain network."""


class CapturedNetwork(nn.Module):
    """Dynamic inference by graphs, with the predictions of a :class:`~clframe.exits.dynamic.DynamicNetwork`.

    Each sample stops at the same exit as in the plain network and gets its scores, up to the rounding of kernels that
    depend on the batch size: removals decide how long a stopped sample is computed further, never where it stops.

    Recording takes place while batches are predicted: the first two runs of a segment in a bucket are eager. Memory:
    the inputs of every segment for a whole batch (:attr:`memory`), and one pool that all graphs share, as large as the
    largest segment needs. Inputs of another shape, type or device than the first are predicted without graphs, as is
    everything under autocast or where a segment cannot be recorded; a line of the log says so once. After parameters
    have been replaced or moved the graphs are dropped and recorded again; values written in place are used as they are.
    What ``dynamic.adjust`` reads must not change. Calls of one object must not overlap.

    Args:
        dynamic: The network and its policy; its ``compact`` is not used.
        batch: Largest number of samples that are computed together; larger inputs are divided.
        removals: Exits after which stopped samples are removed, such as :meth:`choose_removals` finds; all that can
            stop a sample if not given.
        graphs: What records; CUDA graphs on the network's device if not given.

    Attributes:
        failure: Reason why segments cannot be recorded; empty where they can.

    Raises:
        ConfigError: No CUDA device and no ``graphs``, a batch below 1, or removals that cannot stop a sample.
    """

    def __init__(
        self,
        dynamic: DynamicNetwork,
        *,
        batch: int = 256,
        removals: Collection[int] | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        super().__init__()
        device = dynamic.network.final.weight.device
        if graphs is None and device.type != "cuda":
            raise ConfigError(f"captured: found a network on {device}; move it to a CUDA device, or use DynamicNetwork")
        if batch < 1:
            raise ConfigError(f"captured: found batch={batch}; give at least 1")
        self.dynamic, self.batch, self.removals = dynamic, batch, removals
        self.buckets = buckets_of(batch)
        self._graphs = CudaGraphs(device) if graphs is None else graphs
        divide(dynamic, removals)  # refuses unknown removals now
        self._segments: SegmentGraphs | None = None
        self._recorded = 0
        self._reported: set[str] = set()
        self.failure = ""

    @torch.inference_mode(False)  # what is written inside of that mode cannot be written outside of it
    @torch.no_grad()
    def forward(self, x: Tensor) -> Prediction:
        """Scores and exit of each sample of ``x``, in the order of the input."""
        obstacle = self._obstacle(x)
        if obstacle or not len(x):
            self._report(obstacle)
            return self._plain(x)
        with self._evaluating():
            parts = [self._run(part) for part in x.split(self.batch)]
        if None in parts:
            return self._plain(x)
        found = [part for part in parts if part is not None]
        return found[0] if len(found) == 1 else Prediction(*map(torch.cat, zip(*found, strict=True)))

    @property
    def memory(self) -> int:
        """Bytes of the inputs of all segments and of the results; 0 before the first call."""
        return 0 if self._segments is None else self._segments.memory

    @property
    def recorded(self) -> int:
        """Number of segments recorded so far, over all buckets."""
        return self._recorded + (0 if self._segments is None else len(self._segments.recordings))

    def reset(self) -> None:
        """Drop all graphs and buffers; the next call sets their shape and type."""
        self._recorded, found = self.recorded, self._segments
        self._segments = None
        if found is not None and found.recordings:
            del found
            self._graphs.release()

    @torch.inference_mode(False)
    @torch.no_grad()
    def choose_removals(self, x: Tensor) -> tuple[int, ...]:
        """Choose and set the exits after which removing stopped samples pays, by the measured time of every segment.

        The samples decide how many remain after each exit; predictions do not depend on the choice. Takes the time of
        recording every segment in up to five buckets, and a few runs of each.

        Args:
            x: Samples such as those to predict, at most ``batch`` of which are used.

        Returns:
            The exits, in order; those set before where nothing can be recorded.

        Raises:
            DataError: No samples.
        """
        if not len(x):
            raise DataError("captured: found no samples to choose removals by; give some like those to predict")
        x = x[: self.batch]
        exits = self.dynamic.stopping_exits
        if not exits or self._obstacle(x):
            return exits if self.removals is None else tuple(sorted(self.removals))
        exit_B = self.dynamic(x).exit_B
        alive = [len(x), *(int((exit_B > exit).sum()) for exit in exits)]
        self.removals = None
        self.reset()
        with self._evaluating():
            times = self._measure(x)
        if times is None:
            return exits

        def seconds(part: int, segment: int, samples: int) -> float:
            return _interpolate(samples, [(bucket, found[part][segment]) for bucket, found in times.items()])

        self.removals = cheapest_removals(
            exits, alive, lambda segment, n: seconds(0, segment, n), lambda segment, n: seconds(1, segment, n)
        )
        self.reset()
        return tuple(self.removals)

    def _measure(self, x: Tensor) -> dict[int, tuple[list[float], list[float]]] | None:
        """Seconds of computing, and of removing after, every segment in some buckets; None where recording fails."""
        some = [self.batch * part // 16 for part in (16, 8, 4, 1)] + [1]
        times = {}
        for bucket in sorted({self._bucket(max(1, size)) for size in some}):
            segments = self._begin(x.repeat(-(-bucket // len(x)), *([1] * (x.dim() - 1)))[:bucket])
            found: tuple[list[float], list[float]] = ([], [])
            for k, segment in enumerate(segments.segments):
                segments.set_alive(k, bucket)
                for _ in range(WARM + 1):
                    if not self._launch(segments, k, bucket):
                        return None
                    segments.remaining(k)
                alone = self._time(segments.recordings[k, bucket].compute)
                found[0].append(alone)
                if segment.exit is not None:
                    found[1].append(max(0.0, self._time(partial(self._launch, segments, k, bucket)) - alone))
            times[bucket] = found
        return times

    def _time(self, call: Callable[[], object]) -> float:
        """Median seconds of a call, all work on the device included."""
        device = self.dynamic.network.final.weight.device
        return median(time_call(call, device)[1] for _ in range(REPEATS))

    def _plain(self, x: Tensor) -> Prediction:
        found: Prediction = self.dynamic(x)
        return found

    def _evaluating(self) -> AbstractContextManager[None]:
        network = self.dynamic.network
        return evaluating(network) if network.training else nullcontext()

    def _obstacle(self, x: Tensor) -> str:
        """Return what prevents graphs for these inputs, or an empty text."""
        if self.failure:
            return self.failure
        if torch.is_autocast_enabled(x.device.type):
            return "autocast keeps casts of weights that a graph would not renew"
        recorded, found = self._segments, kind_of(x)
        if recorded is not None and found != recorded.kind and len(x):
            return f"inputs are {found[0]} of shape {found[1]}, recorded are {recorded.kind[0]} of {recorded.kind[1]}"
        return ""

    def _report(self, obstacle: str) -> None:
        if obstacle and obstacle not in self._reported:
            self._reported.add(obstacle)
            _log.info("dynamic inference without CUDA graphs: %s", obstacle)

    def _run(self, x: Tensor) -> Prediction | None:
        """Predict at most ``batch`` samples; None where a segment cannot be recorded."""
        segments, size = self._begin(x), len(x)
        for k in range(len(segments.segments)):
            bucket = self._bucket(size)
            recorded = (k, bucket) in segments.recordings
            if k == 0 and not recorded and segments.has_changed():
                return self._run_again(x)
            if not self._launch(segments, k, bucket):
                return None
            # The graph holds the memory of the weights that it reads, so that they may be compared while it runs.
            if k == 0 and recorded and segments.has_changed():
                return self._run_again(x)
            size = segments.remaining(k)
            if not size:
                break
        return segments.results(len(x))

    def _run_again(self, x: Tensor) -> Prediction | None:
        self.reset()
        return self._run(x)

    def _begin(self, x: Tensor) -> SegmentGraphs:
        """Write the inputs of the first segment."""
        if self._segments is None:
            parts = divide(self.dynamic, self.removals)
            self._segments = SegmentGraphs(self.dynamic, parts, x, batch=self.batch, graphs=self._graphs)
        self._segments.begin(x)
        return self._segments

    def _launch(self, segments: SegmentGraphs, k: int, bucket: int) -> bool:
        """Run a segment; False where it cannot be recorded, which is reported."""
        try:
            segments.launch(k, bucket)
        except UnsupportedError as error:
            self.failure = str(error)
            self._report(self.failure)
            self.reset()
            return False
        return True

    def _bucket(self, size: int) -> int:
        return self.buckets[bisect_left(self.buckets, size)]


def _interpolate(size: int, points: list[tuple[int, float]]) -> float:
    """Value at a size between measured ones, which are in order; the nearest one outside of them."""
    if size <= points[0][0]:
        return points[0][1]
    for (low, below), (high, above) in itertools.pairwise(points):
        if size <= high:
            return below + (above - below) * (size - low) / (high - low)
    return points[-1][1]
