"""Activation sparsity: exact limits, longhand rules, published baselines."""

from __future__ import annotations

import math

import pytest
import torch

from clframe.errors import ConfigError
from clframe.sparsity import functional as S
from clframe.sparsity.functional import baseline_sparsity


def gaussian(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def top_p_longhand(row, p, power=1.0):
    """The smallest prefix of sorted magnitudes that reaches p of the mass, then ties."""
    order = sorted(range(len(row)), key=lambda i: -abs(row[i]))
    mass = [abs(row[i]) ** power for i in order]
    total, kept, run = sum(mass), 0, 0.0
    while run < p * total - 1e-15 and kept < len(row):
        run += mass[kept]
        kept += 1
    least = abs(row[order[kept - 1]]) if kept else math.inf
    return [abs(v) >= least and v != 0 for v in row]


@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_hoyer_is_1_for_one_active_n_for_uniform_and_between(n):
    one = torch.zeros(3, n, dtype=torch.float64)
    one[:, n // 2] = torch.tensor([1e-3, -2.0, 500.0], dtype=torch.float64)
    assert S.hoyer(one).item() == pytest.approx(1, rel=1e-8)
    assert S.hoyer(torch.full((5, n), -0.3)).item() == pytest.approx(n, rel=1e-5)
    assert 1 - 1e-9 <= S.hoyer(gaussian(4, n)).item() <= n + 1e-9


def test_hoyer_of_nothing_active_is_0_without_gradient():
    x = torch.zeros(2, 5, requires_grad=True)
    value = S.hoyer(x)
    value.backward()
    assert value.item() == 0 and torch.equal(x.grad, torch.zeros(2, 5))


def test_hoyer_is_the_mean_over_tokens_longhand_and_smooth():
    x = gaussian(2, 3, 5)
    rows = [row.tolist() for row in x.reshape(-1, 5)]
    longhand = sum(sum(map(abs, row)) ** 2 / sum(v * v for v in row) for row in rows) / 6
    assert S.hoyer(x).item() == pytest.approx(longhand, rel=1e-12)
    assert torch.autograd.gradcheck(S.hoyer, (gaussian(2, 4, seed=1).requires_grad_(),))


@pytest.mark.parametrize("penalty", [S.hoyer, S.l1])
def test_no_tokens_cost_nothing(penalty):
    x = torch.zeros(0, 4, requires_grad=True)
    value = penalty(x)
    value.backward()
    assert value.item() == 0 and x.grad.shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_does_not_overflow(dtype):
    x = torch.full((2, 1000), 300.0, dtype=dtype)  # the squares' sum is 9e7, beyond float16
    assert S.hoyer(x).item() == pytest.approx(1000, rel=1e-5)
    assert S.l1(x).item() == pytest.approx(3e5, rel=1e-5)


def test_displaced_penalty_pushes_down_until_it_lets_go():
    pre = torch.tensor([[-11.0, -9.0, 1.0]], dtype=torch.float64, requires_grad=True)
    value = S.l1(S.displacement(pre))
    value.backward()
    assert value.item() == 0 + 1 + 11 and pre.grad.tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_top_p_agrees_with_the_longhand_rule(p, power):
    x = torch.cat([gaussian(20, 9), torch.tensor([[1.0] * 9, [0.0] * 9, [0.0] * 8 + [2.0]])])
    mask = S.keep(x, p, kind="top_p", power=power)
    assert mask.tolist() == [top_p_longhand(row, p, power) for row in x.tolist()]


def test_top_p_keeps_ties_and_sums_in_float64():
    assert S.keep(torch.tensor([3.0, 1.0, -1.0, 1.0]), 0.6, kind="top_p").tolist() == [True] * 4
    many = torch.full((4096,), 1.0, dtype=torch.bfloat16)
    many[0] = 4096.0  # in bfloat16 the small ones would never add up to the other half
    assert S.keep(many, 0.5, kind="top_p").sum() == 1
    assert S.keep(many, 0.51, kind="top_p").sum() == 4096


def test_at_p_1_only_zeros_go():
    x = gaussian(6, 11).relu()
    assert torch.equal(S.keep(x, 1.0, kind="top_p"), x > 0)


def test_the_other_masks_longhand():
    x = torch.tensor([[4.0, -3.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert S.keep(x, 0.5, kind="max_p")[0].tolist() == [True, True, True, False]
    assert S.keep(x, 3.0, kind="threshold").tolist() == [[True, True, False, False], [False] * 4]
    assert S.keep(x, 3, kind="top_k")[0].tolist() == [True, True, True, False]
    assert S.keep(x, 9, kind="top_k").all() and not S.keep(x, 0, kind="top_k").any()
    assert S.keep(x, 1.0, kind="max_p")[0].sum() == 1  # the largest always stays
    for kind in ("top_p", "top_k", "max_p", "threshold"):
        assert S.keep(torch.zeros(0, 3), 1, kind=kind).shape == (0, 3)
        assert S.keep(torch.zeros(2, 0), 1, kind=kind).shape == (2, 0)


@pytest.mark.parametrize(
    "kind, value", [("top_p", 1.1), ("max_p", -0.1), ("top_k", 1.5), ("top_k", -1), ("threshold", -1.0), ("top_p", math.nan)]
)
def test_values_out_of_range_are_refused(kind, value):
    with pytest.raises(ConfigError, match=rf"sparsity\.{kind}: found"):
        S.keep(torch.ones(2), value, kind=kind)


def test_sparsity_counts_zeros_by_token():
    assert S.sparsity(torch.tensor([[0.0, 1.0, 0.0, -2.0], [0.0, 0.0, 0.0, 0.0]])).tolist() == [0.5, 1.0]


def test_critical_sparsity_interpolates_the_last_crossing():
    curve = [(0.0, 0.8), (0.4, 0.79), (0.2, 0.85), (0.6, 0.80), (0.8, 0.60)]
    s, score = zip(*curve, strict=True)
    # 0.99 * 0.8 = 0.792 is 0.008 of 0.2 below 0.80, between 0.6 and 0.8.
    assert S.critical_sparsity(s, score, dense=0.8) == pytest.approx(0.6 + 0.2 * 0.008 / 0.2)
    assert S.critical_sparsity(s, score, dense=0.8, share=0.5) == 0.8
    assert S.critical_sparsity([0.5, 0.3], [0.0, 0.1], dense=0.8) == 0.3  # nothing keeps it: the least sparse
    assert S.critical_point(s, score, dense=0.8)[:2] == (3, 4)
    with pytest.raises(ConfigError, match="sweep: found no values"):
        S.critical_sparsity([], [], dense=1.0)
    with pytest.raises(ConfigError, match="found -1.0 for the dense model"):
        S.critical_sparsity([0.0], [-1.0], dense=-1.0)


def test_effective_rank_of_known_spectra():
    assert S.effective_rank(torch.ones(7, 3)) == pytest.approx(1)
    assert S.effective_rank(torch.zeros(7, 3)) == 0 == S.effective_rank(torch.zeros(0, 3))
    values = [3.0, 1.0]
    entropy = -sum(v / 4 * math.log(v / 4) for v in values)
    q = torch.linalg.qr(gaussian(6, 2)).Q
    assert S.effective_rank(q @ torch.diag(torch.tensor(values, dtype=torch.float64))) == pytest.approx(math.exp(entropy))


def test_baselines_are_the_published_ones():
    def share(law):
        return [round(100 * baseline_sparsity(p, kind="top_p", neurons=99, law=law)) for p in (0.99, 0.95, 0.9, 0.8)]
    assert share("gaussian") == [11, 25, 35, 50]
    assert share("laplace") == [14, 30, 41, 56]
    assert baseline_sparsity(0.9, kind="top_p", neurons=9) == pytest.approx(math.erf(math.sqrt(-math.log(0.9))))
    assert baseline_sparsity(1.0, kind="top_p", neurons=9) == 0 and baseline_sparsity(0.0, kind="top_p", neurons=9) == 1


@pytest.mark.parametrize("law", ["gaussian", "laplace"])
@pytest.mark.parametrize("kind, value, power", [("top_p", 0.7, 1.0), ("top_p", 0.7, 2.0), ("max_p", 0.2, 1.0), ("threshold", 0.8, 1.0), ("top_k", 100, 1.0)])
def test_baselines_agree_with_draws(law, kind, value, power):
    n = 500
    x = gaussian(600, n)
    if law == "laplace":
        u = torch.rand(600, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        x = -u.log() / 2**0.5  # exponential magnitudes, root mean square 1
    drawn = (~S.keep(x * 3 if kind != "threshold" else x, value, kind=kind, power=power)).double().mean().item()
    expected = baseline_sparsity(value, kind=kind, neurons=n, law=law, power=power)
    assert drawn == pytest.approx(expected, abs=0.004)


def test_threshold_baseline_scales_with_the_activations():
    assert baseline_sparsity(3.0, kind="threshold", neurons=5, scale=3.0) == pytest.approx(math.erf(1 / math.sqrt(2)))
    assert baseline_sparsity(0.5, kind="max_p", neurons=1) == 0.0


def test_jaccard_of_masks_and_rates():
    a, b = torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.5, 0.5, 1.0])
    assert S.jaccard(a, b) == pytest.approx(1.0 / 2.5)
    assert S.jaccard(a, a) == 1 == S.jaccard(torch.zeros(3), torch.zeros(3))
    assert S.jaccard(torch.tensor([True, False]), torch.tensor([False, True])) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(50, 37), (2, 3, 37), (37,), (0, 37)])
def test_top_p_is_what_sorting_places_gives(dtype, shape):
    x = (torch.randn(*shape, generator=torch.Generator().manual_seed(1)).relu() * 4).round().to(dtype)  # many ties
    size = x.abs().double()
    ordered, order = size.sort(dim=-1, descending=True)
    sums = ordered.cumsum(-1)
    for p in (1.0, 0.9, 0.5, 0.1, 0.0):
        before = (sums < p * sums[..., -1:]).sum(-1, keepdim=True)
        least = size.gather(-1, order.gather(-1, before.clamp(max=36)))
        assert torch.equal(S.keep(x, p, kind="top_p"), (size >= least) & (size > 0) & (p * sums[..., -1:] > 0))
