"""``Backbone.of``: a model of one's own, its taps found without a trace."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from clframe.errors import ConfigError
from clframe.nn import Backbone, Network
from clframe.nn.backbones.stages import infer_shapes, tap_of


def layers():
    return nn.Sequential(
        OrderedDict(
            stem=nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
            body=nn.Sequential(nn.Conv2d(4, 6, 3, stride=2), nn.Tanh()),
            pool=nn.AdaptiveAvgPool2d((2, 1)),
        )
    )


def test_three_lines_make_a_backbone():
    model = layers().eval()
    backbone = Backbone.of(model, input_shape=(2, 9, 8))
    assert backbone.tap_shapes == {"stem": (4, 7, 6), "body": (6, 3, 2), "pool": (6, 2, 1), "flat": (12,)}
    x = torch.randn(3, 2, 9, 8)
    assert torch.equal(backbone(x), model(x).flatten(1))
    network = Network(backbone)
    network.grow(range(3))
    assert network(x).last.shape == (3, 3)


def test_depth_opens_sequential_children():
    two = Backbone.of(layers(), input_shape=(2, 9, 8), depth=2)
    # The in-place ReLU would overwrite the tap stem.1: the two are one stage.
    assert two.names == ("stem.0", "stem.2", "body.0", "body.1", "pool", "flat")
    nested = nn.Sequential(nn.Sequential(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), nn.Tanh()))
    for depth, names in ((1, ("0",)), (2, ("0.0", "0.1")), (3, ("0.0.0", "0.0.1", "0.1")), (9, ("0.0.0", "0.0.1", "0.1"))):
        assert Backbone.of(nested, input_shape=(1, 2, 2), depth=depth).names == names


def test_the_dry_run_leaves_no_trace():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten())
    model.train()
    model[1].eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    Backbone.of(model, input_shape=(1, 5, 5))
    assert [part.training for part in model] == [True, False, True, True]
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("stages", "names"),
    [
        ([nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Flatten()], ("1", "2")),
        ([nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten()], ("0", "1", "2")),
        # Dropout writes only where it trains, which the dry run does not.
        ([nn.Conv2d(1, 2, 3), nn.Dropout(0.5, inplace=True), nn.Flatten()], ("1", "2")),
        # A view of the tap before, and one before that: the write reaches through both.
        ([nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Unflatten(1, (2, 9)), nn.ReLU(inplace=True), nn.Flatten()], ("3", "4")),
        ([nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Identity(), nn.ReLU(inplace=True), nn.Flatten()], ("0", "3", "4")),
    ],
)
def test_stages_that_write_into_a_tap_are_joined_to_it(stages, names):
    model = nn.Sequential(*stages)
    backbone = Backbone.of(model, input_shape=(1, 5, 5))
    assert backbone.names == names
    x = torch.randn(3, 1, 5, 5)
    torch.manual_seed(1)
    expected = model(x)
    torch.manual_seed(1)
    value, taps = x, []
    for stage in backbone.stages:
        value = stage(value)
        taps.append((value, value.clone()))
    assert torch.equal(value, expected)
    assert all(torch.equal(tap, kept) for tap, kept in taps)


def test_a_layer_that_stands_in_two_places_runs_in_both():
    tanh = nn.Tanh()
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), tanh, nn.Linear(4, 4), tanh)
    backbone = Backbone.of(model, input_shape=(1, 2, 2))
    assert backbone.names == ("0", "1", "2", "3", "4")
    x = torch.randn(2, 1, 2, 2)
    assert torch.equal(backbone(x), model(x))


class InOrder(nn.Module):
    def __init__(self, *, twice: bool):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.twice = twice

    def forward(self, x):
        y = self.second(self.first(x))
        return y + x if self.twice else y


def test_a_module_that_does_more_than_run_its_children_is_traced():
    assert Backbone.of(InOrder(twice=False), input_shape=(3,)).names == ("first", "second")
    twice = InOrder(twice=True)
    backbone, x = Backbone.of(twice, input_shape=(3,)), torch.randn(4, 3)
    assert torch.equal(backbone(x), twice(x))


class Carrying(nn.Module):
    def forward(self, x):
        return (x, x > 0)


class Masked(nn.Module):
    def forward(self, value):
        x, keep = value
        return x * keep


def test_what_is_carried_travels_beside_the_tap():
    backbone = Backbone.of([("a", Carrying()), ("b", Masked())], input_shape=(5,))
    assert backbone.tap_shapes == {"a": (5,), "b": (5,)}
    x = torch.randn(4, 5)
    assert torch.equal(backbone(x), x.relu())
    value = backbone.stages[0](x)
    assert torch.equal(tap_of(value), x) and torch.equal(tap_of(x), x)


class Odd(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.what = what

    def forward(self, x):
        return self.what(x)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "backbone: found no stages; give at least one"),
        ([("a", nn.Flatten()), ("b", nn.Linear(7, 2))], r"backbone: stage 'b' fails on inputs of shape \(12,\) \(.*mat1"),
        ([("a", Odd(lambda x: 1 / 0))], r"backbone: stage 'a' fails on inputs of shape \(3, 2, 2\) \(division by zero"),
        ([("a", Odd(lambda x: [x]))], "backbone: stage 'a' returns list; return a tensor"),
        ([("a", Odd(lambda x: {"x": x})), ("b", nn.Flatten())], r"backbone: stage 'a' returns dict; return a tensor or \("),
        ([("a", Carrying())], "backbone: stage 'a' returns tuple; return a tensor"),
        ([("a", Odd(lambda x: x.mean()))], r"backbone: stage 'a' returns shape \(\) for 2 samples; keep the batch first"),
        ([("a", Odd(lambda x: x.flatten(1).T))], r"backbone: stage 'a' returns shape \(12, 2\) for 2 samples; keep"),
        ([("a", nn.ReLU(inplace=True))], "backbone: stage 'a' writes into the batch; make it work out of place"),
        ([("a", nn.Flatten()), ("b", nn.ReLU(inplace=True))], "backbone: stage 'b' writes into the batch; make it"),
        ([("a", nn.Flatten()), ("a", nn.Tanh())], "backbone: found stage 'a' twice; give every stage its own name"),
    ],
)
def test_a_stage_that_fails_is_named(stages, message):
    with pytest.raises(ConfigError, match=f"^{message}") as caught:
        Backbone.of(stages, input_shape=(3, 2, 2))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("compute", [True, False])
def test_both_dry_runs_agree(compute):
    stages = list(layers().named_children())
    found = infer_shapes(stages, (2, 9, 8), where="test", compute=compute)
    assert [(name, shape) for name, _, shape in found] == [("stem", (4, 7, 6)), ("body", (6, 3, 2)), ("pool", (6, 2, 1))]
    assert all(p.device.type == "cpu" for _, stage, _ in found for p in stage.parameters())


def test_the_type_of_the_weights_is_the_input_s():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    backbone = Backbone.of(model, input_shape=(1, 2, 2))
    assert backbone(torch.zeros(2, 1, 2, 2, dtype=torch.float64)).dtype == torch.float64
