"""Counting right answers inside Avalanche's evaluation loop, without waiting for the device."""

from __future__ import annotations

from typing import Any

from avalanche.core import SupervisedPlugin

from clframe.data.benchmark import Benchmark
from clframe.metrics import Tally, TallyCounter


class Scores(SupervisedPlugin):
    """An Avalanche plugin that keeps the :class:`~clframe.metrics.Tally` of the last evaluation."""

    def __init__(self, benchmark: Benchmark) -> None:
        super().__init__()
        self._benchmark = benchmark
        self._counter: TallyCounter | None = None
        self.tally: Tally | None = None

    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Start counting anew."""
        benchmark = self._benchmark
        self._counter = TallyCounter(len(benchmark), len(benchmark.class_order), device=strategy.device)

    def after_eval_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Count one batch."""
        assert self._counter is not None
        index = strategy.experience.current_experience
        classes = self._benchmark.classes[index]
        self._counter.update(index, strategy.mb_output, strategy.mb_y, classes)

    def after_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Read the counts from the device, once."""
        assert self._counter is not None
        self.tally = self._counter.result()
