"""Splitting a dense network: a permutation, whatever the split."""

import copy
from math import sqrt

import pytest
import torch
from torch import nn

from clframe.errors import ConfigError
from clframe.moe.convert import assign_evenly, balanced_kmeans, expert_count, split_neurons
from clframe.moe.experts import ExpertLayer


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def dense(d=7, f=12, o=5, *, gated=False, biased=True, dtype=torch.float64):
    torch.manual_seed(1)
    up, gate, down = (nn.Linear(*shape, bias=biased, dtype=dtype) for shape in ((d, f), (d, f), (f, o)))
    act = nn.GELU()

    def forward(x):
        return down(up(x) * act(gate(x)) if gated else act(up(x)))

    def layer(experts, order=None):
        return ExpertLayer(
            (up.weight, up.bias), (down.weight, down.bias), activation=act, experts=experts,
            gate=(gate.weight, gate.bias) if gated else None, order_F=order,
        )  # fmt: skip

    return forward, layer, (up, gate if gated else None, down)


@pytest.mark.parametrize(("gated", "biased"), [(False, True), (False, False), (True, True), (True, False)])
@pytest.mark.parametrize("experts", [1, 3, 12])
def test_all_experts_are_the_dense_network_and_back(gated, biased, experts):
    forward, make, parts = dense(gated=gated, biased=biased)
    layer = make(experts, torch.randperm(12, generator=generator()))
    x = torch.randn(4, 7, dtype=torch.float64)
    torch.testing.assert_close(layer(x), forward(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x, torch.ones(4, experts, dtype=torch.bool)), forward(x), rtol=1e-12, atol=1e-12)
    for own, part in zip(layer.to_dense(), parts, strict=True):
        assert (own is None) == (part is None)
        if own is not None:
            assert torch.equal(own[0], part.weight) and (own[1] is None or torch.equal(own[1], part.bias))
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for part in parts if part for p in part.parameters())


def test_experts_are_sums_of_their_neurons():
    _, make, (up, _, down) = dense()
    order = torch.randperm(12, generator=generator())
    layer, x = make(4, order), torch.randn(6, 7, dtype=torch.float64)
    hidden = nn.functional.gelu(up(x))
    for e in range(4):
        own = order[3 * e : 3 * e + 3]
        expected = hidden[:, own] @ down.weight[:, own].t()
        keep = torch.zeros(6, 4, dtype=torch.bool)
        keep[:, e] = True
        torch.testing.assert_close(layer(x, keep), expected + down.bias)
        torch.testing.assert_close(layer.norms(x)[:, e], expected.square().sum(1).sqrt())
        torch.testing.assert_close(layer.hidden(x)[:, e], hidden[:, own])


def test_regrouping_changes_experts_but_not_their_sum():
    forward, make, _ = dense(gated=True)
    layer, x = make(4, torch.randperm(12, generator=generator())), torch.randn(3, 7, dtype=torch.float64)
    before, norms = layer.to_dense(), layer.norms(x)
    layer.regroup(torch.randperm(12, generator=generator(5)))
    torch.testing.assert_close(layer(x), forward(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(before[0][0], layer.to_dense()[0][0]) and not torch.allclose(norms, layer.norms(x))


def test_prepared_views_follow_the_weights():
    _, make, _ = dense()
    layer, x = make(4), torch.randn(1, 7, dtype=torch.float64)
    keep = torch.tensor([[True, False, False, False]])

    def fresh():
        return layer(x, keep).detach()  # with gradients nothing is prepared

    def same():
        with torch.no_grad():
            torch.testing.assert_close(layer(x, keep), fresh_y, rtol=1e-12, atol=1e-12)

    fresh_y = fresh()
    same()
    with torch.no_grad():
        layer.up.mul_(2)
    fresh_y = fresh()
    same()
    layer.down.data = layer.down.data.clone() * 3
    fresh_y = fresh()
    same()
    layer.bias = nn.Parameter(torch.ones(5, dtype=torch.float64))
    fresh_y = fresh()
    same()
    layer.activation = nn.ReLU()
    fresh_y = fresh()
    same()
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.up.zero_()
        assert not torch.allclose(other(x, keep), layer(x, keep))
    layer.float().double()
    fresh_y = fresh()
    same()


def test_kmeans_finds_what_was_planted():
    directions = torch.eye(6)[:4]
    rows = directions.repeat(5, 1) * torch.rand(20, 1, generator=generator()).add(0.5)
    rows += 0.01 * torch.randn(20, 6, generator=generator(1))
    order = split_neurons(rows, experts=4, split="kmeans", generator=generator(3))
    groups = {tuple(sorted(int(n) % 4 for n in order[5 * e : 5 * e + 5])) for e in range(4)}
    assert groups == {(g,) * 5 for g in range(4)}


@pytest.mark.parametrize("split", ["kmeans", "random", "coactivation"])
@pytest.mark.parametrize("experts", [1, 5, 30])
def test_every_split_is_a_permutation_and_seeded(split, experts):
    rows = torch.randn(30, 9, generator=generator())
    order, again = (split_neurons(rows, experts=experts, split=split, generator=generator(2)) for _ in range(2))
    assert torch.equal(order, again) and sorted(order.tolist()) == list(range(30))
    assert all(own.tolist() == sorted(own.tolist()) for own in order.view(experts, -1))


def test_coactivation_groups_what_fires_together():
    fires_FN = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [3, 9, -2, 0], [-1, 0, 1, 7]])
    order = split_neurons(fires_FN, experts=2, split="coactivation", generator=generator())
    assert {frozenset(order[:2].tolist()), frozenset(order[2:].tolist())} == {frozenset({0, 2}), frozenset({1, 3})}


def test_even_assignment_is_stable_and_beats_chance():
    similarity = torch.rand(60, 6, generator=generator())
    cluster = assign_evenly(similarity)
    assert torch.bincount(cluster, minlength=6).tolist() == [10] * 6
    own = similarity[torch.arange(60), cluster]
    worst = torch.stack([own[cluster == c].min() for c in range(6)])
    assert not ((similarity > own[:, None]) & (similarity > worst)).any()  # nobody and no cluster would both change
    shifted = balanced_kmeans(torch.randn(60, 4, generator=generator()), clusters=6, generator=generator(1))
    assert torch.bincount(shifted).tolist() == [10] * 6


def test_equal_rows_and_zero_rows_end():
    rows = torch.zeros(12, 3)
    assert sorted(split_neurons(rows, experts=4, split="kmeans", generator=generator()).tolist()) == list(range(12))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 5, "expert_size": None}, "moe.experts: found 5; give a divisor of the 12 hidden neurons"),
        ({"experts": None, "expert_size": 0}, "moe.expert_size: found 0; give a divisor of the 12 hidden neurons"),
        ({"experts": 3, "expert_size": 4}, "moe: found both experts and expert_size; give one of them"),
        ({"experts": None, "expert_size": None}, "moe: found neither experts nor expert_size; give one of them"),
    ],
)
def test_sizes_that_do_not_fit(options, message):
    with pytest.raises(ConfigError) as caught:
        expert_count(12, **options)
    assert str(caught.value) == message


def test_autocast_and_half_inputs_keep_the_weights_type():
    _, make, _ = dense(dtype=torch.float32)
    layer, x = make(4), torch.randn(3, 7)
    keep = torch.tensor([[True, False, True, False]]).repeat(3, 1)
    expected = layer(x, keep)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x, keep), expected)
        y = layer(x.bfloat16(), keep)
    assert y.dtype == torch.float32 and float((y - expected).detach().abs().max()) < 0.05 * sqrt(7)


def test_the_type_of_autocast_is_read_while_autocast_is_on(monkeypatch):
    """Routed experts run without autocast, but in its type on CUDA."""
    _, make, _ = dense(dtype=torch.float32)
    layer, enabled = make(4), []
    monkeypatch.setattr(ExpertLayer, "_dtype", lambda self, x: enabled.append(torch.is_autocast_enabled("cpu")) or x.dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.randn(3, 7), torch.ones(3, 4, dtype=torch.bool))
    assert enabled == [True]
