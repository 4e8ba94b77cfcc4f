"""Repairs act on instances: Avalanche's own classes stay as Avalanche ships them."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from avalanche import training as supervised
from avalanche.training import plugins as P
from avalanche.training.plugins import bic, synaptic_intelligence
from avalanche.training.utils import ParamData
from torch import nn

from clframe.avalanche_bridge.fabric import on_fabric
from clframe.avalanche_bridge.repairs import repair
from clframe.training.strategy import LightningStrategy

MADE = {
    "EWC": lambda m: P.EWCPlugin(1.0),
    "MAS": lambda m: P.MASPlugin(0.1, 0.5),
    "RWalk": lambda m: P.RWalkPlugin(),
    "SynapticIntelligence": lambda m: P.SynapticIntelligencePlugin(1.0),
    "BiC": lambda m: P.BiCPlugin(40),
    "CWRStar": lambda m: P.CWRStarPlugin(m),
}


def members(owner: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(owner).items() if not name.startswith("__")}


@pytest.mark.parametrize("name", MADE)
def test_a_repair_changes_no_class_and_no_module_of_avalanche(name: str) -> None:
    plugin, other = (MADE[name](nn.Linear(2, 2)) for _ in range(2))
    original = type(plugin)
    watched = (original, ParamData, bic, synaptic_intelligence)
    before = [members(owner) for owner in watched]
    repair([plugin])
    assert [members(owner) for owner in watched] == before
    assert isinstance(plugin, original) and type(plugin) is not original
    assert type(plugin).__name__ == original.__name__
    assert type(plugin).supports_distributed == original.supports_distributed
    assert type(other) is original
    repaired = type(plugin)
    repair([plugin])
    assert type(plugin) is repaired


def test_avalanches_own_importances_still_refuse_to_grow_in_two_dimensions(toy: SimpleNamespace) -> None:
    finish(toy, on_fabric(supervised.EWC), ewc_lambda=1.0)
    with pytest.raises(AssertionError, match="more than one dimension"):
        ParamData("a", (2, 2)).expand((3, 3))


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context")  # numpy squares of tensors, in Avalanche
def test_a_plain_strategy_trains_the_same_before_and_after_one_of_ours(toy: SimpleNamespace) -> None:
    plain = supervised.SynapticIntelligence
    before = finish(toy, plain, si_lambda=100.0)
    ours = finish(toy, on_fabric(plain), si_lambda=100.0)
    after = finish(toy, plain, si_lambda=100.0)
    assert toy.same(before, after)
    assert not toy.same(ours, before)  # Avalanche's is a no-op on the CPU


def finish(toy: SimpleNamespace, strategy_class: Any, **options: Any) -> Any:
    toy.seed_all()
    model = toy.mlp()
    strategy = strategy_class(
        model=model, optimizer=toy.sgd(model), criterion=nn.CrossEntropyLoss(), evaluator=toy.evaluator(),
        **toy.options, **options,
    )  # fmt: skip
    for experience in toy.benchmark("new").train_stream:
        strategy.train(experience)
    return toy.weights(strategy.model)


def test_importances_grow_with_a_head() -> None:
    plugin = P.EWCPlugin(1.0)
    repair([plugin])
    plugin.importances[0]["weight"] = ParamData("weight", (2, 3), init_tensor=torch.ones(2, 3))
    plugin.before_training_exp(SimpleNamespace())
    grown = plugin.importances[0]["weight"].expand((4, 3))
    assert grown.tolist() == [[1.0] * 3] * 2 + [[0.0] * 3] * 2
    with pytest.raises(AssertionError, match="one dimension"):
        plugin.importances[0]["weight"].expand((5, 4))


@pytest.mark.filterwarnings("ignore:Avalanche is transitioning")
def test_positional_arguments_mean_what_they_mean_in_avalanche(toy: SimpleNamespace) -> None:
    ended = []
    for strategy_class in (supervised.Naive, on_fabric(supervised.Naive)):
        toy.seed_all()
        model = toy.mlp()
        strategy = strategy_class(model, toy.sgd(model), nn.CrossEntropyLoss(), 10, 2, evaluator=toy.evaluator())
        assert (strategy.train_mb_size, strategy.train_epochs) == (10, 2)
        for experience in toy.benchmark("new").train_stream:
            strategy.train(experience)
        ended.append(toy.weights(model))
    assert toy.same(*ended)


def test_the_signature_is_that_of_the_strategy_and_fabric() -> None:
    theirs, ours = (list(inspect.signature(c.__init__).parameters) for c in (supervised.DER, on_fabric(supervised.DER)))
    assert [name for name in ours if name != "fabric"] == theirs


@pytest.mark.filterwarnings("ignore:Avalanche is transitioning")
def test_an_argument_given_twice_or_unknown_is_refused(toy: SimpleNamespace) -> None:
    model = toy.mlp()
    with pytest.raises(TypeError, match="multiple values for argument 'model'"):
        on_fabric(supervised.Naive)(model, model=model, optimizer=toy.sgd(model))
    with pytest.raises(TypeError, match="unexpected keyword argument: optimiser"):
        on_fabric(supervised.Naive)(model=model, optimizer=toy.sgd(model), optimiser=1)


class OfDictionaries(supervised.Naive):
    """A strategy whose mini-batches are dictionaries."""

    @property
    def mb_x(self) -> Any:
        return self.mbatch["x"]

    @property
    def mb_y(self) -> Any:
        return self.mbatch["y"]

    @property
    def mb_task_id(self) -> Any:
        return torch.zeros_like(self.mbatch["y"])

    def _unpack_minibatch(self) -> None:
        x, y = self.mbatch[:2]
        self.mbatch = {"x": x, "y": y}


def test_mini_batches_may_be_dictionaries(toy: SimpleNamespace) -> None:
    ended = [finish(toy, strategy_class) for strategy_class in (OfDictionaries, on_fabric(OfDictionaries))]
    assert toy.same(*ended)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_dictionaries_are_converted_to_the_precision_of_the_weights(toy: SimpleNamespace, precision: Any) -> None:
    from lightning import Fabric

    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    fabric.launch()
    weights = finish(toy, on_fabric(OfDictionaries), fabric=fabric)
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize("expression", ["naive", "exits"])
def test_rwalk_takes_an_experience_shorter_than_its_interval(toy: SimpleNamespace, expression: str) -> None:
    """Its penalties are then the importances alone: no weight has a score."""
    toy.seed_all()
    plugin = P.RWalkPlugin(ewc_lambda=1.0, delta_t=1000)
    model = toy.module(expression, seed=3)
    strategy = LightningStrategy(model=model, plugins=[plugin], evaluator=None, **toy.options)
    for number, experience in enumerate(toy.benchmark("new").train_stream, start=1):
        strategy.train(experience)
        importances, penalties = plugin.exp_importance, plugin.exp_penalties
        largest = max(float(value.data.max()) for value in importances.values())
        last = f"network.heads.{len(model.network.heads) - 1}.bias"
        assert {"network.backbone.stages.0.weight", "network.backbone.stages.0.bias", last} <= penalties.keys()
        assert importances[last].shape == (2 * number,)
        for name, penalty in penalties.items():
            assert torch.equal(penalty.data, importances[name].data / largest)
    assert all(bool(value.isfinite().all()) for value in toy.weights(model).values())
