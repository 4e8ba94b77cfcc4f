"""Notes what a prediction costs after each training experience: its parts, who stops where, products by role."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clframe.accounting import Predictions
from clframe.data.benchmark import Benchmark
from clframe.nn.exits import ExitPolicy
from clframe.training.learner import Learner
from clframe.training.prediction_parts import policy_of, prediction_cost, stops_B
from clframe.training.products import products_of

PROBES = 64
"""Samples on which products are looked at, spread over all test experiences: the same through a run."""


class PredictionWatch:
    """Counts at which exit the samples of an evaluation stop, and what a prediction costs.

    Args:
        learner: The model and who decides.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner = learner
        self._benchmark: Benchmark | None = None
        self._policy: ExitPolicy | None = None
        self._stopped: dict[tuple[str, int], Tensor] = {}
        self._begun: set[str] = set()

    def begin(self, strategy: Any) -> None:
        """An evaluation starts, of one stream or more."""
        self._benchmark = strategy.benchmark
        self._policy = policy_of(self._learner)
        self._begun.clear()

    def count(self, strategy: Any) -> None:
        """Count one batch; nothing waits for the device."""
        stream, index = strategy.experience.origin_stream.name, int(strategy.experience.current_experience)
        if stream not in self._begun:
            self._begun.add(stream)
            self._stopped = {key: count_K for key, count_K in self._stopped.items() if key[0] != stream}
        scores = strategy.answers.logits
        exits, size = len(scores), len(scores[-1])
        if self._policy is None or not scores[-1].shape[1]:
            count_K = torch.tensor([0] * (exits - 1) + [size])
        else:
            stop_B = stops_B(scores, self._policy)
            count_K = (stop_B[:, None] == torch.arange(exits, device=stop_B.device)).sum(0)
        known_K = self._stopped.get((stream, index))
        self._stopped[stream, index] = count_K if known_K is None else known_K + count_K

    def note(self, predictions: Predictions, index: int) -> None:
        """Add what a prediction costs after training experience ``index``, whose evaluation has been counted."""
        benchmark = self._benchmark
        if benchmark is None:  # an evaluation on data of somebody else's
            return
        network = self._learner.network
        x = _probe(benchmark)
        x = network.place(x)
        cost = prediction_cost(self._learner, x[:1])
        for part in cost.parts:
            predictions.add_part(
                part.name, kind=part.kind, macs=part.macs, component=part.component, experience=index
            )
        stream = "test" if benchmark.evaluate == "test" else "valid"
        for (name, of), count_K in sorted(self._stopped.items()):
            if name == stream and of <= index:
                predictions.add_stops(
                    names=network.exit_names, cost_K=cost.cost_K, count_K=count_K.tolist(), of=of, experience=index
                )
        looked = products_of(network, x)
        for row in looked.products:
            predictions.add_products(
                row.role, macs=row.macs, effective_macs=row.effective_macs, samples=row.samples, experience=index
            )
        for experts in looked.experts:
            predictions.add_experts(replace(experts, experience=index))


def _probe(benchmark: Benchmark) -> Tensor:
    """The first test samples of as many experiences as there are probes, equally many of each."""
    parts = [samples for samples in benchmark.evaluation if len(samples)][:PROBES]
    each = -(-PROBES // len(parts))
    found = []
    for samples in parts:
        index = torch.arange(min(each, len(samples))) * len(samples) // min(each, len(samples))  # not one class alone
        found.append(samples.prepare(samples.raw(index)))
    return torch.cat(found)[:PROBES]
