"""Dynamic inference cut into segments: the stages and exits between two removals of stopped samples.

Within a segment nothing depends on the number of samples that have stopped, so it can be recorded as a CUDA graph
(:mod:`clframe.exits.captured`), or run on a batch that samples join and leave (:mod:`clframe.exits.streaming`).

Shape suffixes: n samples in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import inf

from torch import nn

from clframe.errors import ConfigError
from clframe.exits.active_samples import ActiveSamples
from clframe.exits.dynamic import DynamicNetwork, Stop


@dataclass(frozen=True)
class Segment:
    """Stages and exits in order, up to and including the exit after which stopped samples are removed."""

    operations: tuple[nn.Module | Stop, ...]
    exit: int | None
    """Exit at its end, after which samples are removed; None for the last segment, after which all have stopped."""


def divide(dynamic: DynamicNetwork, removals: Collection[int] | None = None) -> tuple[Segment, ...]:
    """Cut a network after exits.

    Args:
        dynamic: The network with its exit policy.
        removals: Exits after which stopped samples are removed; all that can stop a sample if not given.

    Raises:
        ConfigError: An exit that cannot stop a sample.

    >>> import torch
    >>> from clframe.exits.policies import ExitPolicy
    >>> from clframe.nn import GrowingLinear, Network
    >>> from clframe.nn.backbones import mlp
    >>> exits = [("layer1", GrowingLinear(8)), ("layer2", GrowingLinear(8))]
    >>> network = Network(mlp((4,), width=8, depth=3), exits=exits)
    >>> [segment.exit for segment in divide(DynamicNetwork(network, ExitPolicy(thresholds=0.9)), [1])]
    [1, None]
    """
    stopping = dynamic.stopping_exits
    cuts = stopping if removals is None else tuple(sorted(removals))
    unknown = [exit for exit in cuts if exit not in stopping]
    if unknown:
        known = ", ".join(map(str, stopping)) or "none"
        raise ConfigError(f"removals: found exit {unknown[0]}, which cannot stop a sample; give some of {known}")
    segments: list[Segment] = []
    operations: list[nn.Module | Stop] = []
    for stage, stops in zip(dynamic.network.backbone.stages, dynamic.stops(), strict=True):
        operations.append(stage)
        for stop in stops:
            operations.append(stop)
            if stop.exit in cuts:
                segments.append(Segment(tuple(operations), stop.exit))
                operations = []
    return (*segments, Segment(tuple(operations), None))


def run_segment(dynamic: DynamicNetwork, segment: Segment, rows: ActiveSamples) -> None:
    """Run a segment on all rows: updates what they carry, the scores of those that have stopped, and ``done_n``.

    Never synchronizes with the device. Stopped rows remain.
    """
    confident = dynamic.policy.fallback == "confident"
    for operation in segment.operations:
        if not isinstance(operation, Stop):
            rows.value = operation(rows.value)
            continue
        scores_nC, fires_n = dynamic.classify(operation, rows)
        if fires_n is None:
            continue
        if not confident:
            rows.take(operation.exit, scores_nC, fires_n)
        rows.done_n = fires_n if rows.done_n is None else rows.done_n | fires_n


def buckets_of(batch: int, *, parts: int = 32) -> tuple[int, ...]:
    """Sizes to which the number of samples is rounded up: equal parts of the batch, and powers of two below the first.

    For full batches that shrink: padding is at most a part of the batch, which is what a large batch costs.
    :func:`octaves_of` has fewer sizes, for batches of any size.

    >>> buckets_of(256, parts=8)
    (1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 192, 224, 256)
    >>> buckets_of(10, parts=4)
    (1, 2, 3, 5, 8, 10)
    """
    equal = {-(-batch * step // parts) for step in range(1, parts + 1)}
    powers = {2**power for power in range(batch.bit_length()) if 2**power < batch / parts}
    return tuple(sorted(equal | powers))


def octaves_of(batch: int, *, parts: int = 4) -> tuple[int, ...]:
    """Sizes to which the number of samples is rounded up: equal steps between powers of two, one sample at least.

    For batches of any size, as requests arrive: padding is at most a share of the samples, also of few
    (:func:`buckets_of` bounds it by a share of the largest batch).

    >>> octaves_of(32)
    (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32)
    >>> octaves_of(9)
    (1, 2, 3, 4, 5, 6, 7, 8, 9)
    """
    powers = [2**power for power in range(batch.bit_length())]
    sizes = {power + power * step // parts for power in powers for step in range(parts)}
    return tuple(sorted({min(size, batch) for size in sizes} | {batch}))


def cheapest_removals(
    exits: Sequence[int],
    alive: Sequence[int],
    compute: Callable[[int, int], float],
    remove: Callable[[int, int], float],
) -> tuple[int, ...]:
    """Exits after which removing stopped samples takes the least time in all.

    Between two removals every segment runs on the samples that were left after the first of them. Found by dynamic
    programming over the last removal.

    Args:
        exits: Exits that can stop a sample, in order; segment k ends with exit k of them, the last one after all.
        alive: Samples that reach each segment: one entry more than ``exits``, the first is the batch.
        compute: ``(segment, samples) -> seconds`` of running it.
        remove: ``(segment, samples) -> seconds`` of removing samples after it, waiting for their number included.

    >>> def compute(segment, samples): return samples * 1.0
    >>> cheapest_removals([0, 1], [8, 7, 1], compute, lambda segment, samples: 3.0)
    (1,)
    """
    count = len(alive)
    best: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for end in range(1, count + 1):
        found: tuple[float, tuple[int, ...]] = (inf, ())
        for start in range(end):
            seconds, removals = best[start]
            seconds += sum(compute(segment, alive[start]) for segment in range(start, end) if alive[start])
            if end < count:
                seconds += remove(end - 1, alive[start]) if alive[start] else 0.0
                removals = (*removals, exits[end - 1])
            found = min(found, (seconds, removals), key=lambda choice: choice[0])
        best.append(found)
    return best[-1][1]
