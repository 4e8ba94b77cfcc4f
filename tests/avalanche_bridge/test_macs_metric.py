"""MACs as a metric in Avalanche's own strategies."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clframe.data.avalanche import import_avalanche

import_avalanche()

from avalanche.evaluation.metrics import MAC_metrics
from avalanche.models import MultiHeadClassifier, MultiTaskModule
from avalanche.training import Naive

from clframe.avalanche_bridge.fabric import on_fabric
from clframe.avalanche_bridge.plugins import Macs, cost_metrics


class Grouped(nn.Module):
    """A convolution in groups, which Avalanche's own metric counts without its input channels."""

    def __init__(self, features, classes):
        super().__init__()
        self.conv, self.head = nn.Conv1d(2, 6, 3, groups=2), nn.Linear(6 * (features // 2 - 2), classes)

    def forward(self, x):
        return self.head(self.conv(x.reshape(len(x), 2, -1)).flatten(1))


@pytest.mark.parametrize("every", ["experience", "epoch"])
def test_with_naive(toy, every):
    model = Grouped(toy.features, toy.classes)
    metrics = cost_metrics(epoch=every == "epoch", experience=every == "experience")
    strategy = Naive(
        model=model, optimizer=toy.sgd(model), evaluator=toy.evaluator(*metrics), **toy.options | {"train_epochs": 1}
    )
    bench = toy.benchmark("new")
    strategy.train(bench.train_stream[0])
    results = strategy.eval(bench.test_stream) | strategy.evaluator.get_last_metrics()
    positions = toy.features // 2 - 2
    expected = positions * 3 * 1 * 6 + 6 * positions * toy.classes
    found = {name: value for name, value in results.items() if name.startswith("MACs")}
    assert set(found.values()) == {expected}
    assert len(found) == (3 if every == "experience" else 1)


def test_the_metric_counts_once_for_each_value(toy, monkeypatch):
    calls = []
    monkeypatch.setattr(Macs, "update", lambda self, *of: calls.append(of) or setattr(self, "_macs", 1))
    model = Grouped(toy.features, toy.classes)
    strategy = Naive(model=model, optimizer=toy.sgd(model), evaluator=toy.evaluator(*cost_metrics()), eval_mb_size=3)
    strategy.eval(toy.benchmark("new").test_stream)
    assert len(calls) == 3  # experiences, of several batches each


class MultiTask(MultiTaskModule):
    """Takes task labels beside its input."""

    def __init__(self, features, classes):
        super().__init__()
        self.head = MultiHeadClassifier(features, classes)

    def forward(self, x, task_labels):
        return self.head(x, task_labels)


def test_a_model_that_takes_task_labels(toy):
    model = MultiTask(toy.features, toy.classes)
    strategy = Naive(model=model, optimizer=toy.sgd(model), evaluator=toy.evaluator(*cost_metrics()), **toy.options)
    bench = toy.benchmark("tasks")
    strategy.train(bench.train_stream[0])
    results = strategy.eval(bench.test_stream[:1])
    (found,) = [value for name, value in results.items() if name.startswith("MACs")]
    assert found == toy.features * toy.classes


def test_our_own_module(toy):
    from clframe.training.strategy import LightningStrategy

    module = toy.module("er", grown=True)
    strategy = LightningStrategy(model=module, evaluator=toy.evaluator(*cost_metrics()), **toy.options)
    results = strategy.eval(toy.benchmark("new").test_stream[:1])
    (found,) = [value for name, value in results.items() if name.startswith("MACs")]
    assert found == sum(p.numel() for p in module.network.parameters() if p.ndim == 2)


@pytest.mark.parametrize("metrics, warned", [(MAC_metrics(epoch=True), True), (cost_metrics(), False)])
def test_avalanche_s_own_metric_is_warned_of(toy, metrics, warned, caplog):
    on_fabric(Naive)(model=(model := nn.Linear(2, 2)), optimizer=toy.sgd(model), evaluator=toy.evaluator(*metrics))
    assert ("MAC_metrics: count layers of classes named Linear and Conv2d only" in caplog.text) is warned


def test_the_metric_alone():
    metric = Macs()
    assert metric.result() is None
    metric.update(nn.Linear(3, 2), torch.zeros(1, 3))
    assert metric.result() == 6
    metric.reset()
    assert metric.result() is None
