"""The expert race: wall-clock speed-up of experts over the dense network they were made of, router included.

    python perf/expert_race.py                   # 768-3072-768 as 24 x 128, 96 x 32 and 512 x 6, 1 and 2 threads
    python perf/expert_race.py --split 24x128 --threads 1 --tokens 197
    python perf/expert_race.py --executors       # every executor by itself, too
    python perf/expert_race.py --parts           # where the time of running expert by expert goes, as shares of dense
    python perf/expert_race.py --tune            # executors chosen by clframe.moe.tune before each row
    python perf/expert_race.py --quick           # fewer repetitions, wider spread

Weights and tokens are random but fixed. The dense network is ``Linear, ReLU, Linear`` as torch runs it; the experts are
what ``clframe.moe.to_experts`` makes of it: router, gate, the executor that the plan chooses. Routing is random: the
router's scores of random tokens under a top-k gate, so that exactly the fraction asked for runs, and other tokens come in
every turn (of a set of 16), so that no expert's weights stay in the cache for want of others. All take turns within a
repetition; ratios are taken within it, their median is reported with the middle half. With more than one thread on a busy
machine most repetitions are disturbed: ``--fastest`` takes ratios of the tenths of both that were fastest.

- speed-up: time of the dense network over time of router, gate and experts;
- of MACs: the speed-up as a share of what MACs promise, router included;
- router: its time with the gate's, as a share of the dense network's.

``100 %`` keeps everything through the router: what experts cost where nothing is saved.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from time import perf_counter, process_time
from typing import Any

if "MALLOC_TOP_PAD_" not in os.environ:
    # Large blocks would go back to the system after every layer, and page faults take as long as a layer. All
    # contestants keep theirs. Read when a process starts.
    keep = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
    os.environ.update(keep, MALLOC_TOP_PAD_=str(1 << 28))
    os.execv(sys.executable, [sys.executable, *sys.argv])

import torch
from torch import Tensor, nn

from clframe.moe import RoutedExperts, TopK, to_experts, tune
from clframe.moe.dispatch import EXECUTORS, Name
from clframe.moe.executors import Executor, Weights, grouped_mm_works
from clframe.moe.routing import pairs_by_expert

WIDTH, HIDDEN = 768, 3072
SPLITS = {"24x128": 24, "96x32": 96, "512x6": 512}
TOKENS = (1, 16, 197, 1576)
FRACTIONS = (0.125, 0.25, 0.5, 0.75, 1.0)
REPEATS = {1: 200, 16: 80, 197: 20, 1576: 6}
BATCHES = 16
TARGETS = {(1, 0.25): 2.5, (197, 0.25): 2.2}
"""Of 24 x 128 on one thread."""

Run = Callable[[Tensor], Any]


def clock() -> float:
    """Seconds: of the processor for one thread, whoever else runs; of the clock on the wall for more."""
    return process_time() if torch.get_num_threads() == 1 else perf_counter()


def build(experts: int) -> tuple[nn.Module, RoutedExperts]:
    """A dense network and the experts made of it."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))
    model = nn.Sequential(nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH)))
    model[0].load_state_dict(dense.state_dict())
    (layer,) = to_experts(model, experts=experts, split="random").values()
    return dense.eval(), layer.eval()


def check(dense: nn.Module, layer: RoutedExperts, x: Tensor) -> None:
    """No race unless all experts are the dense network and the choice of executor changes nothing."""
    torch.testing.assert_close(layer.experts(x), dense(x), rtol=1e-4, atol=1e-5)
    keep = layer.keep(x)
    torch.testing.assert_close(
        layer(x), EXECUTORS["reference"](layer.experts.weights(), x, keep, None), rtol=1e-4, atol=1e-5
    )


def race(runs: dict[str, Run], batches: list[Tensor], *, repeats: int) -> dict[str, list[float]]:
    """Seconds of everybody in every repetition, in turns; two laps before do not count."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    gc.collect()
    gc.disable()
    try:
        for lap in range(repeats + 2):
            x = batches[lap % len(batches)]
            for name in list(runs) if lap % 2 else reversed(runs):
                start = clock()
                runs[name](x)
                if lap > 1:
                    taken[name].append(clock() - start)
    finally:
        gc.enable()
    return taken


def ratio(over: list[float], under: list[float], *, fastest: bool) -> dict[str, float]:
    if fastest:
        over, under = (sorted(times)[: max(2, len(times) // 10)] for times in (over, under))
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    low, _, high = quantiles(ratios, n=4)
    return {"median": median(ratios), "low": low, "high": high}


def parts_of(weights: Weights, batches: list[Tensor], kept: dict[int, Tensor]) -> dict[str, Run]:
    """The parts of ``grouped``, each for all experts: lists of pairs, gather, both products, adding back."""
    views, outputs = weights.per_expert(), weights.down_EHO.shape[2]
    assert views.up_biases is not None
    made = {}
    for x in batches:
        token_P, counts = pairs_by_expert(kept[id(x)])[1], kept[id(x)].sum(0).tolist()
        hidden_PH, y_PO = torch.randn(len(token_P), weights.up_EHD.shape[1]), torch.randn(len(token_P), outputs)
        made[id(x)] = [part.split(counts) for part in (token_P, x[token_P], hidden_PH, y_PO)]

    def lists(x: Tensor) -> None:
        pairs_by_expert(kept[id(x)])
        kept[id(x)].sum(0).tolist()

    def gather(x: Tensor) -> None:
        for token in made[id(x)][0]:
            x.index_select(0, token)

    def up(x: Tensor) -> None:
        for own, weight, bias in zip(made[id(x)][1], views.ups, views.up_biases or (), strict=True):
            weights.activation(nn.functional.linear(own, weight, bias))

    def down(x: Tensor) -> None:
        for own, weight in zip(made[id(x)][2], views.downs, strict=True):
            own @ weight.t()

    def add(x: Tensor) -> None:
        y = weights.initial_output(x)
        for token, own in zip(made[id(x)][0], made[id(x)][3], strict=True):
            y.index_add_(0, token, own)

    return {f"only {run.__name__}": run for run in (lists, gather, up, down, add)}


def row_of(
    dense: nn.Module, layer: RoutedExperts, *, tokens: int, fraction: float, repeats: int, options: argparse.Namespace
) -> dict[str, Any]:
    layer.gate, layer.measured = TopK(k=round(fraction * layer.experts.experts)), ()
    batches = [torch.randn(tokens, WIDTH) for _ in range(BATCHES if tokens <= 197 else 4)]
    if options.tune:
        tune(layer, batches[-1])
    check(dense, layer, batches[0])
    runs: dict[str, Run] = {"dense": dense, "experts": layer, "router": layer.keep}
    weights, kept = layer.experts.weights(), {id(x): layer.keep(x) for x in batches}
    if options.parts:
        runs |= parts_of(weights, batches, kept)
    if options.executors:

        def only(execute: Executor, x: Tensor) -> Tensor:
            return execute(weights, x, kept[id(x)], None)

        names: list[Name] = ["dense", "grouped"]
        names += ["grouped_mm"] if grouped_mm_works(weights, batches[0]) else []
        names += ["per_token"] if tokens <= 16 else []
        for name in names:
            runs[f"only {name}"] = partial(only, EXECUTORS[name])
    taken = race(runs, batches, repeats=repeats)
    macs = layer.macs()
    promised = macs.dense / (layer.gate.k * macs.expert + macs.router)
    speed = ratio(taken["dense"], taken["experts"], fastest=options.fastest)
    return {
        "experts": f"{macs.experts}x{layer.experts.expert_size}",
        "threads": torch.get_num_threads(),
        "tokens": tokens,
        "fraction": fraction,
        "dense_us": 1e6 * median(taken["dense"]),
        "speed_up": speed,
        "of_macs": speed["median"] / promised,
        "router": ratio(taken["router"], taken["dense"], fastest=options.fastest)["median"],
        "only": {
            n.split()[1]: ratio(*((t, taken["dense"]) if options.parts else (taken["dense"], t)), fastest=options.fastest)["median"]
            for n, t in taken.items()
            if n.startswith("only")
        },
        "tuned": layer.measured[0].executor if layer.measured else None,
    }


def line(row: dict[str, Any]) -> str:
    speed = row["speed_up"]
    only = ", ".join(f"{name} {value:.2f}" for name, value in row["only"].items())
    cells = [
        row["experts"], str(row["threads"]), str(row["tokens"]), f"{row['fraction']:.1%}", f"{row['dense_us']:.0f}",
        f"{speed['median']:.2f} ({speed['low']:.2f}-{speed['high']:.2f})", f"{row['of_macs']:.0%}",
        f"{row['router']:.1%}", only or row["tuned"] or "-",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


HEAD = """| experts | threads | tokens | run | dense µs | speed-up (middle half) | of MACs | router | executors alone |
|---|---:|---:|---:|---:|---:|---:|---:|---|"""


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """The targets, and whether anything is slower than dense by more than its router (5 % granted for noise)."""
    found = []
    for row in rows:
        target = TARGETS.get((row["tokens"], row["fraction"]))
        if target and row["experts"] == "24x128" and row["threads"] == 1:
            reached = row["speed_up"]["median"]
            found.append(f"{row['tokens']} tokens at {row['fraction']:.0%}: {reached:.2f}x of {target}x")
        if 1 / row["speed_up"]["median"] > 1.05 + row["router"]:
            where = f"{row['experts']}, {row['threads']} threads, {row['tokens']} tokens, {row['fraction']:.1%}"
            found.append(f"slower than dense and router: {where}: {1 / row['speed_up']['median']:.2f} of its time")
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--split", choices=sorted(SPLITS), help="only this one")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--tokens", type=int, nargs="*", default=list(TOKENS))
    parser.add_argument("--fractions", type=float, nargs="*", default=list(FRACTIONS))
    parser.add_argument("--executors", action="store_true", help="every executor by itself, too, without router")
    parser.add_argument("--parts", action="store_true", help="parts of running expert by expert, as shares of the dense time")
    parser.add_argument("--tune", action="store_true", help="choose executors by measurement first; the last column names them")
    parser.add_argument("--fastest", action="store_true", help="ratios of the fastest tenths, for a busy machine")
    parser.add_argument("--repeats", type=float, default=1, help="times as many repetitions")
    parser.add_argument("--quick", action="store_true", help="a quarter of the repetitions")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args()
    if options.parts and options.executors:
        parser.error("--parts: found --executors too, whose column has speed-ups; give one of them")
    return options


@torch.no_grad()
def main() -> None:
    options = arguments()
    print(f"torch {torch.__version__}, {platform.processor() or platform.machine()}, float32\n\n{HEAD}", flush=True)
    rows = []
    for split in [options.split] if options.split else SPLITS:
        dense, layer = build(SPLITS[split])
        for threads in options.threads:
            torch.set_num_threads(threads)
            for tokens in options.tokens:
                repeats = int(REPEATS.get(tokens, 20) * options.repeats) // (4 if options.quick else 1)
                for fraction in options.fractions:
                    row = row_of(
                        dense, layer, tokens=tokens, fraction=fraction, repeats=max(repeats, 4), options=options
                    )
                    rows.append(row)
                    print(line(row), flush=True)
    print("", *verdicts(rows), sep="\n")
    if options.json is not None:
        options.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
