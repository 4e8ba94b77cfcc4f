"""Choice of executors from measured times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median, quantiles
from time import get_clock_info, perf_counter, process_time
from typing import Any

import torch
from torch import Tensor, nn

from clframe.errors import UnsupportedError
from clframe.moe.convert import Call, layer_inputs, plain_call
from clframe.moe.dispatch import run
from clframe.moe.executors import grouped_mm_works
from clframe.moe.routed import Measured, RoutedExperts, routed_layers, threads_of
from clframe.moe.triton_experts import triton_works

Calls = Mapping[str, Callable[[], Any]]
"""Calls to measure by name."""
Clock = Callable[[Calls], Mapping[str, float]]
"""Function from calls to their milliseconds."""
MARGIN = 0.95
"""Fraction of the time of the plan's choice, which sees each batch, below which another executor is used on a CPU."""
FEW_TOKENS = 16
"""Number of tokens up to which execution token by token is measured."""
COARSE = 1e-5
"""Seconds of a tick from which on the processor's clock does not time single calls."""


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """Times of one layer.

    Attributes:
        tokens: Number of tokens.
        threads: Number of threads on a CPU; 0 on CUDA.
        share: Share of (token, expert) pairs that the gate keeps.
        ms: Milliseconds by executor, router included; ``all`` is all experts without router, the dense network;
            ``plan`` the choice of the cost model on a CPU.
        chosen: The executor that is used from now on.
    """

    tokens: int
    threads: int
    share: float
    ms: Mapping[str, float]
    chosen: str


@torch.no_grad()
def tune(model: nn.Module, batch: Any, *, bypass: bool = False, call: Call = plain_call) -> dict[str, LayerTimes]:
    """Measure each layer of a converted model on the inputs that a batch gives it, and choose the fastest executor.

    The choice applies to the present gates, to batches of half to twice as many tokens and, on a CPU, to the present
    number of threads; call it again for others. Without ``bypass`` results stay those of the gate. Timings decide, so
    two processes may choose differently, and results differ by rounding.

    Args:
        model: Converted model in evaluation mode.
        batch: Inputs of typical size and content.
        bypass: Whether a layer may run all experts without its router where that is fastest. It then computes
            what the dense network does, and its gate has no effect.
        call: Runs the model on the batch.

    Returns:
        The times by layer.

    Raises:
        UnsupportedError: A model without experts.
    """
    layers = routed_layers(model)
    if not layers:
        raise UnsupportedError(f"tune: found no experts in {type(model).__name__}; convert it first")
    found = {}
    for name, x_ND in layer_inputs(model, batch, call=call).items():
        layer = layers[name]
        if not layer.routes or not len(x_ND):
            continue
        x_ND = x_ND.to(layer.experts.up.dtype)
        found[name] = one = measure_layer(layer, x_ND, bypass=bypass)
        layer.measured = (*layer.measured, Measured(layer.gate, one.tokens, one.chosen, one.threads))
    return found


def measure_layer(layer: RoutedExperts, x_ND: Tensor, *, bypass: bool, clock: Clock | None = None) -> LayerTimes:
    """Time one layer's executors on tokens.

    Args:
        layer: With the gate to measure.
        x_ND: Tokens.
        bypass: Whether all experts without router are among the candidates.
        clock: Measures the candidates; None: as captured CUDA graphs, or in turns on a CPU.
    """
    before = layer.measured
    try:
        if x_ND.is_cuda:
            ms = (clock or time_graphs)(_on_cuda(layer, x_ND, bypass=bypass))
        else:
            ms = (clock or time_turns)(_on_cpu(layer, x_ND, bypass=bypass))
    finally:
        layer.measured = before
    chosen = min(ms, key=lambda name: ms[name])
    if "plan" in ms and ms[chosen] > MARGIN * ms["plan"]:
        chosen = "plan"
    share = float(layer.keep(x_ND).float().mean())
    return LayerTimes(tokens=len(x_ND), threads=threads_of(x_ND), share=share, ms=ms, chosen=chosen)


def _on_cpu(layer: RoutedExperts, x_ND: Tensor, *, bypass: bool) -> Calls:
    """Calls of the layer with each executor as its choice: what runs after the measurement."""
    names = ["plan", "dense", "grouped"]
    if grouped_mm_works(layer.experts.weights(), x_ND):
        names.append("grouped_mm")
    if len(x_ND) <= FEW_TOKENS:
        names.append("per_token")
    if bypass:
        names.append("all")

    def through(name: str) -> Callable[[], Tensor]:
        known = (Measured(layer.gate, len(x_ND), name, threads_of(x_ND)),)

        def call() -> Tensor:
            layer.measured = known
            y_NO: Tensor = layer(x_ND)
            return y_NO

        return call

    return {name: through(name) for name in names}


def _on_cuda(layer: RoutedExperts, x_ND: Tensor, *, bypass: bool) -> Calls:
    """Executors that a CUDA graph can record; the others wait for the device."""
    weights = layer.experts.weights()

    def routed(name: Any) -> Callable[[], Tensor]:
        return lambda: run(weights, x_ND, layer.keep(x_ND), executor=name)  # compares kernels that run first

    candidates: dict[str, Callable[[], Any]] = {"dense": routed("dense")}
    if triton_works(weights, x_ND):
        candidates["triton"] = routed("triton")
    if bypass:
        candidates["all"] = lambda: run(weights, x_ND, None)
    return candidates


def time_turns(calls: Calls, *, seconds: float = 0.5, least: int = 5, most: int = 200) -> dict[str, float]:
    """Milliseconds of calls that take turns on a CPU: of the processor for one thread, else of wall time.

    Wall time for one thread too if the processor's clock is coarse.

    Of the first call the lower quartile, because other work on the machine only adds time; of the others this times the
    median of their ratios to the first within a turn, because other work slows down a whole turn.

    Args:
        calls: What to measure.
        seconds: Time after which no further turn is begun.
        least: Turns in any case, after one that does not count.
        most: Turns at most.
    """
    # On Windows the processor's clock advances by 15.6 ms: a short call would take none or that much.
    fine = get_clock_info("process_time").resolution < COARSE
    clock = process_time if fine and torch.get_num_threads() == 1 else perf_counter
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end, turn = perf_counter() + seconds, 0
    while turn <= least or (turn <= most and perf_counter() < end):
        for name in list(calls) if turn % 2 else reversed(list(calls)):
            start = clock()
            calls[name]()
            if turn:
                taken[name].append(1e3 * (clock() - start))
        turn += 1
    first = next(iter(taken.values()))
    usual = quantiles(first, n=4)[0]
    return {name: usual * median(a / b for a, b in zip(times, first, strict=True)) for name, times in taken.items()}


def time_graphs(calls: Calls) -> dict[str, float]:
    """Milliseconds of each call as a CUDA graph."""
    return {name: time_graph(call) for name, call in calls.items()}


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
