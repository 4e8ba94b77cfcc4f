"""Does torch.compile shorten the steps of a small network on a CPU? One thread, batches of 32.

    python perf/compiled_step.py

A perceptron 64-256-256-10 with SGD, written by hand: eager, with the network compiled, and with network and loss
compiled together. All take turns, ten times; medians of the time of a step in microseconds, and seconds to compile.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STEPS, ROUNDS = 300, 10


def contestant(kind: str) -> tuple[Callable[[], None], float]:
    """A function that takes a step, and the seconds until its first step was done."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, fused=True)
    x, y = torch.randn(32, 64), torch.randint(10, (32,))

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(network(x), y)

    run: Callable[[Tensor, Tensor], Tensor] = loss_of
    if kind == "network":
        compiled = torch.compile(network)
        run = lambda x, y: F.cross_entropy(compiled(x), y)  # noqa: E731
    elif kind == "network and loss":
        run = torch.compile(loss_of)

    def step() -> None:
        optimizer.zero_grad()
        run(x, y).backward()
        optimizer.step()

    start = time.perf_counter()
    step()
    return step, time.perf_counter() - start


def main() -> None:
    """Print a line for each contestant."""
    torch.set_num_threads(1)
    kinds = ("eager", "network", "network and loss")
    found = {kind: contestant(kind) for kind in kinds}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(ROUNDS):
        for kind, (step, _) in found.items():
            start = time.thread_time()
            for _ in range(STEPS):
                step()
            times[kind].append((time.thread_time() - start) / STEPS)
    eager = times["eager"]
    for kind in kinds:
        ratio = statistics.median(a / b for a, b in zip(eager, times[kind], strict=True))
        median = 1e6 * statistics.median(times[kind])
        print(f"{kind:18} {median:7.1f} us  eager / this {ratio:.2f}  first step {found[kind][1]:.1f} s")


if __name__ == "__main__":
    main()
