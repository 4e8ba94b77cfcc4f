"""Optimizers and schedules from configs, by arithmetic, and the resolved config."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import pytest
import torch
import yaml

from clframe.build import build, build_strategy
from clframe.config.load import load_config
from clframe.config.schema import OptimizerConfig
from clframe.config.typed import from_mapping, same_config, to_yaml
from clframe.core import COMPONENTS, compose
from clframe.optimization import build_optimizer, build_scheduler
from clframe.options import missing_options


def rates(config, epochs):
    """The learning rate of every epoch."""
    optimizer = build_optimizer(config)([torch.nn.Parameter(torch.zeros(1))])
    make = build_scheduler(config, epochs)
    scheduler = None if make is None else make(optimizer)
    found = []
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return found


@pytest.mark.parametrize(
    "options, factors",
    [
        ({}, [1, 1, 1, 1, 1, 1]),
        ({"schedule": "step", "step": 2, "gamma": 0.5}, [1, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 4]),
        ({"schedule": "multistep", "milestones": (1, 4), "gamma": 0.5}, [1, 1 / 2, 1 / 2, 1 / 2, 1 / 4, 1 / 4]),
        ({"schedule": "cosine"}, [(1 + math.cos(math.pi * t / 6)) / 2 for t in range(6)]),
        ({"warmup": 3}, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1]),
        ({"warmup": 1, "schedule": "step", "step": 2, "gamma": 0.5}, [1 / 2, 1, 1 / 2, 1 / 2, 1 / 4, 1 / 4]),
        ({"warmup": 2, "schedule": "cosine"},
         [f * (1 + math.cos(math.pi * t / 6)) / 2 for t, f in enumerate([1 / 3, 2 / 3, 1, 1, 1, 1])]),
    ],
)  # fmt: skip
def test_schedules(options, factors):
    found = rates(OptimizerConfig(lr=0.2, **options), 6)
    assert found == pytest.approx([0.2 * factor for factor in factors], rel=1e-12)


@pytest.mark.parametrize(
    "config, kind, options",
    [
        (OptimizerConfig(name="sgd", momentum=0.5), torch.optim.SGD, {"momentum": 0.5}),
        (OptimizerConfig(name="rmsprop", momentum=0.5, weight_decay=0.1), torch.optim.RMSprop,
         {"momentum": 0.5, "weight_decay": 0.1}),
        (OptimizerConfig(name="adam"), torch.optim.Adam, {"betas": (0.9, 0.999)}),
        (OptimizerConfig(name="adamw", betas=(0.8, 0.9)), torch.optim.AdamW, {"betas": (0.8, 0.9)}),
    ],
)  # fmt: skip
def test_optimizers(config, kind, options):
    optimizer = build_optimizer(config)([torch.nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is kind and optimizer.param_groups[0]["lr"] == config.lr
    assert {key: optimizer.param_groups[0][key] for key in options} == options


TINY = ["backbone=mlp", "backbone.width=4"]


def test_the_resolved_config_has_every_option_of_the_components_in_use_and_no_others():
    config = build(load_config("quickstart", [*TINY, "strategy=er(memory=17) + lwf(alpha=0)"])).config
    er = COMPONENTS.get("er")(memory=17)
    assert (config.strategy, config.components) == ("er", {"er": asdict(er)})
    plugins = ["components.avalanche.plugins=[{LwFPlugin: {alpha: 2.0}}]"]
    config = build(load_config("quickstart", [*TINY, "strategy=naive", *plugins])).config
    assert (config.strategy, config.components) == ("naive", {"avalanche": {"plugins": [{"LwFPlugin": {"alpha": 2.0}}]}})


def test_the_resolved_config_is_resolved_to_itself():
    config = build(load_config("quickstart", TINY)).config
    assert build(from_mapping(yaml.safe_load(to_yaml(config)))).config == config


@pytest.mark.parametrize("name", [name for name, kind in COMPONENTS.items() if not missing_options(kind, {})])
def test_options_of_every_component_are_read_back_as_they_were_written(name):
    component = COMPONENTS.get(name)()
    config = load_config("quickstart", [*TINY, "strategy=naive", "components={}"])
    config = replace(config, strategy=name, components={name: asdict(component)})
    again = from_mapping(yaml.safe_load(to_yaml(config)))
    assert build_strategy(again.strategy, again.components) == compose(component)


def test_configs_of_earlier_versions_mean_the_same():
    """Those had the expression as it was given, and blocks of components that it does not use."""
    former = load_config("quickstart", [*TINY, "strategy=lwf + er(memory=17)", "components.ewc={}"])
    assert former.components["er"] == {"memory": 200}  # which the expression overrides
    now = build(former).config
    assert to_yaml(now) != to_yaml(former) and same_config(to_yaml(former), to_yaml(now))
    for change in ("strategy=er(memory=18) + lwf", "strategy=er(memory=17)", "components.lwf.alpha=2", "seed=1"):
        other = load_config("quickstart", [*TINY, "strategy=lwf + er(memory=17)", change])
        assert not same_config(to_yaml(former), to_yaml(other))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["strategy=early_exit(threshold=0.5)"], "components.early_exit: has no effect, since the network has one exit; add exits to the strategy"),
        (
            ["strategy=exits + early_exit(threshold=0.5, budget=0.5)", "benchmark.validation=0.1"],
            "components.early_exit.threshold: has no effect, since the budget replaces it; leave it out",
        ),
        (["strategy=exits + early_exit(solver=coordinate)"], "components.early_exit.solver: has no effect, since there is no budget; leave it out"),
        (["trainer.sync_batchnorm=true"], "trainer.sync_batchnorm: has no effect on one device; leave it out, or set trainer.devices"),
        (["optimizer.schedule=multistep", "optimizer.milestones=[10, 20]"], "optimizer.milestones: has no effect, since the rate changes after epoch 10 of 10; give less, or more epochs"),
        (["optimizer.schedule=step", "optimizer.step=12"], "optimizer.step: has no effect, since the rate changes after epoch 12 of 10; give less, or more epochs"),
        (["trainer.strategy=ddp"], "trainer.strategy: has no effect on one device; leave it out, or set trainer.devices"),
        (["trainer.channels_last=true"], "trainer.channels_last: has no effect, since the backbone has no convolution; leave it out"),
        (["trainer.eval_every=11"], "trainer.eval_every: has no effect, found 11 for 10 epochs; give at most 10"),
    ],
)  # fmt: skip
def test_options_without_effect_are_named(overrides, message, caplog):
    build(load_config("quickstart", ["backbone=mlp", *overrides]))
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [message]


@pytest.mark.parametrize(
    "overrides",
    [
        ["strategy=exits + early_exit(threshold=0.5)"],
        ["strategy=exits + early_exit(budget=0.5, solver=coordinate)", "benchmark.validation=0.1"],
        ["optimizer.schedule=multistep", "optimizer.milestones=[9, 20]"],
        ["trainer.eval_every=10"],
        ["backbone=small_cnn", "trainer.channels_last=true"],
        ["optimizer.schedule=step", "optimizer.step=12", "trainer.budget=1e9"],
    ],
)
def test_options_with_an_effect_are_not(overrides, caplog):
    build(load_config("quickstart", ["backbone=mlp", *overrides]))
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == []
