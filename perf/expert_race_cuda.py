"""The expert race on a GPU: speed-up of experts over the dense network they were made of, router and sorting included.

    python perf/expert_race_cuda.py                            # 768-3072-768 as 24 x 128, float32 and bfloat16
    python perf/expert_race_cuda.py --split 96x32 --types bfloat16

Before every race each executor's answer, and in float32 its gradients, are compared with the plain reference. Every
contestant is captured as a CUDA graph, so that launching, which takes longer than small layers do, is left out; times are
of CUDA events around ten replays, in turns, after some that do not count; medians. The gate is dynamic-k with the tau
at which random routers keep the fraction asked for.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import torch
from expert_race import SPLITS, WIDTH, build
from torch import Tensor, nn

from clframe.moe import DynamicK, RoutedExperts
from clframe.moe.dispatch import EXECUTORS, choose

TOKENS = (197, 1576, 12608, 50432)
FRACTIONS = (0.125, 0.25, 0.5)
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 6e-2}
"""Share of the largest entry by which answers may differ: products of float32 run on tensor cores in the kernels."""


NAMES = ("dense", "triton")
"""Executors that do not wait for the device, and so can be captured; a grouped product has to know how many pairs there are."""


def check(layer: RoutedExperts, x_ND: Tensor) -> dict[str, float]:
    """The largest difference of each executor from the reference, as a share of the largest entry."""
    weights, keep_NE = layer.experts.weights(), layer.keep(x_ND)
    want = EXECUTORS["reference"](weights, x_ND, keep_NE, None)
    found = {}
    for name in NAMES:
        own = EXECUTORS[name](weights, x_ND, keep_NE, None)
        found[name] = float((own - want).abs().max() / want.abs().max())
        assert found[name] < TOLERANCE[x_ND.dtype], (name, found[name])
    return found


def check_gradients(layer: RoutedExperts, x_ND: Tensor) -> None:
    """Gradients of input and weights through the kernels are those through the reference."""
    keep_NE = layer.keep(x_ND)
    found = []
    for name in ("reference", "triton"):
        x = x_ND.clone().requires_grad_()
        weights = layer.experts.weights()
        y_NO = EXECUTORS[name](weights, x, keep_NE, None)
        leaves = [x, *(p for p in layer.experts.parameters() if p.requires_grad)]
        found.append(torch.autograd.grad(y_NO.square().sum(), leaves))
    for own, want in zip(found[1], found[0], strict=True):
        assert float((own - want).abs().max() / want.abs().max()) < 5e-3


def tau_for(layer: RoutedExperts, x_ND: Tensor, fraction: float) -> float:
    """The tau at which a fraction of the (token, expert) pairs is kept, by halving."""
    scores_NE = layer.router(x_ND)
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        kept = float(DynamicK(tau=middle)(scores_NE).float().mean())
        low, high = (middle, high) if kept < fraction else (low, middle)
    return high


def race(runs: dict[str, Callable[[], Tensor]], *, repeats: int) -> dict[str, float]:
    """Median milliseconds of each."""
    graphs = {name: _captured(call) for name, call in runs.items()}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for lap in range(repeats + 3):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(10):
                graph.replay()
            end.record()
            torch.cuda.synchronize()
            if lap >= 3:
                taken[name].append(start.elapsed_time(end) / 10)
    return {name: median(times) for name, times in taken.items()}


def _captured(call: Callable[[], Tensor]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


@torch.no_grad()
def row(dense: nn.Module, layer: RoutedExperts, *, tokens: int, fraction: float, kind: torch.dtype, repeats: int) -> str:
    """A line of the table."""
    x_ND = torch.randn(tokens, WIDTH, device="cuda", dtype=kind)
    layer.gate = DynamicK(tau=tau_for(layer, x_ND, fraction))
    check(layer, x_ND)
    weights, keep_NE = layer.experts.weights(), layer.keep(x_ND)
    runs: dict[str, Callable[[], Tensor]] = {
        "all": lambda: dense(x_ND), "layer": lambda: layer(x_ND), "router": lambda: layer.keep(x_ND)
    }  # fmt: skip
    for name in NAMES:
        runs[f"only {name}"] = lambda f=EXECUTORS[name]: f(weights, x_ND, keep_NE, None)
    taken = race(runs, repeats=repeats)
    macs = layer.macs()
    kept = float(keep_NE.float().mean()) * macs.experts
    promised = macs.dense / (kept * macs.expert + macs.router)
    alone = ", ".join(f"{n.split()[1]} {taken['all'] / t:.2f}" for n, t in taken.items() if n.startswith("only"))
    chosen = choose(weights, x_ND, keep_NE).name
    return (
        f"| {macs.experts}x{layer.experts.expert_size} | {str(kind).removeprefix('torch.')} | {tokens:,} | {kept / macs.experts:.1%} "
        f"| {taken['all']:.3f} | {taken['all'] / taken['layer']:.2f} | {promised:.2f} | {chosen} "
        f"| {taken['router'] / taken['all']:.0%} | {alone} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", nargs="+", choices=SPLITS, default=["24x128"])
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("expert_race_cuda: found no CUDA device; perf/expert_race.py is the race on CPUs")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print("| experts | type | tokens | run | dense ms | speed-up | promised by MACs | executor | router | executors alone |")
    print("|---|---|---:|---:|---:|---:|---:|---|---:|---|")
    for split in options.split:
        for kind in (TYPES[name] for name in options.types):
            dense, layer = (part.to("cuda", kind) for part in build(SPLITS[split]))
            if kind is torch.float32:
                layer.gate = DynamicK(tau=0.5)
                check_gradients(layer, torch.randn(333, WIDTH, device="cuda"))
            for tokens in options.tokens:
                for fraction in FRACTIONS:
                    print(row(dense, layer, tokens=tokens, fraction=fraction, kind=kind, repeats=options.repeats), flush=True)


if __name__ == "__main__":
    main()
