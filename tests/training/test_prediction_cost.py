"""Parts of a prediction against arithmetic, and against what dynamic inference really runs."""

from __future__ import annotations

import math

import pytest
import torch

from clframe.accounting import MacCounter
from clframe.core import parse
from clframe.data.avalanche import import_avalanche
from clframe.exits import ExitPolicy, select
from clframe.exits.dynamic import DynamicNetwork
from clframe.nn import GrowingLinear, Network
from clframe.nn.backbones import mlp
from clframe.training.learner import Learner
from clframe.training.prediction_cost import policy_of, prediction_cost, stops_B

import_avalanche()

CLASSES = 3


def learner(strategy: str, *, width: int = 7, depth: int = 3) -> Learner:
    torch.manual_seed(0)
    made = Learner(Network(mlp((1, 2, 2), width=width, depth=depth)), parse(strategy), seed=0)
    made.network.grow(range(CLASSES))
    return made


def samples(count: int) -> torch.Tensor:
    return torch.randn(count, 1, 2, 2, generator=torch.Generator().manual_seed(1))


def test_every_part_by_arithmetic() -> None:
    cost = prediction_cost(learner("exits(at=['layer1'], head='linear') + early_exit(threshold=0.5)"), samples(1))
    assert [(part.name, part.kind, part.macs, part.component) for part in cost.parts] == [
        ("layer1", "stage", 4 * 7, ""),
        ("exit/layer1", "head", 7 * CLASSES, "exits"),
        ("policy/layer1", "policy", 0, "early_exit"),
        ("layer2", "stage", 7 * 7, ""),
        ("layer3", "stage", 7 * 7, ""),
        ("exit/final", "head", 7 * CLASSES, ""),
    ]
    assert cost.cost_K == (28 + 21, 28 + 21 + 49 + 49 + 21)


def test_exits_that_cannot_fire_are_not_computed() -> None:
    cost = prediction_cost(learner("exits(head='linear') + early_exit(threshold=[2.0, 0.5])"), samples(1))
    assert "exit/layer1" not in [part.name for part in cost.parts]
    assert cost.cost_K == (28, 28 + 49 + 21, 28 + 49 + 21 + 49 + 21)


@pytest.mark.parametrize(
    "exits",
    ["exits", "exits(cascade=True)", "exits(ensemble='boosted')", "exits(ensemble='geometric', fit_on='training', fit_epochs=1)",
     "exits(ensemble='product', head='hidden', hidden=5)"],
)  # fmt: skip
@pytest.mark.parametrize("rule", ["threshold=0.4", "measure='entropy', threshold=0.1", "measure='gate', threshold=0.5"])
@pytest.mark.parametrize("fallback", ["last", "confident"])
def test_a_table_of_costs_times_counts_is_what_dynamic_inference_runs(exits: str, rule: str, fallback: str) -> None:
    made = learner(f"{exits} + early_exit({rule}, fallback='{fallback}')")
    if "gate" in rule:
        gate = {"weight_KD": torch.full((3, 3), 0.4), "bias_K": torch.full((3,), -0.2)}
        made.state["early_exit"] = {**made.state["early_exit"], "gate": gate}
    network, policy = made.network.eval(), policy_of(made)
    assert policy is not None
    cost = prediction_cost(made, samples(1))
    x = samples(23)
    dynamic = DynamicNetwork(network, policy, compact=0)
    with MacCounter() as counter:
        answer = dynamic(x)
    with torch.no_grad():
        scores = network.ensemble(network(x).logits)
    stop_B = stops_B(scores, policy)
    if fallback == "last":
        assert torch.equal(stop_B, answer.exit_B) and torch.equal(stop_B, select(scores, policy).exit_B)
    count_K = torch.bincount(stop_B, minlength=len(cost.cost_K)).tolist()
    assert counter.macs == sum(c * n for c, n in zip(cost.cost_K, count_K, strict=True))
    assert cost.cost_K[-1] == sum(part.macs for part in cost.parts)


@pytest.mark.parametrize(
    "strategy", ["naive", "exits", "exits(cascade=True) + early_exit(rule='mean')", "simplecil", "er + icarl"]
)
def test_without_a_policy_all_parts_are_what_an_evaluation_runs(strategy: str) -> None:
    made = learner(strategy)
    if strategy == "simplecil":
        means = (torch.ones(CLASSES, 7),)
        made.state["simplecil"] = {**made.state["simplecil"], "mean": means, "count": torch.ones(CLASSES)}
    assert policy_of(made) is None
    x = samples(1)
    cost = prediction_cost(made, x)
    with torch.no_grad(), MacCounter() as counter:
        made.predict(made.adjust_logits(made.network.eval()(x, taps=made.taps)))
    assert sum(part.macs for part in cost.parts) == cost.cost_K[-1] == counter.macs


def test_nothing_of_the_model_changes() -> None:
    made = learner("exits + early_exit(threshold=0.4)")
    made.network.train()
    made.network.backbone.stages[0].eval()
    flags = [part.training for part in made.network.modules()]
    state, generator = {k: v.clone() for k, v in made.network.state_dict().items()}, torch.get_rng_state()
    prediction_cost(made, samples(1))
    assert [part.training for part in made.network.modules()] == flags
    assert all(torch.equal(state[k], v) for k, v in made.network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)


def test_who_is_never_sure_stops_at_the_last() -> None:
    network = Network(mlp((4,), width=5), exits=[("layer1", GrowingLinear(5))])
    network.grow(range(2))
    scores = network(torch.randn(6, 4)).logits
    assert stops_B(scores, ExitPolicy(thresholds=math.inf)).tolist() == [1] * 6
    assert stops_B(scores, ExitPolicy(thresholds=0.0)).tolist() == [0] * 6
    assert stops_B([s[:0] for s in scores], ExitPolicy(thresholds=0.5)).tolist() == []
