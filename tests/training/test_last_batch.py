"""The last batch of an epoch: left out, or joined to the one before it where batch normalization needs two samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from clframe.api import run
from clframe.config.load import load_config
from clframe.core import parse
from clframe.data import TensorSamples
from clframe.data.benchmark import class_incremental
from clframe.data.source import Source
from clframe.errors import ConfigError
from clframe.nn import Network
from clframe.nn.backbones import Backbone
from clframe.training.loaders import needs_two_samples
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy


def source(train: int) -> Source:
    """Two classes of ``train`` samples together, as vectors."""
    def part(count: int) -> TensorSamples:
        y = torch.arange(count) % 2
        return TensorSamples(torch.randn(count, 5, generator=torch.Generator().manual_seed(0)) + y[:, None], y)

    return Source("points", part(train), part(10), classes=2)


def network(*, normalize: bool) -> Network:
    torch.manual_seed(0)
    layers = [nn.Linear(5, 4), *([nn.BatchNorm1d(4)] if normalize else []), nn.ReLU()]
    return Network(Backbone.of(nn.Sequential(*layers), input_shape=(5,)))


def strategy(train: int, *, normalize: bool, **options) -> tuple[LightningStrategy, Any]:
    """A strategy, and the one experience of its benchmark."""
    model = ContinualModule(
        network(normalize=normalize), parse("naive"), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), seed=0
    )
    benchmark = class_incremental(source(train), experiences=1)
    options = {"train_mb_size": 8, "train_epochs": 2, "evaluator": None, **options}
    trained = LightningStrategy(model=model, benchmark=benchmark, **options)
    return trained, benchmark.avalanche.streams["train"][0]


@pytest.mark.parametrize(
    "train, normalize, drop_last, expected",
    [
        (17, True, False, [8, 9]),  # one sample is joined to the batch before it
        (17, False, False, [8, 8, 1]),  # nothing needs it
        (18, True, False, [8, 8, 2]),
        (16, True, False, [8, 8]),
        (9, True, False, [9]),
        (17, True, True, [8, 8]),
        (18, False, True, [8, 8]),
        (16, True, True, [8, 8]),
    ],
)
def test_batches_of_an_epoch(train: int, normalize: bool, drop_last: bool, expected: list[int]) -> None:
    trained, experience = strategy(train, normalize=normalize, drop_last=drop_last)
    sizes: list[int] = []
    trained.on_step = lambda s: sizes.append(len(s.mb_y))
    planned = trained.count_steps(experience)
    trained.train(experience)
    assert sizes == expected * 2 and planned == len(sizes)
    assert trained._own_loader is not None  # and not Avalanche's


def test_samples_of_several_experiences_are_counted_together() -> None:
    """Experiences of 9 and 8 samples: the first has one sample beyond a batch, and so have both together."""
    model = ContinualModule(
        network(normalize=True), parse("cumulative"), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), seed=0
    )
    benchmark = class_incremental(source(17), experiences=2, order="sorted")
    trained = LightningStrategy(model=model, benchmark=benchmark, train_mb_size=8, train_epochs=1, evaluator=None)
    for experience, expected in zip(benchmark.avalanche.streams["train"], ([9], [8, 9]), strict=True):
        sizes: list[int] = []
        trained.on_step = lambda s, sizes=sizes: sizes.append(len(s.mb_y))
        assert trained.count_steps(experience) == len(expected)
        trained.train(experience)
        assert sizes == expected


def test_what_cannot_be_trained_on_is_refused_in_one_line() -> None:
    one, experience = strategy(17, normalize=True, train_mb_size=1)
    with pytest.raises(ConfigError, match="^trainer.batch_size: found a training batch of one sample, .* another back"):
        one.train(experience)
    few, experience = strategy(6, normalize=True, drop_last=True)
    with pytest.raises(ConfigError, match="^trainer.drop_last: found 6 training samples in experience 0, fewer than"):
        few.train(experience)


def test_whether_a_network_needs_two_samples_is_found_without_changing_it() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten()).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = torch.get_rng_state()
    assert not needs_two_samples(net, torch.zeros(1, 1, 5, 5))
    assert needs_two_samples(net, torch.zeros(1, 1, 3, 3))
    assert torch.equal(torch.get_rng_state(), state) and all(part.training for part in net.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not any(part._forward_pre_hooks for part in net.modules())


def test_drop_last_is_an_option_of_a_run(tmp_path) -> None:
    """Digits have 1,347 training samples, 42 batches of 32 and one of 3."""
    options = ["benchmark.experiences=1", "trainer.epochs=1", "backbone=mlp", "strategy=naive", f"output={tmp_path}",
               "trainer.batch_size=32"]  # fmt: skip
    steps = [run(load_config("quickstart", [*options, f"trainer.drop_last={drop}"])).steps for drop in ("false", "true")]
    assert [sum(s) if isinstance(s, (list, tuple)) else s for s in steps] == [43, 42]
