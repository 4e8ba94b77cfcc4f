"""Simulated latencies of ``ExitServer``: which order of segments, batch sizes and time on the host matter, without a GPU.

    python perf/exit_stream_simulation.py
    python perf/exit_stream_simulation.py --host 0.1 --slack 0 0.5 1 2

A full forward pass of n samples takes ``--pass-ms A B``: A + B n milliseconds, n rounded up to a recorded size; a segment
takes its share of the MACs, ``--host`` milliseconds in which the GPU waits, and 0.03 for its head. The default fits
ViT-B/16 on one H200 (float32 with TF32). Exit k answers a share proportional to q^k, as in perf/exit_stream.py. The bare
backbone is one segment.
"""

from __future__ import annotations

import argparse
import random
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from clframe.exits.segments import octaves_of

HEAD_MS = 0.03


@dataclass(frozen=True)
class Device:
    """Times in milliseconds."""

    fixed: float
    sample: float
    host: float
    sizes: tuple[int, ...]

    def segment(self, share: float, samples: int) -> float:
        size = self.sizes[bisect_left(self.sizes, samples)]
        return share * (self.fixed + self.sample * size) + HEAD_MS + self.host


def exit_shares(reached: Sequence[float], budget: float) -> list[float]:
    """Shares of the exits whose mean MACs are the budget, from the share of the MACs up to each."""
    low, high = 0.01, 10.0
    for _ in range(60):
        q = (low + high) / 2
        weights = [q**k for k in range(len(reached))]
        mean = sum(w * r for w, r in zip(weights, reached, strict=True)) / sum(weights)
        low, high = (q, high) if mean < budget else (low, q)
    return [w / sum(weights) for w in weights]


def latencies(device: Device, arrivals: list[float], exits: list[int], shares: list[float], *, slack: float) -> list[float]:
    """Milliseconds of each request, in the order of ``ExitServer``: the oldest first, ``slack`` for each exit passed."""
    most, found = device.sizes[-1], list[float]()
    pools: list[deque[list[int]]] = [deque() for _ in shares]  # of requests that continue; the first is not used
    new: deque[int] = deque()
    now, number = 0.0, 0
    while True:
        while number < len(arrivals) and arrivals[number] <= now:
            new.append(number)
            number += 1
        waiting = [(arrivals[new[0]], 0)] if new else []
        waiting += [(arrivals[pool[0][0]] + k * slack, -k) for k, pool in enumerate(pools) if pool]
        if not waiting:
            if number == len(arrivals):
                return found
            now = arrivals[number]
            continue
        segment, batch = -min(waiting)[1], list[int]()
        if segment == 0:
            batch = [new.popleft() for _ in range(min(len(new), most))]
        while segment and pools[segment] and len(batch) + len(pools[segment][0]) <= most:
            batch += pools[segment].popleft()
        now += device.segment(shares[segment], len(batch))
        found += [now - arrivals[one] for one in batch if exits[one] <= segment]
        remaining = [one for one in batch if exits[one] > segment]
        if remaining:
            pools[segment + 1].append(remaining)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pass-ms", type=float, nargs=2, default=[1.0, 0.21], metavar=("A", "B"))
    parser.add_argument("--host", type=float, nargs="+", default=[0.3, 0.1, 0.05], help="of a segment (default: 0.3 0.1 0.05)")
    parser.add_argument("--bare-host", type=float, help="the same for the bare backbone (default: as --host)")
    parser.add_argument("--exits", type=float, nargs="+", default=[0.125, 0.25, 0.5, 0.75], metavar="SHARE",
                        help="share of the MACs up to each exit before the last (default: 0.125 0.25 0.5 0.75)")  # fmt: skip
    parser.add_argument("--slack", type=float, nargs="+", default=[0.0], help="milliseconds, see ExitServer (default: 0)")
    parser.add_argument("--budget", type=float, nargs="+", default=[0.35, 0.5])
    parser.add_argument("--rate", type=float, nargs="+", default=[2040.0, 1020.0], help="requests a second")
    parser.add_argument("--sizes", type=int, nargs="*", default=list(octaves_of(32)), help="recorded batch sizes")
    parser.add_argument("--seconds", type=float, default=6.0, help="simulated time (default: 6)")
    options = parser.parse_args()
    fixed, sample = options.pass_ms
    reached = (*options.exits, 1.0)
    segments = [after - before for before, after in zip((0.0, *reached), reached, strict=False)]
    print("| host ms | slack ms | MACs | requests/s | median: bare | exits | | p99: bare | exits | |\n|" + "---:|" * 10)
    for host in options.host:
        for slack in options.slack:
            for budget in options.budget:
                for rate in options.rate:
                    chance, arrivals = random.Random(0), [0.0]
                    while arrivals[-1] < 1e3 * options.seconds:
                        arrivals.append(arrivals[-1] + 1e3 * chance.expovariate(rate))
                    exits = chance.choices(range(len(reached)), exit_shares(reached, budget), k=len(arrivals))
                    cells = [f"{host:.2f}", f"{slack:.1f}", f"{budget:.0%}", f"{rate:,.0f}"]
                    sizes = tuple(sorted(options.sizes))
                    own = latencies(Device(fixed, sample, host, sizes), arrivals, exits, segments, slack=slack)
                    alone = Device(fixed, sample, host if options.bare_host is None else options.bare_host, sizes)
                    bare = latencies(alone, arrivals, [0] * len(arrivals), [1.0], slack=0.0)
                    for value in (median, lambda values: quantiles(values, n=100)[98]):
                        cells += [f"{value(bare):.2f}", f"{value(own):.2f}", f"{value(own) / value(bare) - 1:+.0%}"]
                    print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
