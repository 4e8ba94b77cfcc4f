"""What keeping the ledger costs a training step, and what measuring one kind of step costs an experience.

    python perf/accounting_overhead.py            # perceptron 784-256-256-10 and ResNet20, batch 32, one thread
    python perf/accounting_overhead.py --quick    # fewer steps

While a strategy trains, each step is timed without its accounts, and after it the accounts of a step of a known kind:
what a session's ``on_step`` adds. Medians over all steps.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from typing import Any

import torch

from clframe.accounting import Ledger
from clframe.data.benchmark import Source, class_incremental
from clframe.data.samples import TensorSamples
from clframe.nn import BACKBONES, Network
from clframe.training.cost_watch import CostWatch
from clframe.training.module import ContinualModule
from clframe.training.step_cost import step_charges
from clframe.training.strategy import LightningStrategy

CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "mlp": ((1, 28, 28), {"width": 256}),
    "resnet20": ((3, 32, 32), {}),
}
BATCH, REPEATS = 32, 1000


class Stopwatch:
    """Times steps from the end of the last one, and their accounts apart."""

    def __init__(self, strategy: LightningStrategy) -> None:
        assert strategy.learner is not None
        self.steps: list[float] = []
        self.accounts: list[float] = []
        self.measured: list[float] = []
        self._watch = CostWatch(strategy.learner, Ledger(), on_step=lambda strategy: None)
        self._start: float | None = None

    def on_step(self, strategy: LightningStrategy) -> None:
        """As a session has it, with clocks around."""
        now = time.perf_counter()
        if self._start is not None:
            self.steps.append(now - self._start)
        self._watch.on_step(strategy)  # the first of its kind is measured here
        start = time.perf_counter()
        for _ in range(REPEATS):
            self._watch.on_step(strategy)
        self.accounts.append((time.perf_counter() - start) / REPEATS)
        if len(self.measured) < 5:
            start = time.perf_counter()
            step_charges(strategy)
            self.measured.append(time.perf_counter() - start)
        self._start = time.perf_counter()


def overhead(backbone: str, *, steps: int) -> str:
    """One line about one backbone."""
    shape, options = CASES[backbone]
    y = torch.arange(BATCH * steps) % 10
    x = torch.randint(256, (len(y), *shape), dtype=torch.uint8)
    source = Source("noise", TensorSamples(x, y), TensorSamples(x[:20], y[:20]), classes=10)
    bench = class_incremental(source, experiences=1)
    optimizer = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    network = Network(BACKBONES.get(backbone)(shape, **options))
    module = ContinualModule(network, "naive", optimizer=optimizer, seed=0)
    strategy = LightningStrategy(model=module, benchmark=bench, train_mb_size=BATCH, evaluator=None)
    watch = Stopwatch(strategy)
    strategy.on_step = watch.on_step
    strategy.train(bench.avalanche.train_stream[0])
    step, account = statistics.median(watch.steps), statistics.median(watch.accounts)
    once = statistics.median(watch.measured)
    return (
        f"{backbone:9} step {1e3 * step:8.3f} ms   accounts {1e6 * account:5.2f} us = {100 * account / step:.3f} %   "
        f"measuring a kind of step {1e3 * once:6.1f} ms = {once / step:.1f} steps"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What keeping the ledger costs a training step.")
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    for name in CASES:
        print(overhead(name, steps=30 if quick else 150))
