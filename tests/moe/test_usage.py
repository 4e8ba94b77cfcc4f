"""Usage by token, and MACs as they are really executed."""

import math

import pytest
import torch
from torch import nn

from clframe.accounting import count_macs
from clframe.accounting.mac_counter import MacCounter
from clframe.moe import (
    CumulativeShare,
    DynamicK,
    TopK,
    count_usage,
    expert_usage,
    routed_layers,
    set_gate,
    to_experts,
)
from clframe.moe import (
    executors as grouped_product,
)
from clframe.moe.dispatch import Costs, Plan
from clframe.moe.usage import neuron_orders, reorder_values
from clframe.nn import Network
from clframe.nn.backbones import vit_tiny

FREE = Plan(token=0.0, read=0.0, read_all=0.0, margin=1.0, grouped=Costs(0, 0, 0), product=Costs(0, 0, 0), merge=0)


def model_of(*, gated=False, experts=6):
    torch.manual_seed(0)

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.gate, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
            self.act = nn.SiLU()

        def forward(self, x):
            return self.down(self.up(x) * self.act(self.gate(x)))

    net = Gated() if gated else nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16))
    model = nn.Sequential(net).eval()
    (layer,) = to_experts(model, experts=experts, router_width=7).values()
    return model, layer


needs_product = pytest.mark.skipif(
    not grouped_product._grouped_mm_is_correct("cpu", torch.float32),
    reason="no grouped product on the CPU in this torch",
)
GROUPED_MM = pytest.param("grouped_mm", marks=needs_product)


@pytest.mark.parametrize("gate", [TopK(k=2), DynamicK(tau=0.5), CumulativeShare(tau=0.4), DynamicK(tau=1.0)])
@pytest.mark.parametrize("executor", ["dense", "per_token", None])
def test_the_macs_of_a_network_are_those_of_all_experts_without_the_router(gate, executor):
    """Whatever the gate, the executor and the routing of the one sample of zeros that is counted."""
    model, layer = model_of()
    layer.experts.executor, layer.gate = executor, gate
    assert count_macs(model, (16,)) == layer.macs().dense == 2 * 16 * 24
    assert layer.gate == gate and layer.macs().router > 0


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("executor", ["dense", "per_token", "grouped", GROUPED_MM, None])
@pytest.mark.parametrize("gate", [TopK(k=2), DynamicK(tau=0.5), CumulativeShare(tau=0.4), DynamicK(tau=1.0)])
def test_executed_macs_are_what_a_counter_counts(gated, executor, gate):
    model, layer = model_of(gated=gated)
    set_gate(model, gate)
    layer.experts.executor, layer.experts.plan = executor, FREE
    for x in (torch.randn(5, 16), torch.randn(2, 4, 16)):
        with torch.no_grad(), MacCounter() as counter:
            model(x)
        (usage,) = expert_usage(model, x).values()
        assert usage.executed_macs == counter.macs and not counter.uncounted()
        tokens = x[..., 0].numel()
        assert usage.dense_macs == tokens * 24 * 16 * (3 if gated else 2)
        assert usage.router_macs == (0 if gate.keeps_all else tokens * 7 * (16 + 6))
        assert usage.routed_macs == usage.router_macs + int(usage.experts_T.sum()) * 4 * 16 * (3 if gated else 2)
        assert usage.executed_macs >= usage.routed_macs
        assert (usage.executed_macs == usage.routed_macs) == (executor != "dense" or gate.keeps_all)


@pytest.mark.parametrize("executor", ["dense", "grouped", GROUPED_MM])
def test_backward_is_two_products_for_each_of_forward(executor):
    _, layer = model_of(gated=True)
    x, keep = torch.randn(9, 16, requires_grad=True), torch.rand(9, 6) < 0.4
    layer.experts.executor = executor
    with MacCounter() as counter:
        y = layer.experts(x, keep)
        forward = counter.macs
        y.sum().backward()
    assert forward == int(layer.experts.computed(x, keep)) * 4 * 48 and counter.macs == 3 * forward


def test_trying_the_grouped_product_is_not_counted():
    grouped_product._grouped_mm_is_correct.cache_clear()
    with MacCounter() as counter:
        grouped_product._grouped_mm_is_correct("cpu", torch.float32)
    assert counter.macs == 0


def test_merged_execution_counts_what_it_computes():
    model, layer = model_of(experts=12)
    # Never everything; a pair costs so much that two neighbors at a time are cheaper wherever tokens keep both.
    layer.experts.plan = Plan(margin=1e9, grouped=Costs(0, 0, 1e6), product=Costs(1e15, 0, 0), merge=4)
    set_gate(model, TopK(k=8))
    x = torch.randn(9, 16)
    with torch.no_grad(), MacCounter() as counter:
        model(x)
    (usage,) = expert_usage(model, x).values()
    pairs = int(layer.keep(x).view(9, 6, 2).any(2).sum())
    assert pairs < 9 * 8 < 2 * pairs
    assert usage.executed_macs == counter.macs == usage.router_macs + pairs * 2 * 64
    assert usage.routed_macs == usage.router_macs + 9 * 8 * 64


def test_experts_by_token_and_sample_in_a_network():
    torch.manual_seed(0)
    network = Network(vit_tiny((1, 8, 8), width=16, depth=2, patch=4))
    network.grow([0, 1])
    assert expert_usage(network, torch.randn(2, 1, 8, 8)) == {}
    to_experts(network, experts=8, router_width=32)
    set_gate(network, DynamicK(tau=0.4))
    network.train()
    x = torch.randn(3, 1, 8, 8)
    usage = expert_usage(network, x)
    assert list(usage) == list(routed_layers(network)) and network.training and network.backbone.training
    for name, layer in routed_layers(network).items():
        seen = []
        layer.observer = seen.append
        with torch.no_grad():
            network.eval()(x)
        layer.observer = None
        assert torch.equal(usage[name].experts_T, layer.keep(seen[0]).sum(1).view(3, 5))
        assert usage[name].experts_per_token == pytest.approx(float(usage[name].experts_T.float().mean()))
        assert layer.ran is None and layer.chosen is None
    empty = expert_usage(network, x[:0])
    assert all(math.isnan(u.share) and u.experts_T.shape == (0, 5) for u in empty.values())


def test_counting_inside_counting_and_twice_through_one_layer():
    model, layer = model_of()
    twice = nn.Sequential(model[0], model[0])
    set_gate(twice, TopK(k=1))
    x = torch.randn(4, 16)
    with count_usage(twice) as outer, torch.no_grad():
        twice(x)
        assert next(iter(expert_usage(twice, x).values())).experts_T.tolist() == [1] * 8
        twice(x)
    assert next(iter(outer().values())).tokens == 16 and layer.ran is None


def test_a_router_that_is_not_ready_is_not_asked_and_says_so_in_the_state():
    (model, layer), (other, twin) = model_of(), model_of()
    set_gate(model, TopK(k=1))
    set_gate(other, TopK(k=1))
    layer.ready = False
    x = torch.randn(4, 16)
    (usage,) = expert_usage(model, x).values()
    assert usage.experts_per_token == 6 and usage.router_macs == 0 and usage.share == 1
    other.load_state_dict(model.state_dict())
    assert not twin.ready and torch.equal(other(x), model(x))
    layer.ready, layer.when = True, "evaluation"
    other.load_state_dict(model.state_dict())
    assert twin.ready and not torch.equal(other(x), layer.experts(x))
    assert torch.equal(model.train()(x), layer.experts(x)) and torch.equal(model.eval()(x), other(x))


def test_values_follow_their_neurons():
    model, layer = model_of(gated=True)
    names = [name for name, _ in model.named_parameters() if ".experts." in name]
    values = torch.cat([model.get_parameter(name).detach().flatten() for name in names])
    before = neuron_orders(model)
    assert set(before) == {f"0.experts.{row}" for row in ("up", "up_bias", "gate", "gate_bias", "down")}
    layer.experts.regroup(torch.randperm(24, generator=torch.Generator().manual_seed(1)))
    layer.experts.regroup(torch.randperm(24, generator=torch.Generator().manual_seed(2)))
    now = torch.cat([model.get_parameter(name).detach().flatten() for name in names])
    assert not torch.equal(values, now)
    assert torch.equal(reorder_values(model, names, values, before), now)
    assert torch.equal(reorder_values(model, names, now, neuron_orders(model)), now)
