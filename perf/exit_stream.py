"""Latency of requests that arrive one by one: early exit in a shared batch against the bare backbone with batching.

    python perf/exit_stream.py --seconds 60 --json stream.json
    python perf/exit_stream.py --model resnet50 --load 0.5 --budget 0.5

Requests are a Poisson process at a share of the bare backbone's greatest throughput (``max_batch`` over its time for such
a batch, as a CUDA graph). All contestants are ``ExitServer`` with the same limits and graphs: the bare backbone has one
segment, so that it is plain dynamic batching. "One exit" is the network with the exit at 25 % of the MACs alone, at the
same mean MACs: fewer segments are launched, and more requests leave at that exit; its two segments are computed at the
same time, and in "turn" one after the other. The segments of all exits are with ``--concurrent``. Contestants take turns
with the same arrivals; latencies count from the planned arrival of a request. The event loop never sleeps: its timers
have a resolution of a millisecond. Networks, inputs and thresholds are those of perf/exit_race_cuda.py.

``stalls_ms`` of each contestant are the longest pauses by cause: between two turns of the event loop, of the garbage
collector, of a launch on the host (``eager``: launches without a graph), and from a launch to its results.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from exit_race import macs, shares_for, thresholds_for
from exit_race_graphs import MODELS, build, clean
from torch import Tensor

from clframe.exits.active_samples import ActiveSamples
from clframe.exits.dynamic import DynamicNetwork
from clframe.exits.policies import ExitPolicy
from clframe.exits.segment_runners import GraphRunner, PlainRunner, SegmentRun, SegmentRunner
from clframe.exits.streaming import ExitServer
from clframe.nn import Network

ONE = 1
"""The exit at 25 % of the MACs."""


class Stalls:
    """Longest pauses by cause, in milliseconds; as a runner it times the launches of another one."""

    def __init__(self, runner: SegmentRunner) -> None:
        self._runner, self.ms = runner, dict.fromkeys(("turn", "gc", "launch", "device"), 0.0)
        self._launched = self._collecting = self._turn = 0.0
        self.launches, self.launching = 0, 0.0

    @property
    def segments(self) -> int:
        return self._runner.segments

    @property
    def max_batch(self) -> int | None:
        return self._runner.max_batch

    @property
    def concurrent(self) -> bool:
        return self._runner.concurrent

    @property
    def eager(self) -> int:
        return self._runner.eager if isinstance(self._runner, GraphRunner) else 0

    def note(self, cause: str, since: float) -> float:
        """Note a pause until now, and return the present time."""
        now = time.perf_counter()
        self.ms[cause] = max(self.ms[cause], 1e3 * (now - since))
        return now

    def launch(self, segment: int, parts: Sequence[ActiveSamples]) -> SegmentRun:
        start = time.perf_counter()
        run = self._runner.launch(segment, parts)
        now = self.note("launch", start)
        self.launches, self.launching = self.launches + 1, self.launching + now - start
        stalls, results = self, run.results

        def timed() -> tuple[Tensor, list[int], list[bool]]:
            found = results()
            stalls.note("device", start)
            return found

        run.results = timed  # type: ignore[method-assign]
        return run

    def collect(self, phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            self._collecting = time.perf_counter()
        else:
            self.note("gc", self._collecting)

    async def sleep_until(self, due: float) -> None:
        """Give the event loop turns until a time."""
        self._turn = time.perf_counter()
        while self._turn < due:
            await asyncio.sleep(0)
            self._turn = self.note("turn", self._turn)


def runner_for(dynamic: DynamicNetwork, samples: Tensor, *, max_batch: int, concurrent: bool) -> SegmentRunner:
    """Graphs for every segment and size, recorded before the race; segments as they are on a CPU."""
    if samples.device.type != "cuda":
        return PlainRunner(dynamic)
    runner = GraphRunner(dynamic, max_batch=max_batch, concurrent=concurrent)
    runner.prepare(samples[:max_batch])
    if runner.failure:
        raise RuntimeError(f"segments were not recorded: {runner.failure}")
    return runner


def full_batch_seconds(network: Network, samples: Tensor, *, max_batch: int) -> float:
    """Seconds of the bare backbone for a full batch."""
    whole = DynamicNetwork(network, ExitPolicy(thresholds=2.0))
    rows = ActiveSamples(samples[:max_batch])
    runner = PlainRunner(whole) if samples.device.type != "cuda" else GraphRunner(whole, max_batch=max_batch)
    taken = []
    for _ in range(12):
        start = time.perf_counter()
        runner.launch(0, [rows]).results()
        taken.append(time.perf_counter() - start)
    return median(taken[4:])


async def serve(server: ExitServer, stalls: Stalls, samples: list[Tensor], arrivals: list[float]) -> list[float]:
    """Seconds from the planned arrival of each request to its answer."""
    taken: list[float] = []
    start = time.perf_counter() + 0.05

    async def ask(x: Tensor, planned: float) -> None:
        await server.predict(x)
        taken.append(time.perf_counter() - start - planned)

    tasks = []
    async with server:
        for number, planned in enumerate(arrivals):
            await stalls.sleep_until(start + planned)
            tasks.append(asyncio.create_task(ask(samples[number % len(samples)], planned)))
        await asyncio.gather(*tasks)
    return taken


def a_pass(
    dynamic: DynamicNetwork, runner: SegmentRunner, samples: list[Tensor], arrivals: list[float], row: dict[str, Any],
    name: str, options: argparse.Namespace,
) -> list[float]:  # fmt: skip
    """Latencies of one pass; notes batch sizes and pauses in the row, over all passes."""
    stalls = Stalls(runner)
    eager = stalls.eager
    server = ExitServer(dynamic, max_batch=options.max_batch, max_waiting=1 << 20, slack=options.slack, runner=stalls)
    gc.callbacks.append(stalls.collect)
    try:
        found = asyncio.run(serve(server, stalls, samples, arrivals))
    finally:
        gc.callbacks.remove(stalls.collect)
    sizes = [len(numbers) for segment, numbers in server.events if segment == 0]
    row[f"{name}_batch"] = sum(sizes) / len(sizes)
    row[f"{name}_launch_ms"] = 1e3 * stalls.launching / stalls.launches
    before = row.setdefault(f"{name}_stalls_ms", dict.fromkeys(stalls.ms, 0.0) | {"eager": 0})
    before |= {cause: max(ms, before[cause]) for cause, ms in stalls.ms.items()}
    before["eager"] += stalls.eager - eager
    return found


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
    most = options.max_batch / full_batch_seconds(network, samples, max_batch=options.max_batch)
    unbatched = list(samples)  # indexing would be time of the event loop
    rows = []
    for budget in options.budget:
        contestants = {"bare": DynamicNetwork(network, ExitPolicy(thresholds=2.0))}
        for name, exits in (("exits", tuple(range(len(work.heads) - 1))), ("one", (ONE,)), ("turn", (ONE,))):
            shares = shares_for(work, exits, budget)
            if shares is None:
                print(f"{model}: {name} cannot take {budget:.0%} of the MACs on average", flush=True)
                continue
            policy = ExitPolicy(thresholds=thresholds_for(on_host, shares))
            contestants[name] = DynamicNetwork(network, policy, exits=exits)
        if len(contestants) == 1:
            continue
        at_once = {"bare": False, "exits": options.concurrent, "one": True, "turn": False}
        runners = {
            name: runner_for(each, samples, max_batch=options.max_batch, concurrent=not options.slack and at_once[name])
            for name, each in contestants.items()
        }
        clean()  # frees, and leaves what exists out of later collections, as a server should
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
                    found[name].append(a_pass(contestants[name], runners[name], unbatched, arrivals, row, name, options))
            for name, laps in found.items():
                row[f"{name}_p50_ms"] = 1e3 * median(median(lap) for lap in laps)
                row[f"{name}_p99_ms"] = 1e3 * median(quantiles(lap, n=100)[98] for lap in laps)
            rows.append(row)
            print(f"{model} {budget:.0%} of the MACs, {rate:,.0f} a second ({load:.0%})", flush=True)
            for name in contestants:
                print("  " + describe(row, name), flush=True)
    return rows


def describe(row: dict[str, Any], name: str) -> str:
    p50, p99 = (row[f"{name}_{part}_ms"] for part in ("p50", "p99"))
    stalls = ", ".join(f"{cause} {ms:.1f}" for cause, ms in row[f"{name}_stalls_ms"].items())
    return (
        f"{name}: median {p50:.2f} ms ({p50 / row['bare_p50_ms'] - 1:+.0%}), p99 {p99:.2f} ({p99 / row['bare_p99_ms'] - 1:+.0%}); "
        f"mean batch {row[f'{name}_batch']:.1f}; a launch {row[f'{name}_launch_ms']:.3f} ms; longest: {stalls}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["vit_b_16", "resnet50"])
    parser.add_argument("--budget", type=float, nargs="+", default=[0.35, 0.5])
    parser.add_argument("--load", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--max-batch", type=int, default=32)
    parser.add_argument("--slack", type=float, default=0.0, help="see ExitServer; if not 0 all run in turn (default: 0)")
    parser.add_argument("--concurrent", action="store_true", help="compute the segments of all exits at the same time")
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
