"""The expert race on a GPU: speed-up of experts over the dense network they were made of, router and lists included.

    python perf/expert_race_cuda.py                                       # 768-3072-768 as 24 x 128, bfloat16
    python perf/expert_race_cuda.py --types float32 bfloat16 --backward --account
    python perf/expert_race_cuda.py --sweep --seconds 120 --json race.json

Before a race each executor's result, and in the first of every type its gradients, are compared with the plain reference.
Every contestant is captured as a CUDA graph, so that launching, which takes longer than small layers do, is left out; times
are of CUDA events around ten replays, in turns, after two that do not count; medians. The gate is dynamic-k with the tau at
which random routers keep the share asked for. Contestants:

- dense, compiled: the dense network as torch runs it, and compiled by ``torch.compile``;
- layer: router, gate and the executor that is chosen for the share counted before; tuned: the one that ``clframe.moe.tuning.tune`` has measured
  to be fastest at this share;
- kernels: router, gate and the Triton kernels; fused, split: these kernels alone, with both layers in one or in two;
- masked: all experts computed and masked, alone;
- grouped: PyTorch's grouped product alone, with a number of rows that is known in advance, as for top-k gates.

``--account``: the time of each part next to the least time that its bytes and FLOPs need at measured bandwidth and rate.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

import torch
from expert_race import SPLITS, WIDTH, build
from torch import Tensor, nn
from torch.nn import functional as F

from clframe.moe import DynamicK, RoutedExperts, count_usage
from clframe.moe.dispatch import EXECUTORS, Name, choose
from clframe.moe.executors import Weights
from clframe.moe.router import NormRouter
from clframe.moe.triton_experts import run_pairs
from clframe.moe.triton_launch import FULL, HALF, Layer, Pairs, Tiles, add_up, list_pairs, run_fused
from clframe.moe.tuning import measure_layer

TOKENS = (1, 197, 1024, 12608, 50432)
SHARES = (0.125, 0.25, 0.5)
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float32: 5e-3, torch.bfloat16: 3e-2}
"""Share of the largest entry by which results may differ: products of float32 run on tensor cores in the kernels."""

Run = Callable[[], Any]
Row = dict[str, Any]


def relative_error(own: Tensor, want: Tensor) -> float:
    """Largest difference as a share of the largest entry."""
    return float((own.float() - want.float()).abs().max() / want.float().abs().max().clamp_min(1e-12))


@torch.no_grad()
def check(layer: RoutedExperts, x_ND: Tensor) -> list[str]:
    """Compare the executors with the reference in float32 on at most 1,024 tokens, which it computes neuron by neuron."""
    x_ND = x_ND[:1024]
    weights, keep_NE = layer.experts.weights(), layer.keep(x_ND)
    exact = copy.deepcopy(layer.experts).float().weights()
    want = EXECUTORS["reference"](exact, x_ND.float(), keep_NE, None)
    errors = {name: relative_error(call(), want) for name, call in executors(weights, x_ND, keep_NE).items()}
    return [f"{name}: {error:.2g}" for name, error in errors.items() if not error < TOLERANCE[x_ND.dtype]]


def check_gradients(layer: RoutedExperts, x_ND: Tensor) -> list[str]:
    """Compare gradients of input and weights through the kernels with those through the reference in float32."""
    keep_NE, exact = layer.keep(x_ND), copy.deepcopy(layer).float()
    found = []
    compared: tuple[tuple[Name, RoutedExperts], ...] = (("triton", layer), ("reference", exact))
    for name, own in compared:
        x = x_ND.to(own.experts.up.dtype).clone().requires_grad_()
        y_NO = EXECUTORS[name](own.experts.weights(), x, keep_NE, None)
        found.append(torch.autograd.grad(y_NO.float().square().sum(), [x, *own.experts.parameters()]))
    names = ["x", *(name for name, _ in layer.experts.named_parameters())]
    errors = {name: relative_error(own, want) for name, own, want in zip(names, *found, strict=True)}
    return [f"gradient of {n}: {error:.2g}" for n, error in errors.items() if not error < TOLERANCE[x_ND.dtype]]


def tau_for(layer: RoutedExperts, x_ND: Tensor, share: float) -> float:
    """The tau at which a share of the (token, expert) pairs is kept, by bisection."""
    scores_NE = layer.router(x_ND).float()
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        kept = float(DynamicK(tau=middle)(scores_NE).float().mean())
        low, high = (middle, high) if kept < share else (low, middle)
    return high


def capture(call: Run) -> torch.cuda.CUDAGraph:
    """Record a call as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def race(runs: dict[str, Run], *, repeats: int) -> dict[str, float]:
    """Median milliseconds of each."""
    graphs = {name: capture(call) for name, call in runs.items()}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for lap in range(repeats + 2):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(10):
                graph.replay()
            end.record()
            torch.cuda.synchronize()
            if lap >= 2:
                taken[name].append(start.elapsed_time(end) / 10)
    return {name: median(times) for name, times in taken.items()}


def grouped_rows(weights: Weights, x_ND: Tensor, pairs: Pairs, rows: int) -> Tensor:
    """Experts by PyTorch's grouped product over a known number of rows."""
    product = getattr(F, "grouped_mm", None) or torch._grouped_mm
    token_P = pairs.token_P[:rows]
    x_PD = x_ND.index_select(0, token_P)
    up_PH = product(x_PD, weights.up_EHD.transpose(1, 2), offs=pairs.end_E)
    assert weights.up_bias_EH is not None and weights.gate_EHD is None
    expert_P = torch.searchsorted(pairs.end_E, torch.arange(rows, device=x_ND.device, dtype=torch.int32), right=True)
    hidden_PH = weights.activation(up_PH.add_(weights.up_bias_EH.index_select(0, expert_P)))
    return add_up(product(hidden_PH, weights.down_EHO, offs=pairs.end_E), pairs, weights.bias_O)


def executors(weights: Weights, x_ND: Tensor, keep_NE: Tensor) -> dict[str, Run]:
    """Executors alone, after routing."""
    rows = int(keep_NE.sum())
    runs: dict[str, Run] = {
        "masked": lambda: EXECUTORS["dense"](weights, x_ND, keep_NE, None),
        "fused": lambda: run_pairs(weights, x_ND, keep_NE, fused=True),
        "split": lambda: run_pairs(weights, x_ND, keep_NE, fused=False),
    }
    if x_ND.dtype is torch.bfloat16:
        runs["grouped"] = lambda: grouped_rows(weights, x_ND, list_pairs(keep_NE), rows)
    return runs


@torch.no_grad()
def row_of(
    dense: nn.Module, compiled: Callable[[Tensor], Any] | None, layer: RoutedExperts, x_ND: Tensor, *, share: float,
    repeats: int,
) -> Row:  # fmt: skip
    """Times of all contestants."""
    layer.gate = DynamicK(tau=tau_for(layer, x_ND, share))
    wrong = check(layer, x_ND)
    with count_usage(layer) as usage:  # as a calibration does: the choice expects this share
        layer(x_ND)
        usage()
    weights, keep_NE = layer.experts.weights(), layer.keep(x_ND)
    runs: dict[str, Run] = {"dense": lambda: dense(x_ND)}
    if compiled is not None:
        runs["compiled"] = lambda: compiled(x_ND)
    runs |= {
        "layer": lambda: layer(x_ND), "router": lambda: layer.keep(x_ND),
        "kernels": lambda: run_pairs(weights, x_ND, layer.keep(x_ND)),
    }  # fmt: skip
    taken = race({**runs, **executors(weights, x_ND, keep_NE)}, repeats=repeats)
    tuned = measure_layer(layer, x_ND, bypass=False)
    taken["tuned"] = tuned.ms[tuned.chosen]
    macs, kept = layer.macs(), float(keep_NE.float().mean())
    return {
        "experts": f"{macs.experts}x{layer.experts.expert_size}", "type": str(x_ND.dtype).removeprefix("torch."),
        "tokens": len(x_ND), "share": kept, "promised": macs.dense / (kept * macs.experts * macs.expert + macs.router),
        "chosen": choose(weights, x_ND, keep_NE, share=kept).name, "tuned": tuned.chosen, "ms": taken, "wrong": wrong,
    }  # fmt: skip


def line(row: Row) -> str:
    """A line of the table: the time of the dense network, and how many times as fast the others are."""
    ms = row["ms"]
    dense = ms["dense"]
    ratios = " | ".join(f"{dense / ms[name]:.2f}" if name in ms else "-" for name in COLUMNS)
    wrong = f" wrong: {'; '.join(row['wrong'])}" if row["wrong"] else ""
    return (
        f"| {row['experts']} | {row['type']} | {row['tokens']:,} | {row['share']:.1%} | {dense:.4f} | {row['promised']:.2f} "
        f"| {row['chosen']} | {row['tuned']} | {ratios} |{wrong}"
    )


COLUMNS = ("compiled", "layer", "tuned", "kernels", "router", "masked", "fused", "split", "grouped")
HEAD = f"| experts | type | tokens | run | dense ms | MACs | chosen | tuned | {' | '.join(COLUMNS)} |\n|{'---|' * (8 + len(COLUMNS))}"


def backward_row(dense: nn.Module, layer: RoutedExperts, x_ND: Tensor, *, share: float, repeats: int) -> Row:
    """Times of forward and backward, gradients of input and all weights of the experts included."""
    layer.gate = DynamicK(tau=tau_for(layer, x_ND, share))
    x = x_ND.clone().requires_grad_()
    g = torch.randn_like(x_ND)

    def experts() -> Any:
        y = EXECUTORS["triton"](layer.experts.weights(), x, layer.keep(x_ND), None)
        return torch.autograd.grad(y, [x, *layer.experts.parameters()], g)

    runs: dict[str, Run] = {
        "dense": lambda: torch.autograd.grad(dense(x), [x, *dense.parameters()], g), "kernels": experts
    }  # fmt: skip
    kept = float(layer.keep(x_ND).float().mean())
    return {
        "backward": True, "type": str(x_ND.dtype).removeprefix("torch."), "tokens": len(x_ND), "share": kept,
        "ms": race(runs, repeats=repeats),
    }  # fmt: skip


@torch.no_grad()
def account(layer: RoutedExperts, x_ND: Tensor, *, share: float, repeats: int) -> list[Row]:
    """Each part's time, and the least time for its bytes and FLOPs."""
    layer.gate = DynamicK(tau=tau_for(layer, x_ND, share))
    assert isinstance(layer.router, NormRouter)
    weights, keep_NE = layer.experts.weights(), layer.keep(x_ND)
    pairs, own = list_pairs(keep_NE), Layer.of(weights, 0)
    y_PO = run_fused(own, x_ND, pairs, None)
    big, square = torch.empty(2**28, device="cuda"), torch.randn(8192, 8192, device="cuda", dtype=x_ND.dtype)
    copy = torch.empty_like(big)
    taken = race(
        {
            "copy": lambda: copy.copy_(big), "square": lambda: square @ square, "router": lambda: layer.keep(x_ND),
            "lists": lambda: list_pairs(keep_NE), "products": lambda: run_fused(own, x_ND, pairs, None),
            "sum": lambda: add_up(y_PO, pairs, weights.bias_O),
        },
        repeats=repeats,
    )  # fmt: skip
    bandwidth, rate = 2 * big.numel() * 4 / taken["copy"], 2 * 8192**3 / taken["square"]
    tokens, size = len(x_ND), x_ND.element_size()
    experts, neurons, width, outputs = own.sizes
    rows, hidden = int(keep_NE.sum()), len(layer.router.hidden)
    parts = {
        "router": (tokens * (width * size + experts), 2 * tokens * hidden * (width + experts)),
        "lists": (tokens * experts * 6 + rows * 4, 0),
        "products": (tokens * width * size + rows * outputs * size, 2 * rows * neurons * (width + outputs)),
        "sum": (rows * outputs * size + tokens * (experts * 4 + outputs * size), 0),
    }
    return [
        {
            "part": part, "type": str(x_ND.dtype).removeprefix("torch."), "tokens": tokens, "share": share, "bytes": moved,
            "flops": flops, "least_ms": max(moved / bandwidth, flops / rate), "ms": taken[part],
            "bandwidth_GB_s": bandwidth / 1e6, "rate_TFLOP_s": rate / 1e9,
        }
        for part, (moved, flops) in parts.items()
    ]  # fmt: skip


SWEEP = {
    torch.bfloat16: [
        Tiles(128, 128, 64, 8, 3), Tiles(128, 128, 64, 8, 4), Tiles(128, 128, 64, 4, 3), Tiles(128, 128, 32, 8, 4),
        Tiles(128, 256, 64, 8, 3), Tiles(128, 64, 64, 8, 3), Tiles(64, 128, 64, 4, 3), Tiles(64, 128, 64, 4, 4),
        Tiles(64, 64, 64, 4, 4), Tiles(64, 128, 128, 4, 2), Tiles(128, 128, 128, 8, 2), Tiles(256, 128, 64, 8, 3),
        Tiles(128, 64, 64, 4, 3), Tiles(128, 32, 64, 8, 3), Tiles(128, 64, 64, 8, 2), Tiles(128, 64, 32, 8, 3),
    ],
    torch.float32: [
        Tiles(64, 64, 32, 4, 3), Tiles(64, 64, 32, 8, 3), Tiles(128, 64, 32, 8, 3), Tiles(64, 128, 32, 4, 2),
        Tiles(32, 64, 32, 4, 3),
    ],
}  # fmt: skip


@torch.no_grad()
def sweep(layer: RoutedExperts, x_ND: Tensor, *, share: float, repeats: int, only: list[int] | None) -> Iterator[Row]:
    """Times of the kernels with other tiles; those that do not fit the device are left out."""
    layer.gate = DynamicK(tau=tau_for(layer, x_ND, share))
    weights, keep_NE = layer.experts.weights(), layer.keep(x_ND)
    for number, tile in enumerate(SWEEP[x_ND.dtype]):
        if only is not None and number not in only:
            continue
        row: Row = {"tile": tile, "type": str(x_ND.dtype).removeprefix("torch."), "tokens": len(x_ND), "share": share}
        for fused in (True, False):
            try:
                call = partial(run_pairs, weights, x_ND, keep_NE, fused=fused, tile=tile)
                ms = race({"it": call}, repeats=repeats)
            except Exception as error:  # too much shared memory, or too many registers: names differ between versions
                row["fused" if fused else "split"] = type(error).__name__
                continue
            row["fused" if fused else "split"] = ms["it"]
        yield row


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=sorted(SPLITS), default="24x128")
    parser.add_argument("--types", nargs="*", choices=TYPES, default=["bfloat16"])
    parser.add_argument("--tokens", type=int, nargs="*", default=list(TOKENS))
    parser.add_argument("--shares", type=float, nargs="*", default=list(SHARES))
    parser.add_argument("--tf32", action="store_true", help="TensorFloat32 for the products of float32")
    parser.add_argument("--backward", action="store_true", help="forward and backward, too")
    parser.add_argument("--account", action="store_true", help="each part's time next to its bytes and FLOPs")
    parser.add_argument("--sweep", action="store_true", help="the kernels with other tiles")
    parser.add_argument("--tiles", type=int, nargs="*", help="only a sweep of these tiles, to compile them in advance")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile of the dense network")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=600, help="start nothing new after this time")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    return parser.parse_args()


def results(options: argparse.Namespace, until: float) -> Iterator[Row]:
    """Rows of all tables, printed as they are measured."""
    many = [tokens for tokens in options.tokens if tokens >= 1024][:1]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n\n{HEAD}", flush=True)
    for name in options.types:
        dense, layer = build(SPLITS[options.split])
        # Values that are exact in every type: rounding of inputs would change signs, and with them gradients of ReLU.
        dense.bfloat16().to("cuda", TYPES[name])
        layer.bfloat16().to("cuda", TYPES[name])
        layer.gate = DynamicK(tau=0.4)
        if options.tiles is None:
            wrong = check_gradients(layer, torch.randn(333, WIDTH, device="cuda").bfloat16().to(TYPES[name]))
            yield {"gradients": name, "wrong": wrong}
        torch._dynamo.reset()  # a limit on the number of shapes of one function would end compilation
        compiled = None if options.no_compile else torch.compile(dense, dynamic=False)
        batches = {tokens: torch.randn(tokens, WIDTH, device="cuda", dtype=TYPES[name]) for tokens in options.tokens}
        for tokens in sorted(batches, key=lambda n: (n != 12608, n)):  # the most important first
            for share in options.shares if options.tiles is None else ():
                if monotonic() < until:
                    row = row_of(dense, compiled, layer, batches[tokens], share=share, repeats=options.repeats)
                    print(line(row), flush=True)
                    yield row
        for tokens in [n for n in batches if n >= 12608] or many:
            for share in options.shares:
                if options.backward and monotonic() < until:
                    row = backward_row(dense, layer, batches[tokens], share=share, repeats=options.repeats)
                    print(json.dumps(row), flush=True)
                    yield row
                if options.account and monotonic() < until:
                    for row in account(layer, batches[tokens], share=share, repeats=options.repeats):
                        print(json.dumps(row), flush=True)
                        yield row
            if options.sweep or options.tiles is not None:
                for row in sweep(layer, batches[tokens], share=0.25, repeats=3, only=options.tiles):
                    print(json.dumps(row), flush=True)
                    yield row
                    if monotonic() > until:
                        break


def main() -> None:
    """Print the tables and write the JSON."""
    options, start = arguments(), monotonic()
    torch.manual_seed(0)
    if options.tf32:
        torch.set_float32_matmul_precision("high")
    rows = []
    try:
        for row in results(options, start + options.seconds):
            rows.append(row)
    finally:
        if options.json is not None:
            tiles = {"half": HALF, "full": FULL}
            content = {"torch": torch.__version__, "device": torch.cuda.get_device_name(), "tiles": tiles, "rows": rows}
            options.json.write_text(json.dumps(content, indent=1) + "\n")
    wrong = [row for row in rows if row.get("wrong")]
    if wrong:
        print("wrong results:", *wrong, sep="\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
