"""Quadratic penalties by estimated importances, against sums written longhand."""

from __future__ import annotations

import pytest
import torch

from clframe.core import Experience, StepContext
from clframe.data import TensorSamples
from clframe.errors import ConfigError
from clframe.nn import BACKBONES, GrowingLinear, Network
from clframe.regularization.importance import quadratic
from clframe.regularization.penalties import QuadraticPenalty
from clframe.seeding import generator_for


def network(exits):
    torch.manual_seed(0)
    heads = [("layer1", GrowingLinear(3)) for _ in range(exits - 1)]
    net = Network(BACKBONES.get("mlp")((2,), width=3), exits=heads)
    net.grow(range(2))
    return net


def context(samples=5):
    x = torch.randn(samples, 2, generator=torch.Generator().manual_seed(1))
    part = TensorSamples(x, torch.arange(samples) % 2)
    return StepContext(Experience(0, 2, (0, 1), (), (), part), 0, 1, generator_for(0, 0))


def learnt(penalty, net, now):
    """The state during a second experience, importances being mean absolute gradients of the first logit."""
    state = penalty.resize(net, penalty.empty())
    state = penalty.estimate(
        net, now, state, loss=lambda logits_BC, _: logits_BC[:, 0].mean(), power=1,
        combine=lambda old, new_P, at_P: quadratic(new_P, at_P),
    )  # fmt: skip
    net.grow(range(3))
    return penalty.resize(net, state)


@pytest.mark.parametrize("exits", [1, 2])
@pytest.mark.parametrize("scope", ["exit", "last", "total"])
@pytest.mark.parametrize("heads", ["covered", "free"])
def test_the_penalty_is_that_of_moved_weights(exits, scope, heads):
    net, now, penalty = network(exits), context(), QuadraticPenalty(owner="ewc", scope=scope, heads=heads, batch_size=2)
    samples = now.experience.samples
    wanted = torch.zeros(exits if scope == "exit" else 1)
    groups = {"exit": [[k] for k in range(exits)], "last": [[exits - 1]], "total": [list(range(exits))]}[scope]
    for number, group in enumerate(groups):
        for index in range(len(samples)):
            net.zero_grad()
            output = net(samples.prepare(samples.raw(torch.tensor([index]))))
            sum(output.logits[k][0, 0] for k in group).backward()
            for name, parameter in net.named_parameters():
                if parameter.grad is not None and (heads == "covered" or not name.startswith("heads")):
                    wanted[number] += 0.25 * parameter.grad.abs().sum() / len(samples)
    state = learnt(penalty, net, now)
    assert penalty.losses(state, scale=3.0)["penalty"].detach().abs().max() == 0
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.5)  # new rows too, which are free
    found = penalty.losses(state, scale=3.0)["penalty"]
    assert found.shape == ((exits,) if scope == "exit" else ())
    torch.testing.assert_close(found.reshape(-1), 3 * wanted if scope == "exit" else 3 * wanted.sum()[None])


def test_importances_above_a_ceiling_are_cut():
    net, penalty = network(1), QuadraticPenalty(owner="mas", ceiling=1e-3)
    state = learnt(penalty, net, context())
    assert float(state["terms"][0]["importance"].max()) == pytest.approx(1e-3)


def test_nothing_is_held_at_first_and_messages_name_the_owner():
    penalty = QuadraticPenalty(owner="mas")
    assert penalty.losses(penalty.resize(network(1), penalty.empty()), scale=1.0) == {}
    with pytest.raises(ConfigError, match=r"^components.mas.ceiling: found 0; give a number above 0, or none$"):
        QuadraticPenalty(owner="mas", ceiling=0)
    net = network(1)
    state = penalty.resize(net, penalty.empty())
    with torch.no_grad():
        next(net.parameters()).fill_(float("nan"))
    with pytest.raises(ConfigError, match=r"^components.mas.lamb: found a value with which training diverged"):
        penalty.estimate(
            net, context(), state, loss=lambda z_BC, _: z_BC.mean(), power=1, combine=lambda old, a, b: quadratic(a, b)
        )
