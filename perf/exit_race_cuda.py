"""The exit race on a GPU: dynamic inference against the bare backbone, paired and interleaved.

    python perf/exit_race_cuda.py --seconds 150 --json exits.json
    python perf/exit_race_cuda.py --model vit_b_16 --batch 256 --budget 0.5

Weights and inputs are random but fixed, float32 with TF32; convolutional networks have batch normalization folded and
channels last, for all contestants. Exits are at 12.5, 25, 50 and 75 % of the MACs. As in MSDNet, exit k answers a share
of the samples proportional to q^k, with q such that their mean MACs are the budget; thresholds are quantiles of the
confidences. Contestants of a cell take turns in every lap; medians of milliseconds a batch, synchronized:

- eager, captured: the bare backbone, as it is and as one CUDA graph;
- dynamic: ``DynamicNetwork``; static: all exits computed, as one graph with the policy;
- fast: ``CapturedNetwork`` that removes samples after every exit; chosen removals: where measured times say so;
- fewer exits: the same with the one to three exits that measured times expect to be fastest within the budget;
- timed: up to three of the exits at 12.5, 25, 50 and 75 % of the measured time, where those are others, with the shares
  that are expected to take the budget as a share of the backbone's time.

``kept`` is the speed-up over the captured backbone as a share of what MACs promise, for ``timed`` of what time promises.
``agree``: share of the samples for which the fast runner stops at the exit of the plain reference (rounding differs
between batch sizes). The gap to the promise is divided: milliseconds that MACs promise, that the stages take more
because early ones are slow for their MACs, of heads, and the rest (removals, padding, waiting).

In 40 % of the time, and in processes that cannot spoil the others, the backbone under ``torch.compile`` (default and
reduce-overhead), and the fast runner with compiled stages, are compared with the captured backbone. Then cells run in
order of importance until the time is used up.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from exit_race import Costs, chosen, macs, shares_for, thresholds_for
from exit_race_compiled import RIVALS, rival, rival_apart
from exit_race_graphs import CALLS, MODELS, Run, bare, build, captured, clean, placed_by_time, race, stage_times
from torch import Tensor

from clframe.exits.captured import CapturedNetwork
from clframe.exits.decisions import select
from clframe.exits.dynamic import DynamicNetwork
from clframe.exits.policies import ExitPolicy

ORDER = [(model, batch) for batch in (256, 1024, 32, 1) for model in MODELS]


def cell(model: str, batch: int, budgets: Sequence[float], *, seconds: float) -> list[dict[str, Any]]:
    """One row for every budget."""
    network = build(model, torch.device("cuda"))
    clean()
    calls = CALLS[batch]
    torch.manual_seed(1)
    batches = [torch.randn(batch, *network.input_shape, device="cuda") for _ in range(2 * calls)]
    work = macs(network)
    with torch.no_grad():
        scores = [network(x).logits for part in batches for x in part.split(256)]
        reference = [torch.cat(parts) for parts in zip(*scores, strict=True)]
        on_host = [scores_NC.cpu() for scores_NC in reference]
        times = stage_times(network, batches[0][:256], work)
        whole = captured(bare(network), batches[0])
        exits = tuple(range(len(work.heads) - 1))
        by_time = placed_by_time(model, network, times, batches)
        rows = []
        for budget in budgets:
            shares = shares_for(work, exits, budget)
            if shares is None:
                continue
            policy = ExitPolicy(thresholds=thresholds_for(on_host, shares))
            dynamic = DynamicNetwork(network, policy)
            fast, removing = CapturedNetwork(dynamic, batch=batch), CapturedNetwork(dynamic, batch=batch)
            start = time.perf_counter()
            removals = removing.choose_removals(batches[0])
            choosing = time.perf_counter() - start
            runs: dict[str, Run] = {"captured": whole, "dynamic": dynamic, "fast": fast}
            if removals != dynamic.stopping_exits:
                runs["chosen removals"] = removing
            if budget == budgets[0]:  # their times do not depend on the budget
                runs["eager"], runs["static"] = bare(network), CapturedNetwork(dynamic, batch=batch, removals=())
            some = chosen(work, times, budget)
            few = shares if some is None else shares_for(work, some, budget)
            if some is not None and few is not None and some != exits:
                fewer = DynamicNetwork(network, ExitPolicy(thresholds=thresholds_for(on_host, few)), exits=some)
                runs["fewer exits"] = CapturedNetwork(fewer, batch=batch)
            share = None if by_time is None else by_time(budget, batch)
            if share is not None:
                runs["timed"] = share[0]
            for _, run, x in itertools.product(range(3), runs.values(), batches[:8]):
                run(x)
            taken = race(runs, batches, calls=calls, seconds=seconds / len(budgets))
            wanted_N = select(reference, policy).exit_B
            found_N = torch.cat([fast(x).exit_B for x in batches])
            row = {"model": model, "batch": batch, "budget": budget, "ms": taken, "removals": removals,
                   "macs": mean_cost(work, found_N, exits) / work.bare, "time": mean_cost(times, found_N, exits) / times.bare,
                   "agree": float((wanted_N == found_N).float().mean()), "choosing_s": choosing,
                   "recorded": fast.recorded, "buffers_mb": fast.memory / 1e6, "failure": fast.failure,
                   "gap": gap(taken["fast"], taken["captured"], work, times, found_N, exits)}  # fmt: skip
            if "fewer exits" in runs and some is not None:
                exit_N = torch.cat([runs["fewer exits"](x).exit_B for x in batches])
                row |= {"fewer": some, "fewer_macs": mean_cost(work, exit_N, some) / work.bare,
                        "fewer_gap": gap(taken["fewer exits"], taken["captured"], work, times, exit_N, some)}  # fmt: skip
            if share is not None:
                row |= share[1] | {"timed_kept": budget * taken["captured"] / taken["timed"]}
            rows.append(row)
            print(line(row), flush=True)
            del fast, removing, runs, share
            clean()
    return rows


def gap(ms: float, whole: float, work: Costs, times: Costs, exit_N: Tensor, enabled: Sequence[int]) -> dict[str, float]:
    """Milliseconds that MACs promise, and what is added to them; their sum is ``ms``."""
    stages = Costs(times.stages, (0.0,) * len(times.heads), times.stage_of)
    promised = whole * mean_cost(work, exit_N, enabled) / work.bare
    of_stages, of_both = (whole * mean_cost(costs, exit_N, enabled) / times.bare for costs in (stages, times))
    return {"promised": promised, "stages": of_stages - promised, "heads": of_both - of_stages, "rest": ms - of_both}


def mean_cost(costs: Costs, exit_N: Tensor, enabled: Sequence[int]) -> float:
    counts: list[int] = exit_N.bincount(minlength=len(costs.heads)).tolist()
    return sum(count * costs.of_exit(exit, enabled) for exit, count in enumerate(counts)) / len(exit_N)


def line(row: dict[str, Any]) -> str:
    taken = row["ms"]
    best = min((name for name in ("fast", "chosen removals", "fewer exits") if name in taken), key=taken.__getitem__)
    share = row["fewer_macs"] if best == "fewer exits" else row["macs"]
    kept = taken["captured"] * share / taken[best]
    times = ", ".join(f"{name} {ms:.3f}" for name, ms in taken.items())
    return (
        f"{row['model']} {row['batch']} {row['budget']:.0%}: {times}; MACs {row['macs']:.3f}, stages and heads "
        f"{row['time']:.3f}; {best} {taken['captured'] / taken[best]:.2f}x, kept {kept:.2f}; removals {row['removals']}, "
        f"fewer {row.get('fewer')}, agree {row['agree']:.4f}, {row['recorded']} recorded {row['failure']}; "
        f"fast: {parts_of(row['gap'])}; fewer exits: {parts_of(row.get('fewer_gap', {}))}"
        + (f"; timed {row['timed_exits']}: MACs {row['timed_macs']:.3f}, kept {row['timed_kept']:.2f}" if "timed" in taken else "")
    )


def parts_of(found: dict[str, float]) -> str:
    return " + ".join(f"{name} {ms:.2f}" for name, ms in found.items()) or "-"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batch", type=int, nargs="+", choices=CALLS, default=list(CALLS))
    parser.add_argument("--budget", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--seconds", type=float, default=600, help="time for everything (default: 600)")
    parser.add_argument(
        "--cell", type=float, default=3, help="seconds of laps for every network and batch (default: 3)"
    )
    parser.add_argument("--compile", type=float, default=60, metavar="S",
                        help="seconds at most to compile a backbone, twice as many for stages; 0 for no rivals (default: 60)")  # fmt: skip
    parser.add_argument("--rival", choices=RIVALS, help="only this rival, in this process; its row is the JSON file")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    found: dict[str, Any]
    if not torch.cuda.is_available():
        raise SystemExit("exit_race_cuda: found no CUDA device; perf/exit_race.py is the race on CPUs")
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    if options.rival:
        found = rival(options.model[0], options.batch[0], options.budget, options.rival)
        print(found, flush=True)
        if options.json is not None:
            options.json.write_text(json.dumps(found) + "\n")
        return
    end: float = time.monotonic() + options.seconds
    cells = [(m, b) for m, b in ORDER if m in options.model and b in options.batch]
    found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": [], "rivals": [], "left_out": []}
    print(f"{found['device']}, torch {found['torch']}", flush=True)

    def left() -> float:
        return end - time.monotonic()

    def write() -> None:
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=1) + "\n")

    # Convolutional networks first: fusing their element-wise operations is what a compiler can do here.
    by_use = sorted(cells, key=lambda cell: (cell[1] != 256, not cell[0].startswith("resnet")))
    for (model, batch), kind in itertools.product(by_use if options.compile else [], RIVALS):
        if batch in (256, 1024) and left() > 0.6 * options.seconds:
            found["rivals"].append(rival_apart(model, batch, options, kind))
            print(f"rival: {found['rivals'][-1]}", flush=True)
            write()
    longest = 5.0
    for model, batch in cells:
        if left() < longest:
            found["left_out"].append([model, batch])
            continue
        start = time.monotonic()
        try:
            found["rows"] += cell(model, batch, options.budget, seconds=options.cell)
        except RuntimeError as error:
            found["left_out"].append([model, batch, str(error)[:200]])
            print(f"{model} {batch}: {str(error)[:300]}", flush=True)
        longest = max(longest, time.monotonic() - start)
        clean()
        write()
    write()


if __name__ == "__main__":
    main()
