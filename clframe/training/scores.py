"""The predictions of an evaluation: correct ones of the strategy and of every exit, sample by sample.

Shape suffixes: B batch, N samples of an evaluation, K exits, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clframe.avalanche_bridge.imports import SupervisedPlugin
from clframe.data.benchmark import Benchmark
from clframe.exits import STATIC
from clframe.exits.calibration_error import brier_N, nll_N
from clframe.exits.diagnostics import MOST_TOKENS
from clframe.functional.language import next_token_targets
from clframe.metrics import Tally, TallyCounter, TokenCounter
from clframe.metrics.confusion import MOST_CLASSES, ConfusionCounter


@dataclass(frozen=True, slots=True)
class ExitPredictions:
    """Predictions of every exit, sample by sample: of a whole evaluation on the CPU."""

    confidence_KN: Tensor
    """Largest probability of each exit."""
    correct_KN: Tensor
    """Whether the class of that probability is correct."""
    experience_N: Tensor
    """Test experience of each sample."""
    static: Mapping[str, Tensor]
    """For each decision of :data:`~clframe.exits.STATIC`, whether it is correct on each sample."""
    nll_KN: Tensor
    """Negative log-likelihood of each exit, infinite for classes that it has no score for."""
    brier_KN: Tensor
    """Brier score of each exit."""


MOST_TOKENS_OF_ONE_EXIT = 256
"""As :data:`~clframe.exits.diagnostics.MOST_TOKENS`, of a network with one exit."""
JOINED = 256
"""Samples from which on the predictions of an evaluation's batches are compared, in one batch."""


class Scores(SupervisedPlugin, supports_distributed=True):  # type: ignore[call-arg]  # an argument of Avalanche
    """Avalanche plugin that counts the correct predictions of the last evaluation.

    Attributes:
        tally: Correct predictions of the strategy, by test experience and class.
        exits: The same for each exit, in order of depth.
        predictions: Each exit's prediction for each sample.
        confusion_CC: Samples by true and predicted class of the strategy; None beyond
            :data:`~clframe.metrics.confusion.MOST_CLASSES` classes.
    """

    def __init__(self, benchmark: Benchmark) -> None:
        super().__init__()
        self._benchmark = benchmark
        self._counter: TallyCounter | TokenCounter | None = None
        self._exits: list[TallyCounter | TokenCounter] = []
        self._stored_E: list[int] = []
        self._confusion: ConfusionCounter | None = None
        self._waiting: list[tuple[int, Tensor, tuple[Tensor, ...]]] = []
        self._batches: list[ExitPredictions] = []
        self.tally: Tally | None = None
        self.exits: tuple[Tally, ...] = ()
        self.predictions: ExitPredictions | None = None
        self.confusion_CC: Tensor | None = None

    def before_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Reset all counts."""
        self._counter = self._new_counter(strategy)
        self._exits = [self._new_counter(strategy) for _ in strategy.learner.network.heads]
        classes = len(self._benchmark.class_order)
        confused = classes <= MOST_CLASSES and not self._benchmark.vocabulary
        self._confusion = ConfusionCounter(classes, device=strategy.device) if confused else None
        self._waiting, self._batches = [], []
        self._stored_E = [0] * len(self._benchmark)

    def before_eval_exp(self, strategy: Any, **kwargs: Any) -> None:
        """Set the domain of the samples, where a choice between adapters may know it."""
        choice = strategy.learner.network.choice
        if choice is not None and choice.known:
            choice.domain = strategy.experience.current_experience

    def after_eval_iteration(self, strategy: Any, **kwargs: Any) -> None:
        """Count one batch."""
        index, y_B = strategy.experience.current_experience, strategy.mb_y
        if self._benchmark.vocabulary:
            self._count_tokens(strategy, index)
            return
        assert isinstance(self._counter, TallyCounter)
        classes = self._benchmark.classes[index]
        self._counter.update(index, strategy.mb_output, y_B, classes)
        if self._confusion is not None:
            self._confusion.update(strategy.mb_output, y_B)
        scores = strategy.adjusted.logits
        for counter, scores_BC in zip(self._exits, scores, strict=True):
            assert isinstance(counter, TallyCounter)
            counter.update(index, scores_BC, y_B, classes)
        if scores[0].shape[1]:
            self._waiting.append((index, y_B, scores))
            if sum(len(y_B) for _, y_B, _ in self._waiting) >= JOINED:
                self._compare()

    def after_eval(self, strategy: Any, **kwargs: Any) -> None:
        """Read the counts from the device, once, and unset the domain."""
        assert self._counter is not None
        choice = strategy.learner.network.choice
        if choice is not None:
            choice.domain = None  # not after each experience: its samples are counted with the cost of its adapter
        self._compare()
        self.tally = self._counter.result()
        self.exits = tuple(counter.result() for counter in self._exits)
        self.predictions = self._gather(len(self._exits))
        self.confusion_CC = None if self._confusion is None else self._confusion.result()
        self._batches = []

    def _count_tokens(self, strategy: Any, index: int) -> None:
        """Count one batch of windows of text, and store the predictions of the first tokens of an experience."""
        assert isinstance(self._counter, TokenCounter)
        y_N, scores = next_token_targets(strategy.mb_x), strategy.adjusted.logits
        self._counter.update(index, strategy.mb_output, y_N, strategy.mb_y)
        for counter, scores_NV in zip(self._exits, scores, strict=True):
            assert isinstance(counter, TokenCounter)
            counter.update(index, scores_NV, y_N, strategy.mb_y)
        most = MOST_TOKENS if len(scores) > 1 else MOST_TOKENS_OF_ONE_EXIT
        room = min(most - self._stored_E[index], len(y_N))
        if room > 0:
            self._stored_E[index] += room
            self._waiting.append((index, y_N[:room], tuple(scores_NV[:room] for scores_NV in scores)))
            self._compare()

    def _compare(self) -> None:
        """Compute the exits' predictions of the samples that wait for it, in one batch.

        A stream of many experiences has few samples in each, and small batches cost as much as large ones.
        """
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        y_B = torch.cat([y_B for _, y_B, _ in waiting])
        scores = tuple(torch.cat(scores_BC) for scores_BC in zip(*(scores for _, _, scores in waiting), strict=True))
        experience_B = torch.cat([torch.full((len(y_B),), index) for index, y_B, _ in waiting])
        best = [scores_BC.float().softmax(1).max(dim=1) for scores_BC in scores]
        # As in the tally: scores that are NaN or +inf predict nothing.
        correct_KB = torch.stack([(class_B == y_B) & p_B.isfinite() for p_B, class_B in best])
        decided = {name: decide(scores).scores_BC for name, decide in STATIC.items()}
        static = {name: (found_BC.argmax(1) == y_B) & found_BC.amax(1).isfinite() for name, found_BC in decided.items()}
        nll_KB = torch.stack([nll_N(scores_BC, y_B) for scores_BC in scores])
        brier_KB = torch.stack([brier_N(scores_BC, y_B) for scores_BC in scores])
        confidence_KB = torch.stack([p_B for p_B, _ in best])
        self._batches.append(ExitPredictions(confidence_KB, correct_KB, experience_B, static, nll_KB, brier_KB))

    def _new_counter(self, strategy: Any) -> TallyCounter | TokenCounter:
        benchmark = self._benchmark
        if benchmark.vocabulary:
            return TokenCounter(len(benchmark), len(benchmark.class_order), device=strategy.device)
        return TallyCounter(len(benchmark), len(benchmark.class_order), device=strategy.device)

    def _gather(self, exits: int) -> ExitPredictions:
        parts = self._batches
        if not parts:
            return _no_predictions(exits)
        # Joined on the device: one transfer for each field, however many batches there were.
        return ExitPredictions(
            torch.cat([part.confidence_KN for part in parts], dim=1).cpu(),
            torch.cat([part.correct_KN for part in parts], dim=1).cpu(),
            torch.cat([part.experience_N for part in parts]),
            {name: torch.cat([part.static[name] for part in parts]).cpu() for name in STATIC},
            torch.cat([part.nll_KN for part in parts], dim=1).cpu(),
            torch.cat([part.brier_KN for part in parts], dim=1).cpu(),
        )


def _no_predictions(exits: int) -> ExitPredictions:
    nothing_N = torch.zeros(0, dtype=torch.bool)
    return ExitPredictions(
        torch.zeros(exits, 0), torch.zeros(exits, 0, dtype=torch.bool), torch.zeros(0, dtype=torch.long),
        dict.fromkeys(STATIC, nothing_N), torch.zeros(exits, 0, dtype=torch.float64),
        torch.zeros(exits, 0, dtype=torch.float64),
    )  # fmt: skip
