"""A mixture trained from scratch."""

import copy

import pytest
import torch
from torch import nn

from clframe.errors import ConfigError
from clframe.moe import DynamicK, MixtureOfExperts, TopK
from clframe.moe.dispatch import EXECUTORS


def longhand(layer, x):
    """Token by token, its experts weighted by their probabilities among those that run."""
    rows = []
    for n in range(len(x)):
        p = torch.softmax(layer.router @ x[n], 0)
        if isinstance(layer.choice, TopK):
            runs = p.topk(min(layer.choice.k, len(p))).indices.tolist()
        else:
            runs = [e for e in range(len(p)) if p[e] >= (1 - layer.choice.tau) * p.max()]
        y = layer.bias
        for e in runs:
            hidden = layer.up[e] @ x[n] + layer.up_bias[e]
            hidden = hidden.relu() if layer.gate is None else hidden * (layer.gate[e] @ x[n]).relu()
            y = y + p[e] / sum(p[i] for i in runs) * (hidden @ layer.down[e])
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("gate", [TopK(k=1), TopK(k=2), TopK(k=9), DynamicK(tau=0.3), DynamicK(tau=1.0)])
def test_forward_and_gradients_longhand(gate, gated):
    layer = MixtureOfExperts(6, expert_size=5, experts=4, outputs=3, gate=gate, gated=gated).double()
    x = torch.randn(7, 6, dtype=torch.float64)
    y, expected = layer(x), longhand(layer, x)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    own, other = (torch.autograd.grad(out.sin().sum(), list(layer.parameters())) for out in (y, expected))
    torch.testing.assert_close(own, other, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(layer(x.view(1, 7, 6))[0], y)


@pytest.mark.parametrize("executor", ["dense", "per_token", "grouped"])
def test_every_executor(executor):
    layer = MixtureOfExperts(6, expert_size=5, experts=4, gate=TopK(k=2)).double()
    x = torch.randn(7, 6, dtype=torch.float64)
    expected = longhand(layer, x)
    assert executor in EXECUTORS
    layer.executor = executor
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-12)


def test_statistics_and_balance():
    layer = MixtureOfExperts(6, expert_size=5, experts=4, gate=TopK(k=2))
    x = torch.randn(50, 6)
    layer(x)
    p = torch.softmax(x @ layer.router.t(), 1)
    keep = torch.zeros(50, 4).scatter_(1, p.topk(2).indices, 1.0)
    torch.testing.assert_close(layer.probability_E, p.mean(0).detach())
    torch.testing.assert_close(layer.share_E, keep.mean(0))
    torch.testing.assert_close(layer.balance, 4 * (keep.sum(0) / 100 * p.mean(0)).sum())
    layer.balance.backward()
    assert layer.router.grad is not None and float(layer.router.grad.abs().sum()) > 0


def test_balancing_evens_out():
    torch.manual_seed(0)
    layer = MixtureOfExperts(6, expert_size=5, experts=4, gate=TopK(k=1))
    with torch.no_grad():
        layer.router[0] += 2.0
    x = torch.randn(200, 6) + 1
    layer(x)
    before = float(layer.share_E.max())
    optimizer = torch.optim.Adam([layer.router], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        layer(x)
        layer.balance.backward()
        optimizer.step()
    assert before > 0.8 and float(layer.share_E.max()) < 0.5


def test_it_learns_and_new_experts_join():
    torch.manual_seed(0)
    x = torch.randn(128, 6)
    target = torch.where(x[:, :1] > 0, x.roll(1, 1), -x)
    layer = MixtureOfExperts(6, expert_size=8, experts=2, gate=TopK(k=1))

    def train(steps):
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (layer(x) - target).square().mean() + 0.01 * layer.balance
            loss.backward()
            optimizer.step()
        return loss.detach().item()

    first, last = train(1), train(150)
    assert last < 0.5 * first
    old = {n: p.detach().clone() for n, p in layer.named_parameters()}
    assert layer.add_experts(3, generator=torch.Generator().manual_seed(1))
    assert layer.experts == 5 and layer.up.shape == (5, 8, 6) and layer.router.shape == (5, 6)
    for name in ("router", "up", "up_bias", "down"):
        assert torch.equal(getattr(layer, name)[:2], old[name])
    assert torch.equal(layer.bias, old["bias"])
    assert train(150) < last


def test_one_expert_is_a_network():
    layer = MixtureOfExperts(6, expert_size=5, experts=1, gate=TopK(k=1))
    x = torch.randn(4, 6)
    expected = (x @ layer.up[0].t() + layer.up_bias[0]).relu() @ layer.down[0] + layer.bias
    torch.testing.assert_close(layer(x), expected)
    assert float(layer.balance.detach()) == 1


def test_seeds_state_and_empty_batches():
    layer, same, other = (MixtureOfExperts(6, expert_size=5, experts=3, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), same.parameters(), strict=True))
    assert not torch.equal(layer.up, other.up)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 6)
    layer(x)
    copied = copy.deepcopy(layer)  # a teacher, after a forward pass
    assert torch.equal(copied(x), layer(x))
    assert torch.equal(layer(x), other(x)) and set(layer.state_dict()) == {n for n, _ in layer.named_parameters()}
    assert layer(torch.zeros(0, 6)).shape == (0, 6)
    assert isinstance(nn.Sequential(layer)[0], MixtureOfExperts)


def test_sizes_below_one():
    for options in ({"expert_size": 0, "experts": 2}, {"expert_size": 2, "experts": 0}):
        with pytest.raises(ConfigError, match="mixture_of_experts.*: found 0"):
            MixtureOfExperts(4, **options)
