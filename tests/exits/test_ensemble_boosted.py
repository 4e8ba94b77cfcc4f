"""Boosted exits: each adds its logits to those of the exit before, whose gradient is cut."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from clframe.nn import GrowingLinear, Network
from clframe.nn.backbones import mlp


def built(*, boosted: bool = True, gaps: bool = False) -> Network:
    torch.manual_seed(0)
    exits = [("layer1", GrowingLinear(6)), ("layer2", GrowingLinear(6)), ("layer2", GrowingLinear(6))]
    network = Network(mlp((1, 3, 3), width=6, depth=3), exits=exits)
    network.grow([0, 2] if gaps else [0, 1, 2])
    network.boosted = boosted
    return network


def own(network: Network, x: torch.Tensor) -> list[torch.Tensor]:
    """Logits of each head without the others."""
    logits, value = [], x
    for stage, exits in zip(network.backbone.stages, network.exits_at, strict=True):
        value = stage(value)
        logits += [network.heads[exit](value) for exit in exits]
    return logits


@pytest.mark.parametrize("batch", [1, 5])
def test_the_scores_of_an_exit_are_the_sum_up_to_it(batch):
    network, x = built(), torch.randn(batch, 1, 3, 3)
    each = torch.stack(own(network, x))
    found = torch.stack(network(x).logits)
    torch.testing.assert_close(found, each.cumsum(0), rtol=1e-6, atol=1e-6)
    assert torch.equal(found[0], each[0])
    network.boosted = False
    assert torch.equal(torch.stack(network(x).logits), each)


@pytest.mark.parametrize("exit", range(4))
def test_the_loss_of_an_exit_reaches_its_own_head_alone(exit):
    network, x = built(), torch.randn(4, 1, 3, 3)
    cross_entropy(network(x).logits[exit], torch.tensor([0, 1, 2, 1])).backward()
    for other, head in enumerate(network.heads):
        if other == exit:
            assert head.weight.grad.abs().sum() > 0
        else:
            assert head.weight.grad is None
            assert head.bias.grad is None
    depth = [0, 1, 1, 2][exit]
    for stage, module in enumerate(network.backbone.stages):
        reached = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters()]
        assert all(reached) if stage <= depth else not any(reached)


@pytest.mark.parametrize("exit", range(4))
def test_the_gradient_is_that_of_the_head_with_the_others_held_constant(exit):
    network, x, y = built(), torch.randn(4, 1, 3, 3), torch.tensor([2, 1, 0, 1])
    loss = cross_entropy(network(x).logits[exit], y)
    parameters = [*network.backbone.stages[0].parameters(), *network.heads[exit].parameters()]
    found = torch.autograd.grad(loss, parameters)
    each = own(network, x)
    constant = sum((logits_BC.detach() for logits_BC in each[:exit]), torch.zeros(4, 3))
    expected = torch.autograd.grad(cross_entropy(each[exit] + constant, y), parameters)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_classes_not_met_stay_out_without_a_nan():
    network, x = built(gaps=True), torch.randn(4, 1, 3, 3)
    logits = network(x).logits
    assert all((logits_BC[:, 1] == -torch.inf).all() for logits_BC in logits)
    sum(cross_entropy(logits_BC, torch.tensor([0, 2, 0, 2])) for logits_BC in logits).backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())
