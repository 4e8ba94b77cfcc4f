"""Records of every exit after an evaluation.

Shape suffixes: N samples of an evaluation, K exits, E experiences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clframe.accounting import backbone_macs, stage_macs
from clframe.data.benchmark import Benchmark
from clframe.exits import ExitEvaluation
from clframe.exits.curves import BUDGETS
from clframe.exits.diagnostics import ExitRecord, make_exit_record
from clframe.functional.similarity import flat_tap, unbiased_linear_cka
from clframe.nn.backbones.stages import preserving_state
from clframe.nn.network import Network
from clframe.training.learner import Learner
from clframe.training.prediction_cost import exit_costs
from clframe.training.scores import ExitPredictions, Scores

PROBES = 256
"""Samples of the first experience on which taps are compared."""
GRID = 4
"""Larger maps are average-pooled to this many cells per side first."""


class ExitRecorder:
    """Computes an :class:`~clframe.exits.diagnostics.ExitRecord` of each evaluation.

    Args:
        benchmark: The stream.
        scores: The plugin with the predictions of the last evaluation.

    Attributes:
        reference: Each exit's tap after the first experience, by name; part of every checkpoint.
    """

    def __init__(self, benchmark: Benchmark, scores: Scores) -> None:
        self._benchmark, self._scores = benchmark, scores
        self.reference: Mapping[str, Tensor] = {}

    def record(self, strategy: Any, index: int) -> ExitRecord:
        """Return the record after experience ``index``, right after its evaluation."""
        learner: Learner = strategy.learner
        network = learner.network
        counts = stage_macs(network)
        cost_K = exit_costs(network, counts=counts)
        predictions, owner = self._scores.predictions, learner.composition.owner("prediction")
        assert predictions is not None
        wanted = getattr(owner, "budgets", ())
        # Everything of the evaluation of the test stream is read first: that of validation data replaces the scores.
        accuracy_KE = tuple(tally.accuracy_E for tally in self._scores.exits)
        nll_KE = tuple(tally.nll_E for tally in self._scores.exits) if self._benchmark.vocabulary else ()
        seen_N = predictions.experience_N <= index
        return make_exit_record(
            _exit_evaluation(predictions, cost_K, seen_N),
            self._validation(strategy, index, cost_K),
            backbone_macs=backbone_macs(network, counts=counts),
            accuracy_KE=accuracy_KE,
            nll_KE=nll_KE,
            correct={name: right_N[seen_N] for name, right_N in predictions.static.items()},
            similarity_K=self._similarity(network, index),
            rule=getattr(owner, "budget_rule", "best"),
            fallback=getattr(owner, "fallback", "last"),
            budgets=tuple(sorted({*BUDGETS, *wanted})) if len(wanted) > 1 else BUDGETS,
            simulated=learner.simulated_exits,
        )

    def _validation(self, strategy: Any, index: int, cost_K: tuple[int, ...]) -> ExitEvaluation | None:
        """Predictions on held-out data of the experiences so far, if there is more than one exit to choose from.

        They replace those of the last evaluation in the plugin with the scores.
        """
        benchmark = self._benchmark
        if len(cost_K) == 1 or not benchmark.validation or benchmark.evaluate == "validation":
            return None
        strategy.eval([each for each in benchmark.avalanche.streams["valid"][: index + 1] if len(each.dataset)])
        predictions = self._scores.predictions
        assert predictions is not None
        return _exit_evaluation(predictions, cost_K, predictions.experience_N <= index)

    def _similarity(self, network: Network, index: int) -> tuple[float, ...]:
        if len(network.exit_taps) == 1:  # a network without extra exits: nothing shows it
            return ()
        if not len(self._benchmark.evaluation[0]):  # the first data of an extended run are gone
            return (float("nan"),) * len(network.exit_taps)
        now = _taps(network, self._benchmark)
        if index == 0:
            self.reference = now
        return tuple(unbiased_linear_cka(self.reference[tap], now[tap]) for tap in network.exit_taps)


def _exit_evaluation(predictions: ExitPredictions, cost_K: tuple[int, ...], of_N: Tensor) -> ExitEvaluation:
    return ExitEvaluation(
        confidence_KN=predictions.confidence_KN[:, of_N],
        correct_KN=predictions.correct_KN[:, of_N],
        cost_K=cost_K,
        experience_N=predictions.experience_N[of_N],
        nll_KN=predictions.nll_KN[:, of_N],
        brier_KN=predictions.brier_KN[:, of_N],
    )


def _taps(network: Network, benchmark: Benchmark) -> dict[str, Tensor]:
    """Each exit's flattened tap on the first test samples of the first experience, on the CPU."""
    samples = benchmark.evaluation[0]
    index = torch.arange(min(PROBES, len(samples)))
    x = network.to_device(samples.prepare(samples.raw(index)))
    with preserving_state([network]):
        taps = network(x, taps=network.exit_taps).taps
    return {name: flat_tap(tap, grid=GRID).float().cpu() for name, tap in taps.items()}
