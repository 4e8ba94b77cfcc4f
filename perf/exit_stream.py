"""Latency of requests that arrive one by one: early exit in a shared batch against the bare backbone with batching.

    python perf/exit_stream.py --seconds 60 --json stream.json
    python perf/exit_stream.py --model resnet50 --load 0.5 --budget 0.5

Requests are a Poisson process at a share of the bare backbone's greatest throughput (``max_batch`` over its time for such
a batch, as a CUDA graph). Both contestants are ``ExitServer`` with the same limits and graphs: the bare backbone has one
segment, so that it is plain dynamic batching. They take turns with the same arrivals; latencies count from the planned
arrival of a request. Networks, inputs and thresholds are those of perf/exit_race_cuda.py.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from exit_race import macs, shares_for, thresholds_for
from exit_race_cuda import MODELS, build, clean
from torch import Tensor

from clframe.exits.dynamic import ActiveSamples, DynamicNetwork
from clframe.exits.policies import ExitPolicy
from clframe.exits.segment_runners import GraphRunner, PlainRunner, SegmentRunner
from clframe.exits.streaming import ExitServer
from clframe.nn import Network


def runner_for(dynamic: DynamicNetwork, samples: Tensor, *, max_batch: int) -> SegmentRunner:
    """Graphs for every segment and size, recorded before the race; segments as they are on a CPU."""
    if samples.device.type != "cuda":
        return PlainRunner(dynamic)
    runner = GraphRunner(dynamic, max_batch=max_batch)
    for size in reversed(runner.sizes):
        for _ in range(3):
            rows = ActiveSamples(samples[:size])
            for segment in range(runner.segments):
                rows = runner.run(segment, rows).map(torch.clone, confident=False)
    return runner


def capacity(network: Network, samples: Tensor, *, max_batch: int) -> float:
    """Requests a second of the bare backbone in full batches."""
    runner = runner_for(DynamicNetwork(network, ExitPolicy(thresholds=2.0)), samples, max_batch=max_batch)
    taken = []
    for _ in range(12):
        start = time.perf_counter()
        runner.run(0, ActiveSamples(samples[:max_batch])).scores_nC.cpu()
        taken.append(time.perf_counter() - start)
    return max_batch / median(taken[2:])


async def serve(server: ExitServer, samples: Tensor, arrivals: list[float]) -> list[float]:
    """Seconds from the planned arrival of each request to its answer."""
    taken: list[float] = []
    start = time.perf_counter() + 0.05

    async def ask(x: Tensor, planned: float) -> None:
        await server.predict(x)
        taken.append(time.perf_counter() - start - planned)

    tasks = []
    async with server:
        for number, planned in enumerate(arrivals):
            wait = start + planned - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(ask(samples[number % len(samples)], planned)))
        await asyncio.gather(*tasks)
    return taken


def race(model: str, options: argparse.Namespace, *, end: float) -> list[dict[str, Any]]:
    """One row for every budget and load."""
    device = torch.device(options.device)
    network = build(model, device)
    torch.manual_seed(1)
    samples = torch.randn(options.samples, *network.input_shape, device=device)
    work = macs(network)
    with torch.no_grad():
        parts = [network(x).logits for x in samples.split(256)]
    on_host = [torch.cat(found).cpu() for found in zip(*parts, strict=True)]
    most = capacity(network, samples, max_batch=options.max_batch)
    rows = []
    for budget in options.budget:
        shares = shares_for(work, range(len(work.heads) - 1), budget)
        if shares is None:
            continue
        policy = ExitPolicy(thresholds=thresholds_for(on_host, shares))
        contestants = {
            "bare": DynamicNetwork(network, ExitPolicy(thresholds=2.0)),
            "exits": DynamicNetwork(network, policy),
        }
        runners = {name: runner_for(each, samples, max_batch=options.max_batch) for name, each in contestants.items()}
        for load in options.load:
            if time.monotonic() > end:
                break
            rate = load * most
            row: dict[str, Any] = {"model": model, "budget": budget, "load": load, "rate": rate}
            found: dict[str, list[list[float]]] = {name: [] for name in contestants}
            for lap in range(options.laps):
                random.seed(lap)
                arrivals = [0.0]
                while arrivals[-1] < options.pass_seconds:
                    arrivals.append(arrivals[-1] + random.expovariate(rate))
                for name in contestants if lap % 2 else reversed(contestants):
                    server = ExitServer(contestants[name], max_batch=options.max_batch, max_waiting=1 << 20,
                                        slack=options.slack, runner=runners[name])  # fmt: skip
                    found[name].append(asyncio.run(serve(server, samples, arrivals)))
                    sizes = [len(numbers) for segment, numbers in server.events if segment == 0]
                    row[f"{name}_batch"] = sum(sizes) / len(sizes)
            for name, laps in found.items():
                row[f"{name}_p50_ms"] = 1e3 * median(median(lap) for lap in laps)
                row[f"{name}_p99_ms"] = 1e3 * median(quantiles(lap, n=100)[98] for lap in laps)
            row["p50_change"] = row["exits_p50_ms"] / row["bare_p50_ms"] - 1
            row["p99_change"] = row["exits_p99_ms"] / row["bare_p99_ms"] - 1
            rows.append(row)
            print(
                f"{model} {budget:.0%} of the MACs, {rate:,.0f} a second ({load:.0%}): median {row['bare_p50_ms']:.2f} to "
                f"{row['exits_p50_ms']:.2f} ms ({row['p50_change']:+.0%}), p99 {row['bare_p99_ms']:.2f} to "
                f"{row['exits_p99_ms']:.2f} ({row['p99_change']:+.0%}); mean batch {row['bare_batch']:.1f}, "
                f"{row['exits_batch']:.1f}",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["vit_b_16", "resnet50"])
    parser.add_argument("--budget", type=float, nargs="+", default=[0.35, 0.5])
    parser.add_argument("--load", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--slack", type=float, default=0.0, help="see ExitServer (default: 0)")
    parser.add_argument("--samples", type=int, default=512, help="different inputs (default: 512)")
    parser.add_argument("--laps", type=int, default=2, help="passes of each contestant (default: 2)")
    parser.add_argument("--pass-seconds", type=float, default=2.0, help="length of a pass (default: 2)")
    parser.add_argument("--seconds", type=float, default=300, help="no further row after this time (default: 300)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    end = time.monotonic() + options.seconds
    rows: list[dict[str, Any]] = []
    for model in options.model:
        if time.monotonic() < end:
            rows += race(model, options, end=end)
            clean()
            if options.json is not None:
                options.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
