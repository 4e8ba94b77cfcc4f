"""What keeping the ledger costs a training step, and what measuring one kind of step costs an experience.

    python perf/accounting_overhead.py            # the net of quickstart plain, with replay and with exits; a perceptron
    python perf/accounting_overhead.py --quick    # 784-256-256-10 and ResNet20; one thread. Fewer steps

While a strategy trains, each step is timed without its accounts, and after it the accounts of a step of a known kind:
what a session's ``on_step`` adds. Medians over all steps of the second experience, where memories and teachers are in
use. An evaluation of a batch is timed with and without counting who stops where.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from avalanche.core import SupervisedPlugin

from clframe.accounting import Ledger
from clframe.core import parse
from clframe.data.benchmark import Benchmark, class_incremental
from clframe.data.samples import TensorSamples
from clframe.data.source import Source
from clframe.nn import BACKBONES, Network
from clframe.training.cost_recorder import CostWatch, PredictionWatch
from clframe.training.module import ContinualModule
from clframe.training.step_cost import step_charges
from clframe.training.strategy import LightningStrategy


@dataclass(frozen=True)
class Case:
    """What is trained."""

    backbone: str
    shape: tuple[int, ...]
    strategy: str = "naive"
    batch: int = 32
    options: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "quickstart": Case("small_cnn", (1, 8, 8), batch=16),
    "quickstart, er + lwf": Case("small_cnn", (1, 8, 8), "er(memory=200) + lwf", batch=16),
    "quickstart, exits": Case("small_cnn", (1, 8, 8), "er(memory=200) + exits + early_exit", batch=16),
    "mlp": Case("mlp", (1, 28, 28), options={"width": 256}),
    "resnet20": Case("resnet20", (3, 32, 32)),
    "resnet20, exits": Case("resnet20", (3, 32, 32), "exits + early_exit"),
}
REPEATS = 1000


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


def overhead(name: str, *, steps: int) -> str:
    """One line about one case."""
    case = CASES[name]
    y = torch.arange(2 * case.batch * steps) % 10
    x = torch.randint(256, (len(y), *case.shape), dtype=torch.uint8)
    source = Source("noise", TensorSamples(x, y), TensorSamples(x[:320], y[:320]), classes=10)
    bench = class_incremental(source, experiences=2)
    optimizer = functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    network = Network(BACKBONES.get(case.backbone)(case.shape, **case.options))
    module = ContinualModule(network, parse(case.strategy), optimizer=optimizer, seed=0)
    strategy = LightningStrategy(
        model=module, benchmark=bench, train_mb_size=case.batch, eval_mb_size=32, evaluator=None
    )
    first, second = bench.avalanche.train_stream
    strategy.train(first)
    watch = Stopwatch(strategy)
    strategy.on_step = watch.on_step
    strategy.train(second)
    step, account = statistics.median(watch.steps), statistics.median(watch.accounts)
    once = statistics.median(watch.measured)
    evaluation, counting = evaluating(strategy, bench)
    return (
        f"{name:22} step {1e3 * step:8.3f} ms   accounts {1e6 * account:5.2f} us = {100 * account / step:.3f} %   "
        f"measuring a kind of step {1e3 * once:6.1f} ms = {once / step:.1f} steps   counting a batch of an evaluation "
        f"{1e6 * counting:5.1f} us = {100 * counting / evaluation:.1f} %"
    )


def evaluating(strategy: LightningStrategy, bench: Benchmark, *, repeats: int = 20) -> tuple[float, float]:
    """Seconds of evaluating a batch, and of counting who stops where in it."""
    assert strategy.learner is not None
    batches = sum(-(-len(samples) // 32) for samples in bench.test)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        strategy.eval(bench.avalanche.test_stream)
        times.append((time.perf_counter() - start) / batches)
    counting = Counting(PredictionWatch(strategy.learner))
    strategy.plugins.append(counting)
    strategy.eval(bench.avalanche.test_stream)
    return statistics.median(times), statistics.median(counting.seconds)


class Counting(SupervisedPlugin):
    """Times who stops where, as a session counts it after each batch of an evaluation."""

    def __init__(self, watch: PredictionWatch) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._watch = watch

    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        """As a session has it."""
        self._watch.begin(strategy)

    def after_eval_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """The same, many times."""
        start = time.perf_counter()
        for _ in range(REPEATS // 10):
            self._watch.count(strategy)
        self.seconds.append(10 * (time.perf_counter() - start) / REPEATS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What keeping the ledger costs a training step.")
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    for name in CASES:
        print(overhead(name, steps=30 if quick else 150))
