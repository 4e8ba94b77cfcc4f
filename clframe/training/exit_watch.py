"""Looking at every exit after each training experience: accuracies, costs, and how far the taps have moved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clframe.accounting import backbone_macs, cumulative_macs
from clframe.data.benchmark import Benchmark
from clframe.functional.early_exit import ExitAnswers
from clframe.functional.similarity import flat_tap, unbiased_linear_cka
from clframe.metrics.exit_record import ExitRecord, exit_record
from clframe.nn.backbones.taps import untouched
from clframe.nn.network import Network
from clframe.training.scoring import Answers, Scores

PROBES = 256
"""Samples of the first experience on which taps are compared."""
GRID = 4
"""Larger maps are averaged down to this many cells a side first."""


class ExitWatch:
    """Makes an :class:`~clframe.metrics.exit_record.ExitRecord` of each evaluation.

    Args:
        benchmark: The stream.
        scores: The plugin that holds the last evaluation's answers.

    Attributes:
        reference: Each exit's tap after the first experience, by name; part of every checkpoint.
    """

    def __init__(self, benchmark: Benchmark, scores: Scores) -> None:
        self._benchmark, self._scores = benchmark, scores
        self.reference: Mapping[str, Tensor] = {}

    def record(self, strategy: Any, index: int) -> ExitRecord:
        """The record after experience ``index``, whose evaluation was the last thing that happened."""
        network: Network = strategy.learner.network
        cost_K = cumulative_macs(network)
        answers = self._scores.answers
        assert answers is not None
        accuracy_KE = tuple(tally.accuracy_E for tally in self._scores.exits)
        seen_N = answers.experience_N <= index
        return exit_record(
            _answers(answers, cost_K, seen_N),
            self._validation(strategy, index, cost_K),
            backbone_macs=backbone_macs(network),
            accuracy_KE=accuracy_KE,
            correct={name: right_N[seen_N] for name, right_N in answers.static.items()},
            similarity_K=self._similarity(network, index),
        )

    def _validation(self, strategy: Any, index: int, cost_K: tuple[int, ...]) -> ExitAnswers | None:
        """Answers on held-out data of the experiences so far, where there is more than one exit to choose from."""
        benchmark = self._benchmark
        if len(cost_K) == 1 or not benchmark.validation or benchmark.evaluate == "validation":
            return None
        strategy.eval(benchmark.avalanche.streams["valid"][: index + 1])
        answers = self._scores.answers
        assert answers is not None
        return _answers(answers, cost_K, answers.experience_N <= index)

    def _similarity(self, network: Network, index: int) -> tuple[float, ...]:
        now = _taps(network, self._benchmark)
        if index == 0:
            self.reference = now
        return tuple(unbiased_linear_cka(self.reference[tap], now[tap]) for tap in network.exit_taps)


def _answers(answers: Answers, cost_K: tuple[int, ...], of_N: Tensor) -> ExitAnswers:
    return ExitAnswers(
        confidence_KN=answers.confidence_KN[:, of_N],
        correct_KN=answers.correct_KN[:, of_N],
        cost_K=cost_K,
        experience_N=answers.experience_N[of_N],
    )


def _taps(network: Network, benchmark: Benchmark) -> dict[str, Tensor]:
    """Each exit's tap on the first test samples of the first experience, flat, on the CPU."""
    samples = benchmark.evaluation[0]
    index = torch.arange(min(PROBES, len(samples)))
    x = network.place(samples.prepare(samples.raw(index)))
    with untouched([network]):
        taps = network(x, taps=network.exit_taps).taps
    return {name: flat_tap(tap, grid=GRID).float().cpu() for name, tap in taps.items()}
