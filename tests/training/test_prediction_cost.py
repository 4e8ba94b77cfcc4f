"""Mean MACs of a prediction: exits counted, experts taken off for those samples that reach them."""

from __future__ import annotations

import math

from torch import nn

from clframe.accounting import Experts, Predictions
from clframe.nn import GrowingLinear, Network
from clframe.nn.backbones import Backbone
from clframe.training.prediction_cost import mean_macs


def network():
    stages = [("first", nn.Sequential(nn.Flatten(), nn.Linear(4, 4))), ("second", nn.Linear(4, 4)), ("third", nn.Linear(4, 4))]
    made = Network(Backbone.of(stages, input_shape=(1, 2, 2)), exits=[("first", GrowingLinear(4)), ("second", GrowingLinear(4))])
    made.grow(range(2))
    return made


def noted(*, experts=()):
    predictions = Predictions()
    for of, count_K in ((0, (1, 2, 1)), (1, (3, 0, 1))):
        predictions.add_stops(names=("first", "second", "final"), cost_K=(100, 200, 300), count_K=count_K, of=of, experience=5)
    for layer, pairs in experts:
        # 2 samples of 3 tokens; a pair costs 4, dense are 6 * 2 * 4 = 48
        predictions.add_experts(Experts(layer=layer, experts=2, samples=2, tokens=6, routed=6, pairs=pairs, expert_macs=4,
                                        router_macs=1, experience=5))  # fmt: skip
    return predictions


def test_exits_alone():
    assert mean_macs(network(), noted(), experience=5) == (4 * 100 + 2 * 200 + 2 * 300) / 8


def test_experts_save_on_samples_that_reach_them():
    made = network()
    layers = ["backbone.stages.0.1", "backbone.stages.1", "backbone.stages.2", "heads.1"]
    saved = (48 - (6 * 4 + 6)) / 2  # 6 pairs and 6 questions to the router: 9 a sample
    for layer, reaching in zip(layers, (8, 4, 2, 4), strict=True):
        found = mean_macs(made, noted(experts=[(layer, 6)]), experience=5)
        assert math.isclose(found, 175 - saved * reaching / 8), layer
    both = mean_macs(made, noted(experts=[(layers[0], 6), (layers[2], 12)]), experience=5)
    assert math.isclose(both, 175 - saved - (48 - 54) / 2 * 2 / 8)  # all experts and a router cost more than the dense layer


def test_nothing_noted_is_not_a_number():
    assert math.isnan(mean_macs(network(), Predictions(), experience=0))
