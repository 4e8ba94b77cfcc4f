"""The exit race: wall-clock speed-up of dynamic inference over the bare backbone, beside what MACs promise.

    python perf/exit_race.py                     # ResNet32 with 6 heads and a small ViT with 5, 1 and 2 threads
    python perf/exit_race.py --model resnet32 --threads 1 --batch 256
    python perf/exit_race.py --quick             # fewer repetitions, wider spread
    python perf/exit_race.py --model mlp --batch 1 --choices chosen timed --samples 16      # a minute on a busy machine

Weights and inputs are random but fixed. Budgets are met as in MSDNet: exit k answers a share of the samples
proportional to q^k, with q such that the samples' mean MACs, heads included, are the budget; thresholds are
quantiles of the real confidences. Everybody runs the same network, batch normalization folded, channels
last (``--compile``: stages and heads compiled as well), on the same samples, and takes turns in every
repetition. Ratios are taken within a repetition, their median is reported:

- speed-up: time of the bare backbone over time of ``DynamicNetwork``;
- of MACs: the speed-up as a share of what the saving in MACs promises;
- of stages: as a share of the speed-up of a runner that knows beforehand who leaves where: it runs every stage on
  the right number of samples, and no head but the last, no measure of confidence, no moving of samples;
- of stages and heads: as before, but it runs the heads that are asked, too.

Choices of exits: ``all``; ``chosen``, those whose plan the measured times of stages and heads expect to be fastest
within the budget; ``timed``, those whose plan is expected to take the budget as a share of the backbone's time, with the
most MACs; and for samples that do not leave, ``affordable``, as many as cost 10 % of the
backbone's time at most.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

if "MALLOC_TOP_PAD_" not in os.environ:
    # Large blocks would go back to the system after every stage, and page faults take as long as a stage. All
    # contestants keep theirs. Read when a process starts.
    keep = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 33)}
    os.environ.update(keep, MALLOC_TOP_PAD_=str(1 << 28))
    os.execv(sys.executable, [sys.executable, *sys.argv])

import torch
from torch import Tensor

from clframe.accounting.macs import stage_macs
from clframe.exits.dynamic import DynamicNetwork
from clframe.exits.fusion import fuse_batch_norm
from clframe.exits.head_kinds import make_head
from clframe.exits.placement import every_nth_tap, published_placement
from clframe.exits.policies import ExitPolicy, max_probability
from clframe.nn import Backbone, Network
from clframe.nn.backbones import mlp, resnet32, vit_tiny
from clframe.nn.backbones.stages import tap_of

CLASSES = 100
MODELS: dict[str, Callable[[tuple[int, int, int]], Backbone]] = {
    "resnet32": resnet32, "vit_tiny": vit_tiny, "mlp": partial(mlp, width=1024, depth=8),
}  # fmt: skip
SAMPLES = {1: 64, 32: 128, 256: 256}
"""Samples of a repetition, by batch size."""
BUDGETS = (0.25, 0.5, 0.75)
CHOICES = ("all", "chosen", "timed", "affordable")
OVERHEAD = 0.1
"""What exits may cost a sample that does not leave at batch 1, in bare backbones."""


def build(model: str, *, compiled: bool) -> Network:
    torch.manual_seed(0)
    backbone = MODELS[model]((3, 32, 32))
    taps = (published_placement(backbone.names) if model == "resnet32" else every_nth_tap(backbone, 1)).taps
    unwanted = ("embed", "encoder.5", "stem", "pool", "cls")  # before or after all blocks
    taps = tuple(tap for tap in taps if tap not in unwanted)
    network = Network(backbone, exits=[(tap, make_head("auto", backbone.tap_shapes[tap])) for tap in taps])
    network.grow(range(CLASSES))
    network = fuse_batch_norm(network, memory_format="channels_last")
    if compiled:
        for part in (*network.backbone.stages, *network.heads):
            part.compile(dynamic=True)
    return network


Run = Callable[[], Any]


def clock() -> float:
    """Seconds: of the processor for one thread, whoever else runs; of the clock on the wall for more."""
    return process_time() if torch.get_num_threads() == 1 else perf_counter()


@dataclass(frozen=True)
class Costs:
    """What stages and heads cost, in any unit."""

    stages: tuple[float, ...]
    heads: tuple[float, ...]
    stage_of: tuple[int, ...]
    """The stage that each exit is on."""

    @property
    def bare(self) -> float:
        return sum(self.stages) + self.heads[-1]

    def of_exit(self, exit: int, enabled: Sequence[int]) -> float:
        """Cost of a sample that leaves at an exit, heads that it was asked at included."""
        heads = sum(self.heads[e] for e in enabled if e < exit) + self.heads[exit]
        return sum(self.stages[: self.stage_of[exit] + 1]) + heads

    def of_shares(self, shares: dict[int, float]) -> float:
        return sum(share * self.of_exit(exit, list(shares)) for exit, share in shares.items())


def macs(network: Network) -> Costs:
    counts = stage_macs(network)
    heads = tuple(float(counts[f"exit/{name}"]) for name in network.exit_names)
    stage_of = network.exit_stages
    return Costs(tuple(float(counts[name]) for name in network.backbone.names), heads, stage_of)


def seconds(network: Network, x: Tensor, *, repeats: int) -> Costs:
    """Seconds a batch, heads with their measure of confidence; all parts take turns."""
    stages: list[list[float]] = [[] for _ in network.backbone.stages]
    heads: list[list[float]] = [[] for _ in network.heads]
    for lap in range(repeats + 1):
        value: Any = x
        for i, (stage, exits) in enumerate(zip(network.backbone.stages, network.exits_at, strict=True)):
            start = clock()
            value = stage(value)
            took = clock() - start
            if lap:
                stages[i].append(took)
            for exit in exits:
                start = clock()
                confidence_B, _ = max_probability(exit, network.heads[exit](tap_of(value)), ())
                (confidence_B >= 2.0).logical_not().nonzero()
                took = clock() - start
                if lap:
                    heads[exit].append(took)
    return Costs(tuple(map(median, stages)), tuple(map(median, heads)), macs(network).stage_of)


def shares_for(costs: Costs, enabled: Sequence[int], budget: float) -> dict[int, float] | None:
    """The share that each exit answers, proportional to q^k, at a mean cost of ``budget`` bare backbones."""
    exits = [*enabled, len(costs.heads) - 1]

    def shares(log_q: float) -> dict[int, float]:
        weights = torch.softmax(log_q * torch.arange(len(exits), dtype=torch.float64), 0)
        return dict(zip(exits, weights.tolist(), strict=True))

    low, high = -40.0, 40.0
    if not costs.of_shares(shares(low)) <= budget * costs.bare <= costs.of_shares(shares(high)):
        return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if costs.of_shares(shares(middle)) < budget * costs.bare else (low, middle)
    return shares(low)


def thresholds_for(scores: Sequence[Tensor], shares: dict[int, float]) -> tuple[float, ...]:
    """Thresholds at which the exits answer those shares of these samples; above 1 for exits without any."""
    staying = torch.ones(len(scores[0]), dtype=torch.bool)
    thresholds = [2.0] * (len(scores) - 1)
    for exit in [exit for exit in shares if exit < len(thresholds)]:
        confidence_N, _ = max_probability(exit, scores[exit], ())
        ordered = confidence_N[staying].sort(descending=True).values
        leaving = min(round(shares[exit] * len(staying)), len(ordered))
        if leaving:
            below = ordered[leaving].item() if leaving < len(ordered) else 0.0
            thresholds[exit] = (ordered[leaving - 1].item() + below) / 2
            staying &= confidence_N < thresholds[exit]
    return tuple(thresholds)




def bare(network: Network, batches: Sequence[Tensor]) -> Run:
    def run() -> None:
        for x in batches:
            value: Any = x
            for stage in network.backbone.stages:
                value = stage(value)
            network.heads[-1](value)

    return run


def in_turn(dynamic: DynamicNetwork, batches: Sequence[Tensor]) -> Run:
    return lambda: [dynamic(x) for x in batches]


def foreseeing(network: Network, batches: Sequence[Tensor], exits: Sequence[Tensor], *, heads: Sequence[int]) -> Run:
    """Every stage on the number of samples that reach it, and ``heads`` on theirs; nobody is moved."""
    stage_of = macs(network).stage_of
    last = len(network.heads) - 1
    plans = []
    for exit_B in exits:
        deepest_B = torch.tensor([stage_of[exit] for exit in exit_B.tolist()])
        reach = [int((deepest_B >= stage).sum()) for stage in range(len(network.exits_at))]
        plans.append((reach, [int((exit_B >= exit).sum()) for exit in range(last + 1)]))

    def run() -> None:
        for x, (reach, asked) in zip(batches, plans, strict=True):
            value: Any = x
            for stage, count, at in zip(network.backbone.stages, reach, network.exits_at, strict=True):
                if not count:
                    break
                value = stage(value[:count])
                for exit in at:
                    if (exit in heads or exit == last) and asked[exit]:
                        network.heads[exit](value[: asked[exit]])

    return run


def race(runs: dict[str, Run], *, repeats: int) -> dict[str, list[float]]:
    """Seconds of everybody in every repetition, in turns; two laps before do not count."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for lap in range(repeats + 2):
        gc.collect()
        for name in runs if lap % 2 else reversed(runs):
            start = clock()
            runs[name]()
            if lap > 1:
                taken[name].append(clock() - start)
    return taken


def chosen(work: Costs, time: Costs, budget: float) -> tuple[int, ...] | None:
    """The exits, at most three, whose plan within a budget of MACs takes the least time, as measured."""
    best = None
    count = len(work.heads) - 1
    for enabled in itertools.chain.from_iterable(itertools.combinations(range(count), n) for n in (1, 2, 3)):
        shares = shares_for(work, enabled, budget)
        if shares is not None and (best is None or time.of_shares(shares) < best[0]):
            best = (time.of_shares(shares), enabled)
    return None if best is None else best[1]


def timed(work: Costs, time: Costs, budget: float) -> tuple[tuple[int, ...], dict[int, float]] | None:
    """Up to three exits, and the share that each answers, at a mean measured *time* of the budget; of most MACs."""
    best = None
    count = len(work.heads) - 1
    for enabled in itertools.chain.from_iterable(itertools.combinations(range(count), n) for n in (1, 2, 3)):
        shares = shares_for(time, enabled, budget)
        if shares is not None and (best is None or work.of_shares(shares) > best[0]):
            best = (work.of_shares(shares), enabled, shares)
    return None if best is None else best[1:]


def affordable(network: Network, batches: Sequence[Tensor], time: Costs) -> tuple[int, ...]:
    """As many exits, the cheapest first, as cost ``OVERHEAD`` of the bare backbone at most when nobody leaves."""
    cheapest = sorted(range(len(time.heads) - 1), key=lambda exit: time.heads[exit])
    for count in range(len(cheapest), 0, -1):
        dynamic = DynamicNetwork(network, ExitPolicy(thresholds=1.0), exits=cheapest[:count])
        runs = {"bare": bare(network, batches), "own": in_turn(dynamic, batches)}
        taken = race(runs, repeats=25 if len(batches[0]) == 1 else 7)
        if ratio(taken["own"], taken["bare"])["median"] <= 1 + OVERHEAD:
            return tuple(sorted(cheapest[:count]))
    return ()


def rows_of(
    network: Network, *, batch: int, repeats: int, choices: Sequence[str], samples: int | None
) -> list[dict[str, Any]]:
    torch.manual_seed(1)
    x = torch.randn(256, 3, 32, 32).to(memory_format=torch.channels_last)
    scores = [scores_NC for scores_NC in network(x).logits]
    batches = list(x[: samples or SAMPLES[batch]].split(batch))
    work, time = macs(network), seconds(network, batches[0], repeats=repeats * (20 if batch == 1 else 2))
    everything = tuple(range(len(network.heads) - 1))
    plans: list[tuple[str, str, tuple[int, ...], ExitPolicy]] = []
    for budget in BUDGETS:
        for choice, enabled in (("all", everything), ("chosen", chosen(work, time, budget))):
            if choice not in choices:
                continue
            shares = None if enabled is None else shares_for(work, enabled, budget)
            if enabled is not None and shares is not None:
                policy = ExitPolicy(thresholds=thresholds_for(scores, shares))
                plans.append((f"{budget:.0%}", choice, enabled, policy))
        by_time = timed(work, time, budget) if "timed" in choices else None
        if by_time is not None:
            plans.append((f"{budget:.0%}", "timed", by_time[0], ExitPolicy(thresholds=thresholds_for(scores, by_time[1]))))
    never = {"all": lambda: everything, "affordable": lambda: affordable(network, batches[: max(1, 32 // batch)], time)}
    for choice in (choice for choice in never if choice in choices):
        plans.append(("none leaves", choice, never[choice](), ExitPolicy(thresholds=1.0)))
    runs: dict[str, Run] = {"bare": bare(network, batches)}
    rows: list[dict[str, Any]] = []
    for place, (budget_name, choice, enabled, policy) in enumerate(plans):
        dynamic = DynamicNetwork(network, policy, exits=enabled)
        exits = [dynamic(part).exit_B for part in batches]
        runs[f"{place} dynamic"] = in_turn(dynamic, batches)
        runs[f"{place} stages"] = foreseeing(network, batches, exits, heads=())
        runs[f"{place} heads"] = foreseeing(network, batches, exits, heads=dynamic.computed_exits)
        cost_N = [work.of_exit(exit, dynamic.computed_exits) for exit in torch.cat(exits).tolist()]
        realized = sum(cost_N) / len(cost_N) / work.bare
        rows.append({"batch": batch, "budget": budget_name, "choice": choice, "exits": len(enabled), "macs": realized})
    taken = race(runs, repeats=repeats)
    for place, row in enumerate(rows):
        own, stages, heads = (taken[f"{place} {who}"] for who in ("dynamic", "stages", "heads"))
        row["speed_up"] = ratio(taken["bare"], own)
        row["of_macs"] = ratio([b * row["macs"] for b in taken["bare"]], own)
        row["of_stages"] = ratio(stages, own)
        row["of_stages_and_heads"] = ratio(heads, own)
        row["seconds"] = median(own)
    return rows


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": median(ratios), "min": min(ratios), "max": max(ratios)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| batch | budget | exits | MACs | speed-up (min-max) | promised | of MACs | of stages | of stages and heads |",
        "|---:|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        up = row["speed_up"]
        cells = [
            row["batch"], row["budget"], f"{row['exits']} {row['choice']}", f"{row['macs']:.3f}",
            f"{up['median']:.2f} ({up['min']:.2f}-{up['max']:.2f})", f"{1 / row['macs']:.2f}",
            *(f"{row[key]['median']:.2f}" for key in ("of_macs", "of_stages", "of_stages_and_heads")),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", choices=list(MODELS), nargs="+", default=["resnet32", "vit_tiny"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, choices=sorted(SAMPLES), nargs="+", default=sorted(SAMPLES))
    parser.add_argument("--choices", nargs="+", choices=CHOICES, default=CHOICES, help="these choices of exits only")
    parser.add_argument("--samples", type=int, help="samples of a repetition")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="three repetitions")
    parser.add_argument("--compile", action="store_true", help="compile stages and heads")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    result: dict[str, Any] = {
        "torch": torch.__version__, "python": platform.python_version(), "compiled": options.compile, "races": [],
    }  # fmt: skip
    for model, threads in itertools.product(options.model, options.threads):
        torch.set_num_threads(threads)
        network = build(model, compiled=options.compile)
        rows: list[dict[str, Any]] = []
        for batch in options.batch:
            with torch.inference_mode():
                rows += rows_of(
                    network, batch=batch, repeats=3 if options.quick else options.repeats, choices=options.choices,
                    samples=options.samples,
                )  # fmt: skip
        result["races"].append({"model": model, "threads": threads, "rows": rows})
        print(f"\n{model}, {threads} thread{'s' if threads > 1 else ''}\n\n{table(rows)}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
