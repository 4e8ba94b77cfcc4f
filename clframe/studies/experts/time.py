"""Measured time of a converted model beside the dense one's, call by call in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from clframe.accounting.timing import synchronize
from clframe.analysis.places import Inputs, answering
from clframe.nn.moe import counting

Call = Callable[[nn.Module, Inputs], object]


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Seconds of calls, medians.

    Attributes:
        batch: Samples of a call.
        dense: Of the dense model.
        converted: Of the converted one.
        speedup: Median over pairs of dense over converted.
        pairs: How many there were.
        computed: Share of the networks' MACs that is computed, routers included: more than what the gate chose where
            computing all and masking is faster, or where small experts run together.
        threads: That torch computes with.
        device: Where.
    """

    batch: int
    dense: float
    converted: float
    speedup: float
    pairs: int
    computed: float
    threads: int
    device: str


def paired(
    dense: nn.Module,
    converted: nn.Module,
    inputs: Inputs,
    *,
    batch: int,
    call: Call,
    pairs: int = 20,
    least: int = 5,
    seconds: float = 5.0,
    warmup: int = 2,
) -> Paired:
    """Time both models on the same inputs, one call of each in turn, so that a slow moment meets both.

    Args:
        dense: The model as it was.
        converted: With the gate that is to be measured.
        inputs: Of one batch.
        batch: How many samples they hold.
        call: Runs a model.
        pairs: Of calls that count, at most.
        least: Pairs that count, at least.
        seconds: After which no more pairs begin, once there are the least.
        warmup: Pairs that do not.
    """
    device = next(converted.parameters()).device
    took: list[tuple[float, float]] = []
    with answering(dense), answering(converted):
        end = time.perf_counter() + seconds
        while len(took) < warmup + pairs and (time.perf_counter() < end or len(took) < warmup + least):
            took.append((_once(dense, inputs, call, device), _once(converted, inputs, call, device)))
        with counting(converted) as usage:
            call(converted, inputs)
    took, used = took[warmup:], usage().values()
    return Paired(
        batch=batch, dense=median(one for one, _ in took), converted=median(other for _, other in took),
        speedup=median(one / other for one, other in took), pairs=len(took),
        computed=sum(each.executed_macs for each in used) / max(1, sum(each.dense_macs for each in used)),
        threads=torch.get_num_threads(), device=str(device),
    )  # fmt: skip


def _once(model: nn.Module, inputs: Inputs, call: Call, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call(model, inputs)
    synchronize(device)
    return time.perf_counter() - start
