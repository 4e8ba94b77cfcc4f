"""Pooling against torch's own, against windows written longhand, and at its two ends."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from clframe.exits.layers import Blend, FlattenTo, MaxAveragePool, SDNPool

SIZES = [(8, 8), (7, 5), (1, 6), (3, 1), (1, 1), (32, 9), (14, 14), (4, 3)]


def pool_with(a: float, size: int | None = None) -> SDNPool:
    pool = SDNPool(size=size)
    with torch.no_grad():
        pool.a.fill_(a)
    return pool


@pytest.mark.parametrize("size", [None, 4], ids=str)
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_a_of_zero_is_the_average_and_of_one_the_maximum(shape, size):
    x = torch.randn(2, 3, *shape)
    maximum, average = MaxAveragePool(size=size)(x)
    assert torch.equal(pool_with(0, size)(x), average)
    assert torch.equal(pool_with(1, size)(x), maximum)
    for a in (0.3, -0.5, 1.7):  # a is not held in [0, 1]
        torch.testing.assert_close(pool_with(a, size)(x), a * maximum + (1 - a) * average)


def test_windows_of_two_drop_the_last_of_an_odd_side_and_leave_a_side_of_one():
    x = torch.arange(15.0).reshape(1, 1, 5, 3)
    maximum, average = MaxAveragePool()(x)
    assert maximum.tolist() == [[[[4.0], [10.0]]]]  # rows 0-1 and 2-3, columns 0-1
    assert average.tolist() == [[[[2.0], [8.0]]]]
    row = torch.arange(5.0).reshape(1, 1, 1, 5)
    assert MaxAveragePool()(row)[0].tolist() == [[[[1.0, 3.0]]]]
    assert MaxAveragePool()(row)[1].tolist() == [[[[0.5, 2.5]]]]
    one = torch.randn(2, 3, 1, 1)
    assert torch.equal(SDNPool()(one), one)


@pytest.mark.parametrize("size", [1, 2, 4, 5])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_pooling_to_a_size_is_torchs_adaptive_pooling(shape, size):
    x = torch.randn(2, 3, *shape, dtype=torch.float64)
    target = (min(size, shape[0]), min(size, shape[1]))
    maximum, average = MaxAveragePool(size=size)(x)
    assert torch.equal(maximum, F.adaptive_max_pool2d(x, target))
    torch.testing.assert_close(average, F.adaptive_avg_pool2d(x, target))
    assert maximum.shape[2:] == average.shape[2:] == target


def test_the_scalar_starts_uniform_and_follows_the_seed():
    torch.manual_seed(3)
    drawn = torch.stack([Blend().a.detach() for _ in range(2000)])
    assert drawn.shape == (2000,)
    assert 0 <= drawn.min() < 0.01 < 0.99 < drawn.max() < 1
    assert abs(drawn.mean().item() - 0.5) < 0.03
    torch.manual_seed(3)
    assert SDNPool().a.item() == drawn[0].item()


@pytest.mark.parametrize("size", [None, 4], ids=str)
def test_gradients_are_those_of_the_formula(size):
    torch.manual_seed(0)
    pool = SDNPool(size=size).double()
    x = torch.randn(2, 2, 7, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, a: torch.lerp(*MaxAveragePool(size=size)(x)[::-1], a), (x, pool.a))
    pool(x).sum().backward()
    maximum, average = pool.pools(x)
    torch.testing.assert_close(pool.a.grad, (maximum - average).sum())


def test_half_precision_maps_stay_half_precision():
    x = torch.randn(2, 3, 6, 6, dtype=torch.bfloat16)
    assert SDNPool()(x).dtype == torch.bfloat16  # as under autocast, where the scalar stays float32


@pytest.mark.parametrize("inputs", [1, 2, 6, 7, 64])
@pytest.mark.parametrize("features", [1, 2, 3, 7, 12, 128])
def test_flattening_to_a_width_is_adaptive_average_pooling(inputs, features):
    x = torch.randn(3, inputs, dtype=torch.float64)
    layer = FlattenTo(features, inputs=inputs).double()
    torch.testing.assert_close(layer(x), F.adaptive_avg_pool1d(x[:, None], features)[:, 0])
    longhand = [
        [
            float(sum(row[math.floor(i * inputs / features) : math.ceil((i + 1) * inputs / features)]))
            / (math.ceil((i + 1) * inputs / features) - math.floor(i * inputs / features))
            for i in range(features)
        ]
        for row in x.tolist()
    ]
    torch.testing.assert_close(layer(x), torch.tensor(longhand, dtype=torch.float64))


def test_flattening_to_a_multiple_repeats_and_keeps_no_state():
    x = torch.randn(2, 3, 1, 2)
    layer = FlattenTo(18, inputs=6)
    assert torch.equal(layer(x), x.flatten(1).repeat_interleave(3, 1))
    assert torch.equal(FlattenTo(6, inputs=6)(x), x.flatten(1))
    assert not layer.state_dict()
    assert not list(layer.parameters())
