"""Placement of exits: published taps exist, shares select the nearest taps, errors have the nearest names."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import nn

from clframe.accounting.macs import stage_macs
from clframe.errors import ConfigError, UnknownNameError
from clframe.exits import placement
from clframe.exits.placement import (
    ExitPlacement,
    at_cost,
    at_latency,
    at_taps,
    every_nth_tap,
    place_exits,
    published_placement,
    stage_seconds,
)
from clframe.exits.tap_choice import blind_taps
from clframe.nn import Backbone, GrowingLinear, Network
from clframe.nn.backbones import mlp, resnet18, resnet20, resnet32, small_cnn, vgg16, vgg19, vit_tiny, wrn16_2

IMAGE = (3, 32, 32)


def vit(depth: int = 12) -> Backbone:
    return vit_tiny((1, 28, 28), width=8, heads=2, depth=depth)


PUBLISHED = [
    (lambda: resnet32(IMAGE, width=2), None, (0.15, 0.30, 0.45, 0.60, 0.75, 0.90)),
    (lambda: resnet32(IMAGE, width=2), 6, (0.15, 0.30, 0.45, 0.60, 0.75, 0.90)),
    (lambda: resnet32(IMAGE, width=2), 3, (0.15, 0.45, 0.75)),
    (lambda: resnet18(IMAGE), None, (0.30, 0.40, 0.55, 0.65, 0.80, 0.90)),
    (lambda: vgg19(IMAGE, width=4, hidden=8), None, (0.09, 0.18, 0.27, 0.36, 0.45, 0.54, 0.63, 0.72, 0.81, 0.90)),
    (lambda: wrn16_2(IMAGE), None, (0.15, 0.35, 0.50, 0.65, 0.80)),
    (vit, None, (0.08, 0.16, 0.24, 0.32, 0.40, 0.48, 0.56, 0.64, 0.72, 0.80, 0.88)),
]


@pytest.mark.parametrize(("build", "exits", "weights"), PUBLISHED)
def test_published_taps_exist_in_order_and_before_the_last(build, exits, weights):
    backbone = build()
    found = published_placement(backbone.names, exits=exits)
    assert found.weights == weights
    assert len(found.taps) == len(weights)
    depth = [backbone.tap(tap) for tap in found.taps]
    assert depth == sorted(set(depth))
    assert depth[-1] < len(backbone.names) - 1


def test_resnet32_with_twelve_exits_has_one_after_every_block_but_the_first_two_and_the_last():
    backbone = resnet32(IMAGE, width=2)
    found = published_placement(backbone.names, exits=12)
    assert found.taps == backbone.names[3:15]
    assert (found.taps[0], found.taps[-1]) == ("layer1.2", "layer3.3")
    assert found.weights == (0.15, 0.225, 0.3, 0.375, 0.45, 0.525, 0.6, 0.675, 0.75, 0.825, 0.9, 0.95)


def test_vgg_taps_are_those_of_torchvisions_features():
    outputs = [2, 6, 9, 13, 16, 19, 22, 26, 29, 32, 35, 39, 42, 45, 48, 52]  # of its 16 convolutional stages
    backbone = vgg19(IMAGE, width=4, hidden=8)
    wanted = [backbone.names[outputs.index(place)] for place in (6, 13, 19, 26, 32, 39, 45, 52)]
    assert published_placement(backbone.names).taps == (*wanted, "fc1", "fc2")


@pytest.mark.parametrize(
    "backbone",
    [resnet20(IMAGE, width=2), vgg16(IMAGE, width=4, hidden=8), vit(11), small_cnn(IMAGE, width=2), mlp((1, 2, 2))],
)
def test_other_backbones_have_no_published_taps_although_some_names_are_the_same(backbone):
    with pytest.raises(ConfigError, match=r"^exits: found no published taps for .*; give taps, or .*resnet32, resnet18"):
        published_placement(backbone.names)


def test_another_number_of_exits_names_the_published_ones():
    with pytest.raises(ConfigError, match=r"^exits: found 5 exits for resnet32; published are 6, 3, 12$"):
        published_placement(resnet32(IMAGE, width=2).names, exits=5)


def test_named_taps_weigh_by_their_place():
    backbone = small_cnn(IMAGE, width=2, depth=3)
    found = at_taps(backbone, ["block1", "block3", "block3"])
    assert found == ExitPlacement(("block1", "block3", "block3"), (0.25, 0.5, 0.75))
    with pytest.raises(UnknownNameError, match=r"unknown tap 'blok2'; did you mean 'block2'\?"):
        at_taps(backbone, ["blok2"])
    with pytest.raises(ConfigError, match=r"^exits: found taps block2, block1; list them in order of depth$"):
        at_taps(backbone, ["block2", "block1"])
    with pytest.raises(ConfigError, match=r"^exits: found no taps; name at least one$"):
        at_taps(backbone, [])


def test_every_nth_tap_leaves_the_last_one_out():
    backbone = mlp((1, 2, 2), width=3, depth=7)
    assert every_nth_tap(backbone, 1).taps == tuple(f"layer{i}" for i in range(1, 7))
    assert every_nth_tap(backbone, 2).taps == ("layer2", "layer4", "layer6")
    assert every_nth_tap(backbone, 2).weights == (0.25, 0.5, 0.75)
    assert every_nth_tap(backbone, 6).taps == ("layer6",)
    assert every_nth_tap(mlp((1, 2, 2), depth=6), 3).taps == ("layer3",)
    for n in (0, -1, 7):
        with pytest.raises(ConfigError, match=rf"^exits: found every {n} of 6 taps before the last; give a number"):
            every_nth_tap(backbone, n)
    with pytest.raises(ConfigError, match="found every 1 of 0 taps"):
        every_nth_tap(mlp((1, 2, 2), depth=1), 1)


def test_shares_find_the_nearest_taps():
    costs = {"a": 10, "exit/a": 1000, "b": 20, "c": 30, "d": 40, "exit/final": 7}
    assert at_cost(costs, [0.25, 0.5]) == ExitPlacement(("b", "c"), (0.3, 0.6))
    assert at_cost(costs, [0.01]) == ExitPlacement(("a",), (0.1,))
    assert at_cost(costs, [0.99]) == ExitPlacement(("c",), (0.6,))
    assert at_cost(costs, [0.1, 0.3, 0.6]).taps == ("a", "b", "c")
    # Both are nearest to b; together a and b are nearer than b and c.
    assert at_cost(costs, [0.25, 0.3]).taps == ("a", "b")
    assert at_cost(costs, [0.31, 0.42]).taps == ("b", "c")


def test_of_taps_of_equal_cost_the_first_is_taken_and_a_weight_is_never_zero():
    assert at_cost({"a": 0, "b": 2, "flat": 0, "c": 2}, [0.5]) == ExitPlacement(("b",), (0.5,))
    assert at_cost({"a": 0, "b": 2, "flat": 0, "c": 2}, [0.1]) == ExitPlacement(("a",), (0.01,))


@pytest.mark.parametrize("seed", range(5))
def test_no_other_taps_are_nearer(seed):
    generator = torch.Generator().manual_seed(seed)
    costs = dict(enumerate(torch.randint(0, 9, (8,), generator=generator).tolist()))
    costs = {f"s{key}": value for key, value in costs.items()}
    shares = sorted((torch.rand(3, generator=generator) * 0.98 + 0.01).tolist())
    total, spent, reached = sum(costs.values()), 0, {}
    for name, cost in list(costs.items())[:-1]:
        spent += cost
        reached[name] = spent / total

    def distance(taps):
        return sum(abs(reached[tap] - share) for tap, share in zip(taps, shares, strict=True))

    best = min(distance(taps) for taps in combinations(reached, 3))
    assert distance(at_cost(costs, shares).taps) == pytest.approx(best, abs=1e-12)


def test_resnet32_by_measured_macs():
    network = Network(resnet32(IMAGE, width=4))
    costs = stage_macs(network)
    found = at_cost(costs, [0.25, 0.5, 0.75])
    names, total = list(network.backbone.names), sum(costs.values())
    for share, tap, weight in zip((0.25, 0.5, 0.75), found.taps, found.weights, strict=True):
        reached = [sum(costs[name] for name in names[: i + 1]) / total for i in range(len(names) - 1)]
        assert names.index(tap) == min(range(len(reached)), key=lambda i: abs(reached[i] - share))
        assert weight == round(reached[names.index(tap)], 2)


@pytest.mark.parametrize("shares", [[], [0.5, 0.25], [0.5, 0.5], [0.0, 0.5], [0.5, 1.0], [-0.1], [1.2]])
def test_shares_that_mean_nothing(shares):
    with pytest.raises(ConfigError, match=r"^exits: found shares .*; give ascending numbers between 0 and 1$"):
        at_cost({"a": 1, "b": 1}, shares)


def test_more_shares_than_taps():
    with pytest.raises(ConfigError, match=r"^exits: found 2 shares for 1 taps before the last; give at most one per tap$"):
        at_cost({"a": 1, "b": 1}, [0.2, 0.5])
    with pytest.raises(ConfigError, match=r"^exits: found 1 shares for 0 taps"):
        at_cost({"a": 0, "b": 0}, [0.2])


class Watched(nn.Linear):
    """Notes how it is called."""

    calls: list[tuple[bool, bool, int]]

    def forward(self, x):
        self.calls.append((self.training, torch.is_grad_enabled(), len(x)))
        return super().forward(x)


def test_time_is_the_median_of_the_passes_after_the_first(monkeypatch):
    stages = [(name, Watched(2, 2), (2,)) for name in ("a", "b", "c")]
    calls = []
    for _, stage, _ in stages:
        stage.calls = calls
    backbone = Backbone(stages, input_shape=(2,))
    # Seconds of the three stages in four passes, the first much too slow, one later pass disturbed.
    passes = [[90, 90, 90], [1, 3, 6], [2, 2, 50], [1, 3, 6]]
    ticks, now = [], 0.0
    for seconds in passes:
        for second in seconds:
            ticks += [now, now + second]
            now += second + 0.5
    clock = iter(ticks * 2)
    monkeypatch.setattr(placement, "_synchronized_time", lambda x: next(clock))
    assert stage_seconds(backbone, batch=4, repetitions=3) == {"a": 1, "b": 3, "c": 6}
    assert calls == [(False, False, 4)] * 12
    assert backbone.training
    assert at_latency(backbone, [0.15, 0.3], repetitions=3) == ExitPlacement(("a", "b"), (0.15, 0.3))


def test_real_time_is_measured():
    seconds = stage_seconds(mlp((1, 2, 2), depth=3))
    assert list(seconds) == ["layer1", "layer2", "layer3"]
    assert all(value > 0 for value in seconds.values())


def test_place_takes_the_option_given():
    network = Network(resnet32(IMAGE, width=2))
    names = network.backbone.names
    assert place_exits(network) == published_placement(names)
    assert place_exits(network, count=3) == published_placement(names, exits=3)
    assert place_exits(network, taps=["stem"]) == at_taps(network.backbone, ["stem"])
    assert place_exits(network, nth=4) == every_nth_tap(network.backbone, 4)
    assert place_exits(network, cost_shares=[0.3]) == at_cost(stage_macs(network), [0.3])
    assert len(place_exits(network, latency_shares=[0.3, 0.6]).taps) == 2
    assert place_exits(network, count=3, values=[0.1, 0.2, 0.3]) == ExitPlacement(published_placement(names, exits=3).taps, (0.1, 0.2, 0.3))
    with pytest.raises(ConfigError, match=r"^exits: found 2 weights for 3 exits; give one for each$"):
        place_exits(network, count=3, values=[0.1, 0.2])
    plain = Network(mlp((1, 2, 2), depth=3))
    assert place_exits(plain).taps == ("layer1", "layer2")
    with pytest.raises(ConfigError, match=r"^exits: found no published taps for layer1, layer2, layer3"):
        place_exits(plain, count=2)


def test_exits_of_a_transformer_see_the_input_and_cost_less_than_the_last():
    """The class token before the first attention is the same for all inputs; after the last layer, only it is left."""
    network = Network(vit(4))
    inner = ("encoder.0", "encoder.1", "encoder.2")
    assert place_exits(network) == ExitPlacement(inner, (0.25, 0.5, 0.75))
    assert place_exits(network, head="token_raw").taps == inner
    assert place_exits(network, head="hidden").taps == ("embed", *inner)  # on all tokens
    assert place_exits(network, nth=1).taps == (*inner, "encoder.3")  # asked for
    assert place_exits(network, cost_shares=[0.001, 0.01]).taps == inner[:2]
    assert place_exits(network, latency_shares=[0.001, 0.002, 0.003, 0.004]).taps == (*inner, "encoder.3")
    assert place_exits(network, taps=["embed"], head="hidden").taps == ("embed",)
    with pytest.raises(ConfigError, match=r"^exits: found tap 'embed', whose first token is the same for every input; use 'encoder.0' or"):
        place_exits(network, taps=["embed", "encoder.1"])
    with pytest.raises(ConfigError, match=r"^exits: found no tap before the last that depends on the input and costs less .* embed, encoder.0, cls"):
        place_exits(Network(vit(1)))


def test_taps_that_a_head_cannot_use_are_found_by_running_the_stages():
    class Tokens(nn.Module):
        def __init__(self, values: float) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.full((1, 1, 3), values))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.first.expand(len(x), -1, -1), x[..., None].expand(-1, -1, 3)], 1)

    class Mix(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(scale))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.scale * x.mean(1, keepdim=True)

    def backbone(*scales: float) -> Backbone:
        mixed = [(f"mix{i}", Mix(scale), (5, 3)) for i, scale in enumerate(scales)]
        return Backbone([("tokens", Tokens(2.0), (5, 3)), *mixed, ("flat", nn.Flatten(), (15,))], input_shape=(4,))

    assert blind_taps(backbone(0.0, 1.0, 0.0)) == ("tokens", "mix0")
    assert blind_taps(backbone(1.0)) == ("tokens",)
    assert blind_taps(backbone(0.0, 0.0)) == ()  # nothing depends on the input yet, so nothing can be said
    assert blind_taps(backbone(1.0), "hidden") == blind_taps(mlp(IMAGE)) == blind_taps(small_cnn(IMAGE)) == ()
    pair = Backbone([("tokens", nn.Unflatten(1, (4, 1)), (4, 1)), ("flat", nn.Flatten(), (4,))], input_shape=(4,))
    assert blind_taps(pair) == ()  # the first token is the first input, and no later tap has tokens


def test_exits_that_are_there_do_not_move_the_next_ones():
    network = Network(mlp((1, 2, 2), width=4, depth=5))
    before = place_exits(network, cost_shares=[0.2, 0.7])
    network.attach([("layer1", GrowingLinear(4)), ("layer4", GrowingLinear(4))])
    network.grow(range(50))
    assert place_exits(network, cost_shares=[0.2, 0.7]) == before
