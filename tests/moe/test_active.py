"""Active neurons counted longhand, in every kind of place, and their overlaps against each pair alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clframe.moe import DynamicK, TopK, to_experts
from clframe.moe.usage import ACTIVE_FRACTION, active_mask, active_rates, overlaps
from clframe.nn import BACKBONES
from clframe.sparsity.functional import jaccard


def test_active_is_not_zero_and_a_hundredth_of_the_largest():
    x = torch.tensor([[0.0, 1.0, -100.0, 0.999], [0.0, 0.0, 0.0, 0.0], [1e-9, 0.0, 0.0, -1e-9]])
    assert active_mask(x).int().tolist() == [[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 1]]
    assert ACTIVE_FRACTION == 0.01


def test_an_ffn_is_looked_at_where_its_last_layer_is_entered():
    torch.manual_seed(0)
    up, down = nn.Linear(3, 7), nn.Linear(7, 3)
    net = nn.Sequential(up, nn.GELU(), down)
    x, y = torch.randn(2, 5, 3), torch.randn(1, 5, 3)
    rates = active_rates(net, [x, y], call=net)
    hidden = nn.functional.gelu(up(torch.cat([x, y]))).reshape(15, 7)
    expected = ((hidden != 0) & (hidden.abs() >= 0.01 * hidden.abs().max(1, keepdim=True).values)).double().mean(0)
    assert list(rates) == [""]
    assert rates[""].dtype == torch.float64
    assert rates[""].tolist() == expected.tolist()


def test_masked_tokens_do_not_count_and_layers_of_other_tokens_count_all():
    class Texts(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 3))
            self.text = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3))

        def forward(self, x):
            return self.text(self.words(x)[:, 0])

    torch.manual_seed(0)
    net, x = Texts().eval(), torch.randn(3, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    rates = active_rates(net, [x[:1], x[1:]], call=net, mask=lambda batch: mask[:1] if len(batch) == 1 else mask[1:])
    words, text = net.words[:2](x)[mask], net.text[:2](net.words(x)[:, 0])
    assert (len(words), len(text)) == (7, 3)
    assert rates["words"].tolist() == active_mask(words).double().mean(0).tolist()
    assert rates["text"].tolist() == active_mask(text).double().mean(0).tolist()
    assert active_rates(net, [x], call=net, mask=lambda batch: None)["words"].tolist() != rates["words"].tolist()


def test_positions_of_maps_are_tokens_and_a_shared_activation_is_a_layer_each_time():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.relu = nn.Conv2d(1, 2, 1), nn.Conv2d(2, 3, 1), nn.ReLU()

        def forward(self, x):
            return self.relu(self.second(self.relu(self.first(x))))

    torch.manual_seed(0)
    block, x = Block().eval(), torch.randn(3, 1, 2, 5)
    rates = active_rates(block, [x[:2], x[2:]], call=block)
    inner = block.first(x).relu()
    outer = block.second(inner).relu()
    assert list(rates) == ["relu", "relu#2"]
    for found, maps in zip(rates.values(), (inner, outer), strict=True):
        tokens = maps.permute(0, 2, 3, 1).reshape(30, -1)
        assert found.tolist() == active_mask(tokens).double().mean(0).tolist()


def test_layers_that_end_in_a_relu_count():
    net = BACKBONES.get("mlp")((1, 2, 2), width=5).eval()
    torch.manual_seed(0)
    x = torch.randn(9, 1, 2, 2)
    rates = active_rates(net, [x], call=net)
    assert [len(rate) for rate in rates.values()] == [5, 5]
    first = net.stages[0](x)
    assert next(iter(rates.values())).tolist() == active_mask(first).double().mean(0).tolist()


@pytest.mark.parametrize("gate", [TopK(k=2), DynamicK(tau=1.0)])
def test_neurons_keep_their_places_when_a_network_becomes_experts(gate):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(3, 12), nn.ReLU(), nn.Linear(12, 3)), nn.Linear(3, 2))
    x = torch.randn(31, 3)
    before = active_rates(net, [x], call=net)
    hidden = net[1][:2](x).detach()
    (layer,) = to_experts(net, experts=4, split="random", seed=3).values()
    layer.gate = gate
    after = active_rates(net, [x[:7], x[7:]], call=net)
    assert list(before) == list(after) == ["1"]
    if layer.routes:
        kept = layer.keep(x).repeat_interleave(3, dim=1)[:, layer.experts.order_F.argsort()]
        hidden = hidden * kept
        assert not torch.equal(after["1"], before["1"])
    assert after["1"].tolist() == active_mask(hidden).double().mean(0).tolist()


def test_layers_come_in_order_of_depth_also_where_some_are_experts():
    net = nn.Sequential(*(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)) for _ in range(3)))
    to_experts(net[1], experts=2, split="random")
    assert list(active_rates(net, [torch.randn(5, 3)], call=net)) == ["0", "1.2", "2"]


def test_nothing_where_there_is_neither_and_no_hook_stays():
    linear = nn.Linear(3, 2)
    assert active_rates(linear, [torch.ones(1, 3)], call=linear) == {}
    net = nn.Sequential(nn.Linear(3, 2), nn.ReLU())
    assert active_rates(net, [], call=net) == {}
    active_rates(net, [torch.ones(1, 3)], call=net)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())


@pytest.mark.parametrize(("sets", "neurons"), [(1, 3), (4, 1), (5, 17)])
def test_overlaps_are_those_of_each_pair(sets, neurons):
    rate_EN = torch.rand(sets, neurons, generator=torch.Generator().manual_seed(sets))
    rate_EN[-1] *= rate_EN[-1] > 0.5
    found = overlaps(rate_EN)
    for i in range(sets):
        for j in range(sets):
            assert float(found[i, j]) == pytest.approx(jaccard(rate_EN[i], rate_EN[j]), abs=1e-12)


def test_sets_without_active_neurons_are_equal_and_share_nothing_with_others():
    found = overlaps(torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.5, 0.0]]))
    assert found.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
