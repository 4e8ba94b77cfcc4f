"""Overhead of the ledger: of each training step, and of the first step of a kind, which runs under the MAC counter.

    python perf/accounting_overhead.py            # the net of quickstart plain, with replay and with exits; a perceptron
    python perf/accounting_overhead.py --quick    # 784-256-256-10 and ResNet20; one thread. Fewer steps

While a strategy trains, steps without an observer alternate with steps of a known kind under the profiler, and with
counted ones. The sections of a step are also timed alone, many times, because their cost is far below the noise of a
step. Medians over the second experience, where buffers and teachers are in use. The evaluation of a batch is timed with
and without counting samples by exit.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from avalanche.core import SupervisedPlugin

from clframe.core import parse
from clframe.data.benchmark import Benchmark, class_incremental
from clframe.data.samples import TensorSamples
from clframe.data.source import Source
from clframe.nn import BACKBONES, Network
from clframe.training.cost_recorder import PredictionRecorder
from clframe.training.module import ContinualModule
from clframe.training.observer import Section, StepObserver
from clframe.training.step_cost import StepProfiler
from clframe.training.strategy import LightningStrategy


@dataclass(frozen=True)
class Case:
    """A network and its training."""

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
ORDER = ("none", "known", "counted")


class Sections(StepObserver):
    """Notes the sections of a step."""

    def __init__(self) -> None:
        self.seen: list[tuple[Section, str, int]] = []

    def around(self, section: Section, component: str = "", samples: int = 0) -> AbstractContextManager[object]:
        """Note a section."""
        self.seen.append((section, component, samples))
        return super().around(section, component, samples)


class Stopwatch:
    """Times steps from the end of the last one, by observer in turn: none, a profiler that knows them, a new profiler."""

    def __init__(self, strategy: LightningStrategy) -> None:
        assert strategy.learner is not None
        self.seconds: dict[str, list[float]] = {"none": [], "known": [], "counted": []}
        self.sections = Sections()
        self._learner, self._known = strategy.learner, StepProfiler(strategy.learner)
        self._steps, self._start = 0, 0.0
        self._learner.observer = self.sections

    def on_step(self, strategy: LightningStrategy) -> None:
        """End the time of a step, and set the observer of the next one."""
        if self._steps > 1:  # before, sections were noted and the known profiler counted its first step
            self.seconds[ORDER[self._steps % 3]].append(time.perf_counter() - self._start)
        self._steps += 1
        name = ORDER[self._steps % 3] if self._steps > 1 else "known"
        new: dict[str, Callable[[], StepObserver]] = {
            "none": StepObserver, "known": lambda: self._known, "counted": lambda: StepProfiler(self._learner),
        }  # fmt: skip
        self._learner.observer = new[name]()
        self._start = time.perf_counter()

    def profiling(self) -> float:
        """Seconds that the profiler adds to a step of a known kind."""
        start = time.perf_counter()
        for _ in range(REPEATS):
            for section in self.sections.seen:
                with self._known.around(*section):
                    pass
        return (time.perf_counter() - start) / REPEATS


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
    step, counted = statistics.median(watch.seconds["none"]), statistics.median(watch.seconds["counted"])
    profiling = watch.profiling()
    evaluation, counting = evaluating(strategy, bench)
    return (
        f"{name:22} step {1e3 * step:8.3f} ms   profiler {1e6 * profiling:5.2f} us = {100 * profiling / step:.3f} %   "
        f"first step of a kind {1e3 * counted:6.1f} ms = {counted / step:.1f} steps   counting a batch of an evaluation "
        f"{1e6 * counting:5.1f} us = {100 * counting / evaluation:.1f} %"
    )


def evaluating(strategy: LightningStrategy, bench: Benchmark, *, repeats: int = 20) -> tuple[float, float]:
    """Return the seconds of evaluating a batch, and of counting its samples by exit."""
    assert strategy.learner is not None
    batches = sum(-(-len(samples) // 32) for samples in bench.test)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        strategy.eval(bench.avalanche.test_stream)
        times.append((time.perf_counter() - start) / batches)
    counting = Counting(PredictionRecorder(strategy.learner))
    strategy.plugins.append(counting)
    strategy.eval(bench.avalanche.test_stream)
    return statistics.median(times), statistics.median(counting.seconds)


class Counting(SupervisedPlugin):
    """Times the counting of samples by exit, as a session does it after each batch of an evaluation."""

    def __init__(self, recorder: PredictionRecorder) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._recorder = recorder

    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Start counting."""
        self._recorder.begin(strategy)

    def after_eval_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Count many times."""
        start = time.perf_counter()
        for _ in range(REPEATS // 10):
            self._recorder.count(strategy)
        self.seconds.append(10 * (time.perf_counter() - start) / REPEATS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Overhead of the ledger.")
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    for name in CASES:
        print(overhead(name, steps=30 if quick else 150))
