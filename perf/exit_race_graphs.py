"""Networks with exits for a GPU, and their calls as CUDA graphs that take turns: what exit_race_cuda.py compares."""

from __future__ import annotations

import copy
import functools
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from exit_race import Costs, macs, thresholds_for, timed
from torch import Tensor

from clframe.accounting.macs import stage_macs
from clframe.exits.captured import CapturedNetwork
from clframe.exits.dynamic import DynamicNetwork
from clframe.exits.fusion import fuse_batch_norm
from clframe.exits.head_kinds import make_head
from clframe.exits.placement import at_cost
from clframe.exits.policies import ExitPolicy, max_probability
from clframe.nn import BACKBONES, Network
from clframe.nn.backbones.stages import tap_of

CLASSES = 100
EXITS = (0.125, 0.25, 0.5, 0.75)
MODELS: dict[str, tuple[str, dict[str, int], tuple[int, ...]]] = {
    "vit_b_16": ("vit_b_16", {}, (3, 224, 224)),
    "resnet50": ("resnet50", {}, (3, 224, 224)),
    "resnet32": ("resnet32", {}, (3, 32, 32)),
    "vit_s": ("vit_tiny", {"patch": 16, "width": 384, "depth": 12, "heads": 6}, (3, 224, 224)),
}
CALLS = {1: 32, 32: 4, 256: 1, 1024: 1}
"""Batches of a lap; twice as many take turns, for 1,024 samples two."""
Run = Callable[[Tensor], Any]


@functools.cache
def on_host(model: str, taps: tuple[str, ...] = ()) -> Network:
    """The network with exits, random weights and outputs for all classes; exits by MACs if no taps are given."""
    torch.manual_seed(0)
    name, options, shape = MODELS[model]
    backbone = BACKBONES.get(name)(shape, **options)
    taps = taps or at_cost(stage_macs(Network(backbone)), EXITS).taps
    network = Network(backbone, exits=[(tap, make_head("auto", backbone.tap_shapes[tap])) for tap in taps])
    network.grow(range(CLASSES))
    network.eval().requires_grad_(False)
    return fuse_batch_norm(network, memory_format="channels_last") if model.startswith("resnet") else network


def build(model: str, device: torch.device, taps: tuple[str, ...] = ()) -> Network:
    """A copy of the network on a device."""
    return copy.deepcopy(on_host(model, taps)).to(device)


def bare(network: Network) -> Run:
    def run(x: Tensor) -> Tensor:
        value: Any = x
        for stage in network.backbone.stages:
            value = stage(value)
        scores_NC: Tensor = network.heads[-1](value)
        return scores_NC

    return run


def captured(call: Run, example: Tensor) -> Run:
    """A call as one CUDA graph, its input copied to it."""
    inputs = example.clone()
    for _ in range(3):
        call(inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call(inputs)

    def run(x: Tensor) -> Any:
        inputs.copy_(x)
        graph.replay()
        return found

    return run


def replays(call: Callable[[], Any], *, repeats: int = 7) -> float:
    """Median seconds of a call as a graph."""
    run = captured(lambda _: call(), torch.zeros(1, device="cuda"))
    taken = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run(torch.zeros(1, device="cuda"))
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def stage_times(network: Network, x: Tensor, work: Costs) -> Costs:
    """Seconds a batch of every stage, and of every head with its confidence, each as a graph."""
    value: Any = x
    stages, heads = [], []

    def answer(exit: int, tap: Tensor) -> Any:
        return max_probability(exit, network.heads[exit](tap), ())

    for stage, exits in zip(network.backbone.stages, network.exits_at, strict=True):
        stages.append(replays(functools.partial(stage, value)))
        value = stage(value)
        tap = tap_of(value)
        heads += [replays(functools.partial(answer, exit, tap)) for exit in exits]
    return Costs(tuple(stages), tuple(heads), work.stage_of)


def race(runs: dict[str, Run], batches: Sequence[Tensor], *, calls: int, seconds: float) -> dict[str, float]:
    """Median milliseconds of a batch, in turns; at least three laps, at most 15."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    end = time.monotonic() + seconds
    for lap in range(15):
        some = [batches[(lap * calls + k) % len(batches)] for k in range(calls)]
        for name in runs if lap % 2 else reversed(runs):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for x in some:
                runs[name](x)
            torch.cuda.synchronize()
            taken[name].append(1e3 * (time.perf_counter() - start) / calls)
        if lap >= 2 and time.monotonic() > end:
            break
    return {name: statistics.median(times) for name, times in taken.items()}


def compile_parts(network: Network) -> None:
    for part in (*network.backbone.stages, *network.heads):
        part.compile(dynamic=True)


def placed_by_time(
    model: str, network: Network, times: Costs, batches: Sequence[Tensor], *, compiled: bool = False
) -> Callable[[float, int], tuple[CapturedNetwork, dict[str, Any]] | None] | None:
    """A function that makes the contestant ``timed`` for a budget and a batch size; None if its exits have the same taps."""
    names = network.backbone.names
    taps = at_cost(dict(zip(names, times.stages, strict=True)), EXITS).taps
    if taps == tuple(network.exit_taps[:-1]):
        return None
    own = build(model, torch.device("cuda"), taps)
    if compiled:
        compile_parts(own)
    scores = [own(x).logits for part in batches for x in part.split(256)]
    on_host = [torch.cat(parts).cpu() for parts in zip(*scores, strict=True)]
    work = macs(own)
    seconds = stage_times(own, batches[0][:256], work)

    def make(budget: float, batch: int) -> tuple[CapturedNetwork, dict[str, Any]] | None:
        found = timed(work, seconds, budget)
        if found is None:
            return None
        some, shares = found
        dynamic = DynamicNetwork(own, ExitPolicy(thresholds=thresholds_for(on_host, shares)), exits=some)
        note = {"timed_exits": [taps[exit] for exit in some], "timed_macs": work.of_shares(shares) / work.bare}
        return CapturedNetwork(dynamic, batch=batch), note

    return make


def clean() -> None:
    """Free what is unused. What remains is left out of later collections, of which every recorded graph makes one."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    torch.cuda.empty_cache()
