"""Watching activations: what is measured, for which passes, and that nothing is left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clframe.errors import UnsupportedError
from clframe.nn import BACKBONES, Backbone, Network
from clframe.nn.frozen import freeze
from clframe.sparsity import find_sites, measure_sites, swap_for_relu
from clframe.sparsity.functional import hoyer, l1
from clframe.sparsity.penalties import MEASURED


def network_of(name="mlp", shape=(1, 2, 2), measure=lambda pre, site_activations: hoyer(site_activations), **options):
    torch.manual_seed(0)
    network = Network(BACKBONES.get(name)(shape, **options))
    network.grow([0, 1])
    measure_sites(network, find_sites(network.backbone), measure)
    return network


def test_it_measures_each_layer_with_its_gradient():
    network = network_of(width=8)
    x = torch.randn(5, 1, 2, 2)
    first, second = network.backbone.stages
    hidden = first(x)
    output = network(x)
    assert torch.allclose(output.taps[MEASURED], torch.stack([hoyer(hidden), hoyer(second(hidden))]))
    output.taps[MEASURED][1].backward()
    assert first.weight.grad.abs().sum() > 0


def test_maps_have_their_channels_as_neurons():
    network = network_of("small_cnn", (1, 8, 8), width=4)
    x = torch.randn(3, 1, 8, 8)
    conv = network.backbone.stages[0][0]
    expected = hoyer(F.relu(conv(x)).permute(0, 2, 3, 1))
    assert torch.allclose(network(x).taps[MEASURED][0], expected)


def test_only_training_passes_of_the_whole_network_are_measured():
    network = network_of()
    x = torch.randn(2, 1, 2, 2)
    with torch.no_grad():
        assert MEASURED not in network(x).taps
    network.backbone(x)
    assert MEASURED not in network.eval()(x).taps
    assert MEASURED in network.train()(x, taps=["layer1"]).taps


def test_copies_watch_for_themselves_even_in_the_middle():
    network = network_of()
    x = torch.randn(2, 1, 2, 2)
    names = list(network.state_dict())
    output = network(x)
    twin = copy.deepcopy(network)
    nn.init.zeros_(twin.backbone.stages[0].weight)
    assert not torch.equal(twin(x).taps[MEASURED], output.taps[MEASURED])
    assert torch.equal(network(x).taps[MEASURED], output.taps[MEASURED])
    assert MEASURED not in freeze(network)(x).taps
    assert list(network.state_dict()) == names == list(Network(BACKBONES.get("mlp")((1, 2, 2))).state_dict())


def test_a_failed_pass_leaves_nothing_for_the_next():
    network = network_of()
    x = torch.randn(2, 1, 2, 2)
    before = network(x).taps[MEASURED]
    with pytest.raises(RuntimeError):
        network(torch.randn(2, 3, 2, 2))
    assert torch.equal(network(x).taps[MEASURED], before)


def test_an_empty_batch_measures_0():
    assert network_of()(torch.zeros(0, 1, 2, 2)).taps[MEASURED].tolist() == [0, 0]


def test_functions_and_shared_modules():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.0)
    chain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4), nn.Linear(4, 4))
    for part, fires in (
        (layer, lambda x: layer.linear1(layer.norm1(x + layer.self_attn(x, x, x)[0])).relu()),
        (chain, lambda x: chain[0](x).relu()),
    ):
        network = Network(Backbone.of([("a", part), ("flat", nn.Flatten())], input_shape=(3, 4)))
        network.grow([0])
        measure_sites(network, find_sites(network.backbone), lambda pre, site_activations: l1(site_activations))
        x = torch.randn(2, 3, 4)
        assert torch.allclose(network(x).taps[MEASURED], l1(fires(x))[None], atol=1e-5)


def test_a_module_used_twice_counts_with_its_mean():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x):
            return self.relu(self.relu(x) - 1)

    network = Network(Backbone.of([("a", Twice())], input_shape=(2,)))
    network.grow([0])
    measure_sites(network, find_sites(network.backbone), lambda pre, site_activations: l1(site_activations))
    assert network(torch.tensor([[3.0, 0.5]])).taps[MEASURED].tolist() == [(3.5 + 2.0) / 2]


class Block(nn.Module):
    """A network with a residual connection, gated or not; the activation may be that of other blocks too."""

    def __init__(self, act, gated=False):
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.gate = nn.Linear(4, 6) if gated else None
        self.act = act
        self.down = nn.Linear(6, 4)

    def pre(self, x):
        return self.up(x) if self.gate is None else self.gate(x)

    def forward(self, x):
        hidden = self.act(self.pre(x))
        return x + self.down(hidden if self.gate is None else hidden * self.up(x))


@pytest.mark.parametrize("act", [nn.ReLU(), nn.Hardswish(), nn.ReLU(inplace=True)])
@pytest.mark.parametrize("gated", [False, True])
def test_networks_that_share_an_activation_are_measured_one_by_one(act, gated):
    torch.manual_seed(0)
    first, second = Block(act, gated), Block(act, gated)
    network = Network(Backbone.of([("a", first), ("b", second), ("flat", nn.Flatten())], input_shape=(3, 4)))
    network.grow([0])
    nn.init.constant_(first.up.bias, 3.0)  # so that the layers differ
    sites = find_sites(network.backbone)
    assert [(site.name, site.ffn.activation, site.module) for site in sites] == [(f"stages.{i}", act, None) for i in range(2)]
    measure_sites(network, sites, lambda pre, fired: torch.stack([pre.mean(), l1(fired)]).sum())
    x = torch.randn(5, 3, 4)
    pre_0, pre_1 = first.pre(x), second.pre(first(x))
    wanted = torch.stack([pre_0.mean() + l1(F.hardswish(pre_0) if type(act) is nn.Hardswish else pre_0.relu()),
                          pre_1.mean() + l1(F.hardswish(pre_1) if type(act) is nn.Hardswish else pre_1.relu())])
    assert torch.allclose(network(x).taps[MEASURED], wanted, atol=1e-6)
    assert all(site.overwrites == (act.__dict__.get("inplace") is True) for site in sites)


def test_a_shared_gelu_is_replaced_in_every_block():
    act = nn.GELU()
    net = nn.Sequential(Block(act), Block(act))
    assert swap_for_relu(net) == ("0.act", "1.act") and type(net[0].act) is type(net[1].act) is nn.ReLU


def test_relu_takes_the_place_of_every_gelu_under_all_its_names():
    act = nn.GELU()
    net = nn.Sequential(nn.Linear(3, 7), act, nn.Linear(7, 3), nn.Linear(3, 7), act, nn.Linear(7, 3))
    x = torch.randn(4, 3)
    assert swap_for_relu(net) == ("1", "4") and type(net[4]) is nn.ReLU
    assert torch.equal(net[:3](x), net[2](net[0](x).relu())) and swap_for_relu(net) == ()
    vit = BACKBONES.get("vit_tiny")((1, 8, 8), depth=2)
    assert len(swap_for_relu(vit)) == 2


def test_an_activation_that_nobody_keeps_cannot_be_swapped():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.b(F.gelu(self.a(x)))

    with pytest.raises(UnsupportedError, match="found an activation in Written that is not a module"):
        swap_for_relu(Written())
    kept = nn.TransformerEncoderLayer(4, 2, 6, activation="gelu")
    with pytest.raises(UnsupportedError, match="TransformerEncoderLayer"):
        swap_for_relu(kept)
