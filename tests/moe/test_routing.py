"""Gates, losses of routers, MACs by arithmetic."""

import math

import pytest
import torch

from clframe.moe.routing import (
    cumulative_share,
    dynamic_k,
    expert_macs,
    load_balance,
    pairs_by_expert,
    router_macs,
    share_loss,
    top_k,
)

SCORES = torch.tensor([[0.0, 3.0, 1.5, 0.1], [2.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]])


@pytest.mark.parametrize("tau", [0.0, 0.25, 0.5, 0.7, 1.0])
def test_dynamic_k_longhand(tau):
    expected = [[score >= (1 - tau) * max(row) for score in row] for row in SCORES.tolist()]
    assert dynamic_k(SCORES, tau).tolist() == expected


def test_dynamic_k_limits():
    scores = torch.rand(50, 7, generator=torch.Generator().manual_seed(0))
    assert bool(dynamic_k(scores, 1.0).all())
    assert torch.equal(dynamic_k(scores, 0.0), top_k(scores, 1))
    counts = [int(dynamic_k(scores, tau).sum()) for tau in (0.0, 0.1, 0.4, 0.8, 1.0)]
    assert counts == sorted(counts)
    assert dynamic_k(scores[:, :1], 0.0).all()
    assert torch.equal(dynamic_k(1e-3 * scores, 0.3), dynamic_k(scores, 0.3))


def test_dynamic_k_runs_an_expert_for_every_token_whatever_the_type():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        scores = torch.rand(300, 5, generator=torch.Generator().manual_seed(1)).to(dtype)
        for tau in (0.0, 1e-4, 0.3):
            assert bool(dynamic_k(scores, tau).any(1).all()) and bool(cumulative_share(scores, tau).any(1).all())


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.6, 0.95, 1.0])
def test_cumulative_share_longhand(tau):
    expected = []
    for row in SCORES.tolist():
        order = sorted(range(4), key=lambda e: -row[e])
        kept, reached = {order[0]}, row[order[0]]
        for e in order[1:]:
            if reached < tau * sum(row) and row[e] > 0:
                kept.add(e)
                reached += row[e]
        expected.append([e in kept for e in range(4)])
    assert cumulative_share(SCORES, tau).tolist() == expected


def test_cumulative_share_runs_no_expert_beyond_the_one_that_reaches_tau_exactly():
    # 5 of 10 are reached by the first expert: 0.9 - 0.4 of the second one's sums is below 0.5 in float32
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        scores = torch.tensor([[0.0, 5.0, 4.0, 1.0], [2.0, 1.0, 0.0, 1.0]], dtype=dtype)
        assert cumulative_share(scores, 0.5).tolist() == [[False, True, False, False], [True, False, False, False]]
        assert cumulative_share(scores, 0.75).tolist() == [[False, True, True, False], [True, True, False, False]]


def test_top_k_longhand_and_with_too_many():
    assert top_k(SCORES[:1], 2).tolist() == [[False, True, True, False]]
    assert top_k(SCORES, 3).sum(1).tolist() == [3, 3, 3]
    assert bool(top_k(SCORES, 9).all())


def test_share_loss_longhand():
    logits = torch.tensor([[0.5, -1.0], [2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    sums = torch.tensor([[4.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    total = 0.0
    for row, targets in zip(logits.tolist(), sums.tolist(), strict=True):
        for logit, target in zip(row, targets, strict=True):
            p = 1 / (1 + math.exp(-logit))
            total -= target / 4 * math.log(p) + (1 - target / 4) * math.log(1 - p)
    assert math.isclose(share_loss(logits, sums).detach().item(), total / 4, rel_tol=1e-12)
    assert torch.autograd.gradcheck(lambda z: share_loss(z, sums), (logits,))
    assert torch.isfinite(share_loss(logits, torch.zeros_like(sums)))


def test_load_balance_is_one_when_even_and_all_experts_when_one_does_everything():
    even = torch.full((8, 4), 0.25)
    assert float(load_balance(even, top_k(torch.eye(4).repeat(2, 1), 1))) == 1
    one = torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(8, 1)
    assert float(load_balance(one, one.bool())) == 4
    probabilities = torch.rand(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    keep = top_k(probabilities.detach(), 2)
    shares = [sum(keep[n, e].item() for n in range(6)) / 12 for e in range(3)]
    means = [sum(probabilities[n, e].item() for n in range(6)) / 6 for e in range(3)]
    expected = 3 * sum(f * p for f, p in zip(shares, means, strict=True))
    assert math.isclose(load_balance(probabilities, keep).detach().item(), expected, rel_tol=1e-12)
    assert torch.autograd.gradcheck(lambda p: load_balance(p, keep), (probabilities,))


def test_pairs_go_expert_by_expert():
    keep = torch.tensor([[True, False, True], [False, False, True]])
    expert, token = pairs_by_expert(keep)
    assert expert.tolist() == [0, 2, 2] and token.tolist() == [0, 0, 1]


def test_macs():
    assert expert_macs(inputs=768, outputs=768, neurons=128, gated=False) * 24 == 2 * 768 * 3072
    assert expert_macs(inputs=5, outputs=3, neurons=2, gated=True) == 2 * 5 * 2 + 2 * 3
    assert router_macs(inputs=5, width=4, experts=3) == 32
