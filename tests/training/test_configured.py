"""A LightningModule of one's own in LightningStrategy: the optimizer of its ``configure_optimizers``."""

from __future__ import annotations

import pytest
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.benchmarks.utils import as_classification_dataset
from lightning import LightningModule
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from clframe.errors import UnsupportedError
from clframe.training.strategy import LightningStrategy


class Own(LightningModule):
    def __init__(self, found="optimizer"):
        super().__init__()
        torch.manual_seed(1)
        self.layer, self.found = nn.Linear(3, 2), found

    def forward(self, x):
        return self.layer(x)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.5)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        if self.found == "trainer":
            return torch.optim.SGD(self.parameters(), lr=1 / self.trainer.max_epochs)
        return {
            "optimizer": optimizer,
            "pair": ([optimizer], [schedule]),
            "mapping": {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}},
            "steps": {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}},
            "two": [optimizer, torch.optim.Adam(self.parameters())],
        }[self.found]


def train(model, **options):
    y = torch.arange(12) % 2
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, y)
    data.targets = y.tolist()
    data = as_classification_dataset(data)
    benchmark = nc_benchmark(data, data, n_experiences=1, task_labels=False, shuffle=False)
    strategy = LightningStrategy(model=model, train_mb_size=12, train_epochs=3, evaluator=None, **options)
    strategy.train(benchmark.train_stream[0])
    return x, y


@pytest.mark.parametrize(("found", "factor"), [("optimizer", 1.0), ("pair", 0.5), ("mapping", 0.5)])
def test_it_trains_with_the_optimizer_of_the_module(found, factor):
    model, reference = Own(found), Own()
    x, y = train(model)
    weights, velocity, rate = list(reference.layer.parameters()), [0.0, 0.0], 0.5
    for _ in range(3):
        gradients = torch.autograd.grad(F.cross_entropy(reference(x), y), weights)
        with torch.no_grad():
            for k, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
                velocity[k] = 0.5 * velocity[k] + gradient
                weight -= rate * velocity[k]
        rate *= factor
    torch.testing.assert_close(model.layer.weight, reference.layer.weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ("two", "configure_optimizers of Own returns a list; return one optimizer, or pass optimizer=$"),
        ("steps", "Own returns a schedule that is not stepped once an epoch; return one that is$"),
        ("trainer", r"configure_optimizers of Own fails \(.*\); pass optimizer= instead$"),
    ],
)
def test_what_cannot_be_used_is_one_line(found, message):
    with pytest.raises(UnsupportedError, match=message):
        LightningStrategy(model=Own(found))
    with pytest.raises(UnsupportedError, match="found no optimizer for a model that creates none"):
        LightningStrategy(model=nn.Linear(3, 2))


def test_a_given_optimizer_comes_first():
    model = Own("two")
    train(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0))
    assert torch.equal(model.layer.weight, Own().layer.weight)
