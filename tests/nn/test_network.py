"""A plain network is a network with one exit; further exits change nothing of it."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from clframe.errors import ConfigError, UnknownNameError
from clframe.nn import Backbone, GrowingLinear, Head, Network, freeze, restore
from clframe.nn.backbones import mlp, resnet20, small_cnn
from clframe.nn.types import Output


class Pooled(Head):
    """Global average pooling and a growing classifier: a head for convolutional taps."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = GrowingLinear(channels)

    def grow(self, classes):
        return self.linear.grow(classes)

    def forward(self, features):
        return self.linear(features.mean((2, 3)))


def built(*classes: int, exits: bool = False, seed: int = 0) -> Network:
    torch.manual_seed(seed)
    backbone = small_cnn((3, 11, 9), width=4)
    network = Network(backbone, exits=[("block1", Pooled(4)), ("block2", Pooled(8))] if exits else [])
    network.grow(classes)
    return network


def test_a_plain_network_has_one_exit():
    network = built(0, 1, 2)
    x = torch.randn(5, 3, 11, 9)
    out = network(x)
    assert isinstance(out, Output)
    assert len(out.logits) == 1
    assert out.last is out.logits[0]
    assert network.exit_names == ("final",)
    assert dict(out.taps) == {}
    assert torch.equal(out.last, network.final(network.backbone(x)))
    assert network.classes == 3


def test_other_exits_leave_the_last_one_bit_identical():
    plain, branched = built(0, 1, seed=4), built(0, 1, exits=True, seed=4)
    x = torch.randn(6, 3, 11, 9)
    out = branched(x)
    assert branched.exit_names == ("block1", "block2", "final")
    assert branched.exits_at == ((0,), (1,), (2,))
    assert torch.equal(out.last, plain(x).last)
    block1 = branched.backbone.stages[0](x)
    assert torch.equal(out.logits[0], branched.heads[0](block1))
    assert torch.equal(out.logits[1], branched.heads[1](branched.backbone.stages[1](block1)))
    assert [tuple(logits_BC.shape) for logits_BC in out.logits] == [(6, 2)] * 3


def test_every_exit_grows_and_a_second_time_is_no_growth():
    network = built(0, 1, exits=True)
    assert network.grow([2, 3])
    assert [logits_BC.shape[1] for logits_BC in network(torch.randn(1, 3, 11, 9)).logits] == [4, 4, 4]
    parameters = list(network.parameters())
    assert not network.grow([3, 0])
    assert all(a is b for a, b in zip(parameters, network.parameters(), strict=True))


def test_classes_may_come_from_an_iterator():
    network = built(exits=True)
    network.grow(iter([0, 1]))
    assert [head.classes for head in (network.heads[0].linear, network.heads[1].linear, network.final)] == [
        2
    ] * 3


def test_several_exits_on_one_tap_have_their_own_names():
    torch.manual_seed(0)
    heads = [("layer2", GrowingLinear(8)), ("layer2", GrowingLinear(8))]
    network = Network(mlp((1, 8, 8), width=8), exits=heads)
    network.grow([0, 1])
    assert network.exit_names == ("layer2", "layer2#2", "final")
    assert network.exits_at == ((), (0, 1, 2))
    assert len(network(torch.zeros(2, 1, 8, 8)).logits) == 3


def test_an_exit_of_a_layer_called_final_has_another_name_than_the_last():
    layers = OrderedDict(stem=nn.Linear(4, 6), final=nn.Linear(6, 5), norm=nn.LayerNorm(5))
    backbone = Backbone.of(nn.Sequential(layers), input_shape=(4,))
    heads = [("stem", GrowingLinear(6)), ("final", GrowingLinear(5)), ("final", GrowingLinear(5))]
    network = Network(backbone, exits=heads)
    assert network.exit_names == ("stem", "final#1", "final#2", "final")


def test_taps_come_when_asked_for():
    network = built(0)
    x = torch.randn(2, 3, 11, 9)
    out = network(x, taps=["hidden", "block1"])
    assert sorted(out.taps) == ["block1", "hidden"]
    assert torch.equal(out.taps["block1"], network.backbone.stages[0](x))
    assert torch.equal(out.last, network.final(out.taps["hidden"]))
    with pytest.raises(UnknownNameError, match=r"unknown tap 'blok1'; did you mean 'block1'\?"):
        network(x, taps=["blok1"])


def test_wrong_exits_are_one_line():
    backbone = small_cnn((3, 8, 8), width=4)
    with pytest.raises(UnknownNameError, match=r"unknown tap 'block3'"):
        Network(backbone, exits=[("block3", Pooled(4))])
    with pytest.raises(ConfigError, match=r"^exits: found taps block2, block1; list them in order of depth$"):
        Network(backbone, exits=[("block2", Pooled(8)), ("block1", Pooled(4))])


def test_the_plan_lists_every_part_once():
    network = built(0, exits=True)
    plan = network.plan()
    assert [(name, tuple(exit for exit, _ in exits)) for name, _, exits in plan] == [
        ("block1", ("block1",)), ("block2", ("block2",)), ("hidden", ("final",)),
    ]  # fmt: skip
    parts = nn.ModuleList([part for _, stage, exits in plan for part in (stage, *(network.heads[i] for _, i in exits))])
    assert {id(p) for p in parts.parameters()} == {id(p) for p in network.parameters()}


def test_gradients_reach_every_parameter_from_all_exits():
    network = built(0, 1, exits=True)
    y = torch.tensor([0, 1, 1])
    sum(cross_entropy(logits_BC, y) for logits_BC in network(torch.randn(3, 3, 11, 9)).logits).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_a_deep_copy_runs_on_its_own_parameters():
    network = built(0, 1, exits=True)
    x = torch.randn(2, 3, 11, 9)
    before = [logits_BC.clone() for logits_BC in network(x).logits]
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(network(x).logits, before, strict=True))
    assert all((logits_BC == 0).all() for logits_BC in twin(x).logits)


def test_a_frozen_network_is_still_and_independent():
    torch.manual_seed(0)
    network = Network(resnet20((3, 8, 8), width=2))
    network.grow([0, 1])
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    cross_entropy(network(x).last, y).backward()
    teacher = freeze(network)
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.requires_grad and p.grad is not None for p in network.parameters())
    assert all(module.training for module in network.modules())
    before = teacher(x).last.clone()
    optimizer.step()
    network(x)
    network.grow([2])
    assert torch.equal(teacher(x).last, before)
    assert teacher.classes == 2
    assert not teacher(x).last.requires_grad


def test_a_teacher_comes_back_from_its_state_with_its_own_classes():
    network = built(0, 3, exits=True)
    x = torch.randn(4, 3, 11, 9)
    teacher = freeze(network)
    state = copy.deepcopy(teacher.state_dict())
    network.grow([1, 2, 4, 5])
    kept = copy.deepcopy(network.state_dict())
    back = restore(network, state)
    assert all(torch.equal(a, b) for a, b in zip(back(x).logits, teacher(x).logits, strict=True))
    assert back.classes == 4
    assert not back.training
    assert not any(p.requires_grad for p in back.parameters())
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    assert all(torch.equal(kept[key], value) for key, value in network.state_dict().items())
