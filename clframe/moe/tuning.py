"""Choice of executors on CUDA from measured times.

On a CPU every call counts its (token, expert) pairs and estimates; on CUDA that would wait for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from clframe.errors import UnsupportedError
from clframe.moe.convert import Call, layer_inputs, plain_call
from clframe.moe.dispatch import EXECUTORS, run
from clframe.moe.routed import Measured, RoutedExperts, routed_layers
from clframe.moe.triton_experts import triton_works


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """Times of one layer.

    Attributes:
        tokens: Number of tokens.
        share: Share of (token, expert) pairs that the gate keeps.
        ms: Milliseconds by executor, router included; ``all`` is all experts without router, the dense network.
        chosen: The executor that is used from now on.
    """

    tokens: int
    share: float
    ms: Mapping[str, float]
    chosen: str


@torch.no_grad()
def tune(model: nn.Module, batch: Any, *, bypass: bool = False, call: Call = plain_call) -> dict[str, LayerTimes]:
    """Measure each layer of a converted model on the inputs that a batch gives it, and choose the fastest executor.

    The choice applies to the present gates and to batches of half to twice as many tokens; call it again for others.
    Without ``bypass`` results stay those of the gate.

    Args:
        model: Converted model on CUDA, in evaluation mode.
        batch: Inputs of typical size and content.
        bypass: Whether a layer may run all experts without its router where that is fastest. It then is the dense
            network, more accurate and never slower, and its gate has no effect.
        call: Runs the model on the batch.

    Returns:
        The times by layer.

    Raises:
        UnsupportedError: A model without experts or not on CUDA.
    """
    layers = routed_layers(model)
    if not layers:
        raise UnsupportedError(f"tune: found no experts in {type(model).__name__}; convert it first")
    if not all(layer.experts.up.is_cuda for layer in layers.values()):
        raise UnsupportedError("tune: found experts on the CPU, where every call counts its own pairs; leave it out")
    found = {}
    for name, x_ND in layer_inputs(model, batch, call=call).items():
        layer = layers[name]
        if not layer.routes:
            continue
        x_ND = x_ND.to(layer.experts.up.dtype)
        found[name] = measure_layer(layer, x_ND, bypass=bypass)
        layer.measured = (*layer.measured, Measured(layer.gate, len(x_ND), found[name].chosen))
    return found


def measure_layer(
    layer: RoutedExperts, x_ND: Tensor, *, bypass: bool, clock: Callable[[Callable[[], Any]], float] | None = None
) -> LayerTimes:
    """Time one layer's executors on tokens.

    Args:
        layer: With the gate to measure.
        x_ND: Tokens.
        bypass: Whether all experts without router are among the candidates.
        clock: Milliseconds of a call; None: those of a captured CUDA graph.
    """
    clock = clock or time_graph
    weights = layer.experts.weights()

    def routed(name: Any) -> Callable[[], Tensor]:
        return lambda: EXECUTORS[name](weights, x_ND, layer.keep(x_ND), None)

    candidates: dict[str, Callable[[], Any]] = {"dense": routed("dense")}
    if x_ND.is_cuda and triton_works(weights, x_ND):  # other executors wait for the device, and no graph records them
        candidates["triton"] = routed("triton")
    if bypass:
        candidates["all"] = lambda: run(weights, x_ND, None)
    ms = {name: clock(each) for name, each in candidates.items()}
    share = float(layer.keep(x_ND).float().mean())
    return LayerTimes(tokens=len(x_ND), share=share, ms=ms, chosen=min(ms, key=lambda name: ms[name]))


def time_graph(call: Callable[[], Any], *, repeats: int = 5) -> float:
    """Median milliseconds of a call as a CUDA graph, of ten replays each."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    taken = []
    for _ in range(repeats + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            graph.replay()
        end.record()
        end.synchronize()
        taken.append(float(start.elapsed_time(end)) / 10)
    return median(taken[1:])
