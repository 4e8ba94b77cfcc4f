"""Counting right answers inside Avalanche's evaluation loop, without waiting for the device.

Shape suffixes: B batch, N samples of an evaluation, K exits, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from avalanche.core import SupervisedPlugin
from torch import Tensor

from clframe.data.benchmark import Benchmark
from clframe.metrics import Tally, TallyCounter
from clframe.nn.exits import STATIC


@dataclass(frozen=True, slots=True)
class Answers:
    """What every exit answered in one evaluation, sample by sample, on the CPU."""

    confidence_KN: Tensor
    """Largest probability of each exit's answer."""
    correct_KN: Tensor
    """Whether that answer is right."""
    experience_N: Tensor
    """Test experience of each sample."""
    static: Mapping[str, Tensor]
    """For each decision of :data:`~clframe.nn.exits.STATIC`, whether it is right on each sample."""


class Scores(SupervisedPlugin):
    """An Avalanche plugin that keeps what the last evaluation came to.

    Attributes:
        tally: Right answers of the model's decision, by test experience and class.
        exits: The same of each exit's own answer, in order of depth.
        answers: Each exit's answer to each sample.
    """

    def __init__(self, benchmark: Benchmark) -> None:
        super().__init__()
        self._benchmark = benchmark
        self._counter: TallyCounter | None = None
        self._exits: list[TallyCounter] = []
        self._batches: list[tuple[Tensor, Tensor, int, dict[str, Tensor]]] = []
        self.tally: Tally | None = None
        self.exits: tuple[Tally, ...] = ()
        self.answers: Answers | None = None

    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Start counting anew."""
        self._counter = self._new_counter(strategy)
        self._exits = [self._new_counter(strategy) for _ in strategy.learner.network.heads]
        self._batches = []

    def after_eval_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Count one batch."""
        assert self._counter is not None
        index, y_B = strategy.experience.current_experience, strategy.mb_y
        classes = self._benchmark.classes[index]
        self._counter.update(index, strategy.mb_output, y_B, classes)
        scores = strategy.answers.logits
        for counter, scores_BC in zip(self._exits, scores, strict=True):
            counter.update(index, scores_BC, y_B, classes)
        if scores[0].shape[1]:
            best = [scores_BC.float().softmax(1).max(dim=1) for scores_BC in scores]
            correct_KB = torch.stack([answer_B == y_B for _, answer_B in best])
            static = {name: decide(scores).scores_BC.argmax(1) == y_B for name, decide in STATIC.items()}
            self._batches.append((torch.stack([p_B for p_B, _ in best]), correct_KB, index, static))

    def after_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Read the counts from the device, once."""
        assert self._counter is not None
        self.tally = self._counter.result()
        self.exits = tuple(counter.result() for counter in self._exits)
        self.answers = self._gathered(len(self._exits))
        self._batches = []

    def _new_counter(self, strategy: Any) -> TallyCounter:
        benchmark = self._benchmark
        return TallyCounter(len(benchmark), len(benchmark.class_order), device=strategy.device)

    def _gathered(self, exits: int) -> Answers:
        parts = self._batches
        nothing_N = torch.zeros(0, dtype=torch.bool)
        return Answers(
            torch.cat([torch.zeros(exits, 0), *(p[0].cpu() for p in parts)], dim=1),
            torch.cat([torch.zeros(exits, 0, dtype=torch.bool), *(p[1].cpu() for p in parts)], dim=1),
            torch.cat([torch.zeros(0, dtype=torch.long), *(torch.full((p[0].shape[1],), p[2]) for p in parts)]),
            {name: torch.cat([nothing_N, *(p[3][name].cpu() for p in parts)]) for name in STATIC},
        )
