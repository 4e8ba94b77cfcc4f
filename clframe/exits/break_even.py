"""When it pays to take finished samples out of a batch, as measured."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from clframe.exits.dynamic import rows_of_flow
from clframe.nn.backbones.base import Flow
from clframe.nn.network import Network


@torch.no_grad()
def measure_break_even(network: Network, *, batch: int = 256, repetitions: int = 5) -> float:
    """Smallest share of a batch that must have finished for leaving to pay, for ``DynamicNetwork``'s ``compact``.

    Copying the rows that stay takes at most c seconds; rows that stay without need cost their share s of the T
    seconds up to the next exit. They balance at ``s = c / T``. The exit where leaving pays least decides.

    Args:
        network: What to measure, on its device, in evaluation mode.
        batch: Samples of a pass.
        repetitions: Passes, after one that warms up; medians count.

    Returns:
        A share, at most 1; 0 where there are no exits before the last.

    >>> from clframe.nn import GrowingLinear
    >>> from clframe.nn.backbones import mlp
    >>> network = Network(mlp((4,), width=8), exits=[("layer1", GrowingLinear(8))])
    >>> 0 < measure_break_even(network.eval(), batch=8) <= 1
    True
    """
    parameter = next(network.parameters())
    x = parameter.new_zeros((batch, *network.input_shape))
    keep_n = torch.arange(batch, device=parameter.device)
    shares: list[list[float]] = []
    for _ in range(repetitions + 1):
        value: Flow = x
        copying, running = 0.0, 0.0
        lap: list[float] = []
        for stage, exits in zip(network.backbone.stages, network.exits_at, strict=True):
            took, value = _timed(stage, value)
            running += took
            if not exits:
                continue
            if copying:
                lap.append(copying / running)
            copying, _ = _timed(lambda kept: rows_of_flow(kept, keep_n), value)
            running = 0.0
        shares.append(lap)
    return max((min(1.0, median(laps)) for laps in zip(*shares[1:], strict=True)), default=0.0)


def _timed(call: Callable[[Flow], Flow], value: Flow) -> tuple[float, Flow]:
    """Seconds until the device has the result, and the result."""
    start = perf_counter()
    out = call(value)
    first: Tensor = out if isinstance(out, Tensor) else out[0]
    if first.device.type != "cpu":
        first.flatten()[:1].cpu()
    return perf_counter() - start, out
