"""Optimizers by torch's names, parameter groups and rates by experience: rates seen, and weights of longhand loops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning import Fabric
from torch.nn.functional import cross_entropy

from clframe.build import build, build_strategy
from clframe.config.load import load_config
from clframe.config.optimizers import REFUSED, optimizer_arguments, optimizers
from clframe.config.schema import OptimizerConfig
from clframe.data import Source, TensorSamples, class_incremental
from clframe.device_defaults import with_device_defaults
from clframe.errors import ConfigError
from clframe.nn import BACKBONES, Network
from clframe.optimization import build_groups, build_optimizer, build_scheduler
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy

EPOCHS = 3


class Recorder(LightningStrategy):
    """Keeps the network as each experience begins, and the rates of every epoch by group."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.starts: list[Any] = []
        self.rates: list[dict[str, float]] = []

    def _before_training_epoch(self, **kwargs: Any) -> None:
        super()._before_training_epoch(**kwargs)
        if self.clock.train_exp_epochs == 0:
            self.starts.append(copy.deepcopy(self.module.network))
        self.rates.append({group.get("name", "all"): group["lr"] for group in self.optimizer.param_groups})


def stream():
    y = torch.arange(4).repeat(8)
    x = torch.randn(len(y), 1, 3, 3, generator=torch.Generator().manual_seed(1)) + y.reshape(-1, 1, 1, 1)
    data = TensorSamples(x, y)
    return class_incremental(Source("blobs", data, data, classes=4), experiences=2)


def train(config: OptimizerConfig, *, engine: str, strategy: str = "exits(weights=constant, values=[1.0])") -> Recorder:
    """Train two experiences in batches of all their samples."""
    torch.manual_seed(0)
    network = Network(BACKBONES.get("mlp")((1, 3, 3), width=5, depth=2))
    module = ContinualModule(
        network, build_strategy(strategy, {}), optimizer=build_optimizer(config), groups=build_groups(config),
        scheduler=build_scheduler(config, EPOCHS), seed=3,
    )  # fmt: skip
    benchmark = stream()
    run = Recorder(
        model=module.double(), benchmark=benchmark, train_mb_size=64, train_epochs=EPOCHS, evaluator=None, engine=engine,
        fabric=Fabric(accelerator="cpu", devices=1, precision="64-true"),
    )  # fmt: skip
    ends = []
    for experience in benchmark.avalanche.train_stream:
        run.train(experience)
        ends.append(copy.deepcopy(run.module.network))
    run.ends, run.data = ends, benchmark.train
    return run


def assert_weights(run: Recorder, make: Any) -> None:
    """Compare each experience with a loop of plain torch, which trains ``run.starts``.

    Args:
        run: A run of the component exits, whose loss is the sum over exits.
        make: Returns an optimizer for a network, and the rates of its groups in every epoch, for an experience.
    """
    for index, (network, end) in enumerate(zip(run.starts, run.ends, strict=True)):
        optimizer, rates = make(network, index)
        samples = run.data[index]
        x = samples.prepare(samples.raw(torch.arange(len(samples)))).double()
        for epoch in range(EPOCHS):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate[epoch]
            optimizer.zero_grad()
            sum(cross_entropy(logits, samples.y) for logits in network(x).logits).backward()
            optimizer.step()
        for (name, weight), found in zip(network.named_parameters(), end.parameters(), strict=True):
            assert torch.allclose(weight, found, rtol=1e-5, atol=1e-6), name  # Fabric returns logits in float32


@pytest.mark.parametrize("engine", ["fabric", "trainer"])
def test_groups_rates_by_experience_and_schedule_against_a_loop_of_plain_torch(engine):
    config = OptimizerConfig(
        name="SGD", lr={"first": 0.1, "later": 0.02}, momentum=0.9, weight_decay=0.01, schedule="exponential", gamma=0.5,
        options={"nesterov": True},
        groups={"heads": {"lr": {"first": 0.4, "later": 0.2}, "weight_decay": 0.0}, "backbone": {"momentum": 0.5}},
    )  # fmt: skip
    run = train(config, engine=engine)
    expected = [
        {"heads": heads * 0.5**epoch, "backbone": trunk * 0.5**epoch}
        for heads, trunk in ((0.4, 0.1), (0.2, 0.02))
        for epoch in range(EPOCHS)
    ]
    assert run.rates == [pytest.approx(rates) for rates in expected]

    def make(network, index):
        heads, trunk = ((0.4, 0.1), (0.2, 0.02))[index]
        optimizer = torch.optim.SGD([
            {"params": network.heads.parameters(), "weight_decay": 0.0, "momentum": 0.9},
            {"params": network.backbone.parameters(), "weight_decay": 0.01, "momentum": 0.5},
        ], lr=heads, momentum=0.9, nesterov=True)  # fmt: skip
        return optimizer, [[rate * 0.5**epoch for epoch in range(EPOCHS)] for rate in (heads, trunk)]

    assert_weights(run, make)


@pytest.mark.parametrize("engine", ["fabric", "trainer"])
def test_options_of_an_optimizer_and_a_linear_schedule_with_warmup(engine):
    config = OptimizerConfig(
        name="adamw", lr=0.05, betas=(0.8, 0.95), options={"eps": 0.1, "amsgrad": True}, schedule="linear", warmup=1
    )
    run = train(config, engine=engine)
    rates = [0.05 * factor for factor in (1 / 2, 2 / 3, 1 / 3)]
    assert [found["all"] for found in run.rates] == pytest.approx(rates * 2)
    assert_weights(run, lambda network, index: (
        torch.optim.AdamW(network.parameters(), betas=(0.8, 0.95), eps=0.1, amsgrad=True, weight_decay=0.0), [rates]
    ))  # fmt: skip


@pytest.mark.parametrize("engine", ["fabric", "trainer"])
def test_label_smoothing_is_that_of_torch_over_the_classes_seen(engine):
    run = train(OptimizerConfig(lr=0.1), engine=engine, strategy="label_smoothing(smoothing=0.3)")
    for network, end, samples in zip(run.starts, run.ends, run.data, strict=True):
        x = samples.prepare(samples.raw(torch.arange(len(samples)))).double()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        for _ in range(EPOCHS):
            optimizer.zero_grad()
            cross_entropy(network(x).last, samples.y, label_smoothing=0.3).backward()
            optimizer.step()
        for weight, found in zip(network.parameters(), end.parameters(), strict=True):
            torch.testing.assert_close(weight, found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", optimizers())
def test_every_optimizer_of_torch_trains_as_in_a_plain_loop(name):
    config = OptimizerConfig(name=name, lr=0.01)
    run = train(config, engine="fabric")
    pairs = zip(run.starts[0].parameters(), run.ends[0].parameters(), strict=True)
    assert all(not torch.allclose(start, end, rtol=1e-4) for start, end in pairs if start.ndim > 1)
    kind = optimizers()[name]
    options = {"weight_decay": 0.0} if "weight_decay" in optimizer_arguments(name) else {}
    assert_weights(run, lambda network, index: (kind(network.parameters(), lr=0.01, **options), [[0.01] * EPOCHS]))


def test_the_group_of_a_component_and_the_rest():
    network = Network(BACKBONES.get("mlp")((1, 3, 3), width=5))
    network.extras["prd"] = torch.nn.Linear(2, 2)
    config = OptimizerConfig(lr=0.1, groups={"prd": {"lr": 0.5}})
    groups = build_groups(config)(network, 0)
    assert [(group["name"], group["lr"], len(group["params"])) for group in groups] == [
        ("prd", 0.5, 2), ("others", 0.1, len(list(network.parameters())) - 2)
    ]  # fmt: skip
    assert {id(p) for p in groups[0]["params"]} == {id(p) for p in network.extras["prd"].parameters()}
    assert build_groups(OptimizerConfig(lr=0.1)) is None
    with pytest.raises(ConfigError, match=r"^optimizer\.groups\.lwf: found no parameters of it in the network; leave"):
        build_groups(OptimizerConfig(groups={"lwf": {"lr": 0.5}}))(network, 0)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["optimizer.name=lbfgs"], "optimizer.name: found 'lbfgs', which cannot be used: it evaluates the loss several"),
        (["optimizer.nesterov=true"], "optimizer.nesterov: found true, but adam has no such option; options of adam are"),
        (["optimizer.name=sgd", "optimizer.nesterov=true"], "optimizer: sgd refuses its options (Nesterov momentum"),
        (["optimizer.eps=tiny"], "optimizer.eps: found 'tiny' (text); give a number"),
        (["optimizer.lr={first: 0.1}"], "optimizer.lr: found {'first': 0.1} (a mapping); give {first: RATE, later"),
        (["optimizer.lr={first: 0.1, later: 0}"], "optimizer.lr.later: found 0.0; give a number above 0"),
        (["optimizer.groups={heads: {}}"], "optimizer.groups.heads: found {} (a mapping); give it a setting such as lr"),
        (["optimizer.groups.heads.fused=true"], "optimizer.groups.heads.fused: found true; set it for the whole"),
        (["optimizer.groups.heads.lr=1e-300"], "optimizer.groups.heads.lr: found 1e-300, which is 0 in float32"),
        (["optimizer.groups.head.lr=0.1"], "optimizer.groups.head: is not in the network; did you mean 'heads'?"),
        (["optimizer.name=adagrad", "optimizer.momentum=0.5"], "optimizer.momentum: found 0.5; leave it out (adagrad has"),
        (["optimizer.name=nadam", "optimizer.fused=true"], "optimizer.fused: found true; nadam has no fused update"),
        (["optimizer.name=rprop", "optimizer.weight_decay=0.1"], "optimizer.weight_decay: found 0.1; leave it out (rprop"),
        (["optimizer.schedule=exponential"], "optimizer.gamma: found 0.1; give exponential a factor per epoch such as"),
    ],
)
def test_what_cannot_take_effect_is_refused(overrides, message):
    with pytest.raises(ValueError) as refusal:
        build(load_config("quickstart", ["backbone=mlp", "backbone.width=4", *overrides]))
    assert str(refusal.value).startswith(message) and "\n" not in str(refusal.value)


def test_fused_updates_are_chosen_only_where_torch_has_them_on_cuda():
    config = load_config("quickstart")
    for name in optimizers():
        chosen = with_device_defaults(load_config("quickstart", [f"optimizer.name={name}"]), cuda=True).optimizer.fused
        assert chosen == (name in ("sgd", "adam", "adamw")), name
        assert not chosen or "fused" in optimizer_arguments(name)
    assert config.optimizer.name not in REFUSED
