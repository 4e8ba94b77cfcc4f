"""Effective multiply-adds against a count of every single product, and experts against pairs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from clframe.accounting import MacCounter
from clframe.data.avalanche import import_avalanche
from clframe.moe import DynamicK, TopK, count_usage, routed_layers, set_gate, to_experts
from clframe.moe.products import count_products
from clframe.nn import Network
from clframe.nn.backbones import Backbone, mlp, vit_tiny

import_avalanche()


def grown(backbone: Backbone, classes: int = 3) -> Network:
    network = Network(backbone)
    network.grow(range(classes))
    return network


def by_role(network: Network, x: torch.Tensor) -> dict[str, tuple[int, int]]:
    return {row.role: (row.macs, row.effective_macs) for row in count_products(network, x).products}


def test_a_perceptron_by_arithmetic() -> None:
    network = grown(mlp((1, 2, 2), width=5, depth=2))
    with torch.no_grad():
        first, second = network.backbone.stages
        for layer in (first, second):
            for part in layer.modules():
                if isinstance(part, nn.Linear):
                    part.weight.fill_(1.0)
                    part.bias.copy_(torch.tensor([0.0, 0.0, 0.0, -9.0, -9.0]))  # two neurons that never fire
    x = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 0.0, 0.0, 3.0]]).reshape(2, 1, 2, 2)
    # inputs: 2 + 1 of 8 are not zero; of each hidden layer 3 of 5 are not
    assert by_role(network, x) == {
        "linear": (2 * (4 * 5 + 5 * 5), 3 * 5 + 2 * 3 * 5), "head": (2 * 5 * 3, 2 * 3 * 3)
    }  # fmt: skip


CONVOLUTIONS = [
    (nn.Conv1d(4, 6, 3, groups=2, padding=1), (2, 4, 7)),
    (nn.Conv2d(2, 4, (3, 2), stride=2, padding=1), (2, 2, 5, 6)),
    (nn.Conv2d(4, 4, 3, groups=4, dilation=2, padding="same"), (1, 4, 6, 5)),
    (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (1, 2, 4, 5)),
    (nn.Conv3d(2, 4, 2, groups=2), (1, 2, 3, 3, 3)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 3, 2)),
    (nn.ConvTranspose1d(3, 2, 2), (1, 3, 5)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS)
def test_a_convolution_against_its_own_products(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """With weights of one, a pass over where the input is not zero adds up one for each product that is not."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).relu()
    with torch.no_grad():
        ones = type(layer)(**_arguments(layer), bias=False).double()
        for weight in ones.parameters():
            weight.fill_(1.0)
        expected = int(ones((x != 0).double()).sum())
        stages = [("layer", nn.Sequential(layer, nn.Flatten()), (layer(x[:1]).numel(),))]
    network = grown(Backbone(stages, input_shape=shape[1:]))
    dense, effective = by_role(network, x)["convolution"]
    assert 0 < effective == expected < dense


def _arguments(layer: nn.Module) -> dict[str, object]:
    names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"]
    return {name: getattr(layer, name) for name in names}


def vit() -> Network:
    torch.manual_seed(0)
    return grown(vit_tiny((1, 8, 8), width=16, depth=2, patch=4))


def test_feed_forward_networks_are_told_from_the_rest() -> None:
    network, x = vit(), torch.randn(3, 1, 8, 8)
    roles = by_role(network, x)
    tokens = 3 * (4 + 1)
    hidden = next(part.out_features for _, part in network.named_modules()
                  if isinstance(part, nn.Linear) and part.in_features == 16 and part.out_features > 16)  # fmt: skip
    assert roles["up"] == (2 * tokens * 16 * hidden,) * 2 and roles["down"][0] == 2 * tokens * 16 * hidden
    with torch.no_grad(), MacCounter() as counter:
        network.eval()(x)
    assert sum(dense for dense, _ in roles.values()) == counter.macs
    assert all(effective <= dense for dense, effective in roles.values())


@pytest.mark.parametrize("gate", [DynamicK(tau=0.3), DynamicK(tau=1.0), TopK(k=1)])
def test_experts_cost_the_pairs_that_run_and_their_router(gate: DynamicK | TopK) -> None:
    network, x = vit(), torch.randn(3, 1, 8, 8)
    dense = by_role(network, x)
    to_experts(network, experts=4, router_width=3)
    set_gate(network, gate)
    looked = count_products(network, x)
    roles = {row.role: (row.macs, row.effective_macs) for row in looked.products}
    with torch.no_grad(), count_usage(network) as usage:
        network.eval()(x)
        used = usage()
    pairs = sum(sum(layer.ran_E) for layer in used.values())
    expert = next(iter(used.values())).macs.expert
    tokens = 2 * 3 * 5
    assert roles["experts"] == (dense["up"][0] + dense["down"][0], pairs * expert)
    asked = 0 if gate == DynamicK(tau=1.0) else tokens
    assert roles["router"] == (0, asked * 3 * (16 + 4))
    assert (pairs == tokens * 4) == (asked == 0)
    assert sum(row.pairs for row in looked.experts) == pairs
    parts = [row.part for row in looked.experts]
    assert len(set(parts)) == 2 and set(parts) <= set(network.backbone.names)
    assert {role: counts for role, counts in roles.items() if role not in ("experts", "router")} == {
        role: counts for role, counts in dense.items() if role not in ("up", "down")
    }
    # The same, counted while an executor runs that computes these pairs and no more.
    for layer in routed_layers(network).values():
        layer.experts.executor = "grouped"
    with torch.no_grad(), MacCounter() as counter:
        network(x)
    rest = sum(macs for role, (macs, _) in roles.items() if role not in ("experts", "router"))
    if asked:
        assert counter.macs == rest + roles["router"][1] + roles["experts"][1]


def test_nothing_of_the_model_changes() -> None:
    network = vit().train()
    state = {name: value.clone() for name, value in network.state_dict().items()}
    generator = torch.get_rng_state()
    count_products(network, torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert network.training and torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(state[name], value) for name, value in network.state_dict().items())
    hooks = itertools.chain.from_iterable(part._forward_pre_hooks.values() for part in network.modules())
    assert list(hooks) == []
