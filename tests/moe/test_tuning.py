"""Executors chosen from measured times."""

import pytest
import torch
from torch import nn

from clframe.errors import UnsupportedError
from clframe.moe import DynamicK, TopK, count_usage, routed_layers, to_experts
from clframe.moe import dispatch as execute
from clframe.moe.dispatch import BREAK_EVEN, choose
from clframe.moe.routed import Measured
from clframe.moe.tuning import measure_layer, tune


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)))
    to_experts(made, experts=8, split="random", router_width=16)
    return made.eval()


def test_the_fastest_is_used_for_its_gate_and_size(model):
    (layer,) = routed_layers(model).values()
    layer.gate, x = TopK(k=2), torch.randn(40, 16)
    with torch.no_grad():
        dense, routed = layer.experts(x), model(x)
    assert float((dense - routed).abs().max()) > 0.01
    layer.measured = (Measured(TopK(k=2), 40, "grouped"), Measured(TopK(k=2), 100, "all"), Measured(TopK(k=3), 40, "all"))

    def computed(tokens):
        with count_usage(model) as usage, torch.no_grad():
            y = model(x[:tokens])
            (used,) = usage().values()
        return y, used.computed / tokens, used.routed

    for tokens, experts, routes in ((40, 2, True), (19, None, True), (20, 2, True)):
        y, found, routed_tokens = computed(tokens)
        torch.testing.assert_close(y, routed[:tokens])
        assert routed_tokens == (tokens if routes else 0) and (experts is None or found == experts)
    # All experts, without the router: the dense network.
    layer.measured += (Measured(TopK(k=2), 40, "all"),)
    y, found, routed_tokens = computed(40)
    torch.testing.assert_close(y, dense)
    assert (found, routed_tokens) == (8, 0)
    layer.gate = DynamicK(tau=0.5)
    assert computed(40)[2] == 40


def test_candidates_and_choice(model):
    (layer,) = routed_layers(model).values()
    layer.gate, x = TopK(k=2), torch.randn(40, 16)
    results = []

    def clock(call):
        results.append(call())
        return float(10 - len(results))

    with torch.no_grad():
        found = measure_layer(layer, x, bypass=True, clock=clock)
        assert found.chosen == list(found.ms)[-1] == "all" and found.share == 0.25 and found.tokens == 40
        torch.testing.assert_close(results[0], model(x))
        torch.testing.assert_close(results[-1], layer.experts(x))
        assert "all" not in measure_layer(layer, x, bypass=False, clock=lambda call: 1.0).ms


def test_a_cpu_counts_every_batch(model):
    with pytest.raises(UnsupportedError, match=r"^tune: found experts on the CPU, .*; leave it out$"):
        tune(model, torch.randn(4, 16))
    with pytest.raises(UnsupportedError, match=r"^tune: found no experts in Linear; convert it first$"):
        tune(nn.Linear(3, 3), torch.randn(4, 3))


def test_on_cuda_the_share_of_a_top_k_gate_decides(model, monkeypatch):
    (layer,) = routed_layers(model).values()
    monkeypatch.setattr(execute, "triton_works", lambda weights, x: True)
    weights = layer.experts.weights()

    def chosen(tokens, share):
        return execute._on_cuda(weights, torch.empty(tokens, 16), share)

    assert [chosen(513, share) for share in (None, BREAK_EVEN, BREAK_EVEN + 0.01)] == ["triton", "triton", "dense"]
    assert chosen(512, 0.1) == "dense"
    seen = []
    monkeypatch.setattr(execute, "choose", lambda *args, share, **options: seen.append(share) or choose(*args, **options))
    layer.gate = TopK(k=2)
    with torch.no_grad():
        model(torch.randn(40, 16))
        layer.gate = DynamicK(tau=0.5)
        model(torch.randn(40, 16))
    assert seen == [0.25, None]


