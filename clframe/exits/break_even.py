"""Measured break-even point of removing stopped samples from a batch."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from clframe.exits.active_samples import rows_of_flow
from clframe.nn.backbones.stages import Flow
from clframe.nn.network import Network


@torch.no_grad()
def measure_break_even(network: Network, *, batch: int = 256, repetitions: int = 5) -> float:
    """Smallest share of stopped samples for which removing them saves time: ``compact`` of ``DynamicNetwork``.

    Copying the remaining rows takes at most c seconds; keeping a share s of stopped rows costs ``s T`` of the T seconds
    up to the next exit. Both are equal at ``s = c / T``. The largest value over all exits is returned.

    Args:
        network: The network to time, on its device, in evaluation mode.
        batch: Samples per pass.
        repetitions: Number of passes after one warm-up pass; medians are used.

    Returns:
        A share of at most 1; 0 for a network with one exit.

    >>> from clframe.nn import GrowingLinear
    >>> from clframe.nn.backbones import mlp
    >>> network = Network(mlp((4,), width=8), exits=[("layer1", GrowingLinear(8))])
    >>> 0 < measure_break_even(network.eval(), batch=8) <= 1
    True
    """
    parameter = next(network.parameters())
    x = parameter.new_zeros((batch, *network.input_shape))
    keep_n = torch.arange(batch, device=parameter.device)
    passes: list[list[float]] = []
    for _ in range(repetitions + 1):
        value: Flow = x
        copying, running = 0.0, 0.0
        shares: list[float] = []
        for stage, exits in zip(network.backbone.stages, network.exits_at, strict=True):
            seconds, value = _timed(stage, value)
            running += seconds
            if not exits:
                continue
            if copying:
                shares.append(copying / running)
            copying, _ = _timed(lambda kept: rows_of_flow(kept, keep_n), value)
            running = 0.0
        passes.append(shares)
    return max((min(1.0, median(ratios)) for ratios in zip(*passes[1:], strict=True)), default=0.0)


def _timed(call: Callable[[Flow], Flow], value: Flow) -> tuple[float, Flow]:
    """Seconds until the device has computed the result, and the result."""
    start = perf_counter()
    out = call(value)
    first: Tensor = out if isinstance(out, Tensor) else out[0]
    if first.device.type != "cpu":
        first.flatten()[:1].cpu()  # reading one value synchronizes on every kind of device
    return perf_counter() - start, out
