"""Linear CKA against its definition written longhand, and the invariances that define it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from clframe.errors import ClframeError
from clframe.functional import similarity
from clframe.functional.similarity import flat_tap, unbiased_linear_cka

SHAPES = [(4, 1, 1), (5, 5, 2), (17, 4, 9), (40, 3, 3), (9, 64, 33)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(samples, features, others, seed=0):
    x_ND = normal(samples, features, seed=seed) + 5
    return x_ND, x_ND @ normal(features, others, seed=seed + 1) + normal(samples, others, seed=seed + 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_with_itself_and_invariant_to_rotation_scale_and_shift(shape):
    x_ND, y_NE = related(*shape)
    assert unbiased_linear_cka(x_ND, x_ND) == pytest.approx(1.0, abs=1e-12)
    rotation_DD = torch.linalg.qr(normal(shape[1], shape[1], seed=5)).Q
    expected = unbiased_linear_cka(x_ND, y_NE)
    for changed_ND in (x_ND @ rotation_DD, -0.001 * x_ND, x_ND + 100 * normal(1, shape[1], seed=6)):
        assert unbiased_linear_cka(changed_ND, y_NE) == pytest.approx(expected, abs=1e-9)
    order_N = torch.randperm(shape[0], generator=torch.Generator().manual_seed(7))
    assert unbiased_linear_cka(x_ND[order_N], y_NE[order_N]) == pytest.approx(expected, abs=1e-12)


def test_a_linear_map_that_is_no_rotation_changes_it():
    x_ND = normal(50, 3)
    stretched = x_ND * torch.tensor([1.0, 10.0, 100.0])
    assert unbiased_linear_cka(x_ND, stretched) < 0.9


def test_unrelated_features_of_many_samples_are_unlike():
    assert unbiased_linear_cka(normal(4000, 3, seed=1), normal(4000, 4, seed=2)) < 0.01


def test_single_precision_features_are_taken_in_double():
    x_ND, y_NE = related(30, 8, 5)
    assert unbiased_linear_cka((x_ND + 1000).float(), y_NE.float()) == pytest.approx(unbiased_linear_cka(x_ND, y_NE), abs=1e-5)


def test_without_variance_there_is_no_similarity():
    x_ND = normal(7, 3)
    assert math.isnan(unbiased_linear_cka(x_ND, torch.full((7, 2), 0.1)))
    assert math.isnan(unbiased_linear_cka(torch.zeros(7, 2), x_ND))
    assert math.isnan(unbiased_linear_cka(x_ND[:3], x_ND[:3]))


def unbiased_longhand(x_ND, y_NE):
    samples = len(x_ND)

    def hsic(k, m):  # sums over distinct indices, the estimate's definition: h is their mean product difference
        index = range(samples)
        pairs = sum(k[i][j] * m[i][j] for i in index for j in index if i != j)
        triples = sum(k[i][j] * m[i][q] for i in index for j in index for q in index if len({i, j, q}) == 3)
        fours = sum(k[i][j] * m[q][r] for i in index for j in index for q in index for r in index
                    if len({i, j, q, r}) == 4)  # fmt: skip
        n1, n2, n3 = samples - 1, samples - 2, samples - 3
        return (pairs / (samples * n1) - 2 * triples / (samples * n1 * n2) + fours / (samples * n1 * n2 * n3))

    k, m = (z @ z.T for z in (x_ND, y_NE))
    k, m = k.tolist(), m.tolist()
    return hsic(k, m) / math.sqrt(hsic(k, k) * hsic(m, m))


@pytest.mark.parametrize("shape", [(4, 2, 3), (7, 12, 3)])
def test_it_is_its_definition_over_distinct_samples(shape):
    x_ND, y_NE = related(*shape)
    assert unbiased_linear_cka(x_ND, y_NE) == pytest.approx(unbiased_longhand(x_ND, y_NE), abs=1e-10)
    assert unbiased_linear_cka(3 * x_ND - 1, y_NE) == pytest.approx(unbiased_linear_cka(x_ND, y_NE), abs=1e-9)
    assert unbiased_linear_cka(x_ND, x_ND) == pytest.approx(1.0, abs=1e-12)


def test_unrelated_features_that_outnumber_the_samples_are_unlike():
    x_ND, y_ND = normal(64, 4000, seed=1), normal(64, 4000, seed=2)
    assert abs(unbiased_linear_cka(x_ND, y_ND)) < 0.02
    assert math.isnan(unbiased_linear_cka(x_ND[:3], y_ND[:3]))
    assert math.isnan(unbiased_linear_cka(x_ND, torch.ones(64, 2)))


def test_a_gram_matrix_in_pieces_is_the_same(monkeypatch):
    x_ND, y_NE = related(6, 23, 11)
    whole = unbiased_linear_cka(x_ND, y_NE)
    monkeypatch.setattr(similarity, "COLUMNS_AT_ONCE", 4)
    assert unbiased_linear_cka(x_ND, y_NE) == pytest.approx(whole, abs=1e-13)


@pytest.mark.parametrize("shapes", [((3, 2), (4, 2)), ((3, 2, 2), (3, 2)), ((0, 2), (0, 2)), ((3,), (3,))])
def test_shapes_that_cannot_be_compared(shapes):
    with pytest.raises(ClframeError, match="linear CKA: shapes"):
        unbiased_linear_cka(*(torch.zeros(shape) for shape in shapes))


def test_large_maps_are_averaged_down_to_the_grid_and_nothing_else_is():
    map_NCHW, small_NCHW, tokens_NTD = normal(5, 2, 8, 6), normal(5, 2, 3, 4), normal(5, 9, 9)
    assert flat_tap(map_NCHW, grid=4).shape == (5, 2 * 4 * 4)
    assert torch.equal(flat_tap(map_NCHW, grid=2), F.avg_pool2d(map_NCHW.float(), (4, 3)).flatten(1))
    assert torch.equal(flat_tap(small_NCHW, grid=4), small_NCHW.flatten(1))
    assert torch.equal(flat_tap(tokens_NTD, grid=2), tokens_NTD.flatten(1))
    assert torch.equal(flat_tap(map_NCHW.contiguous(memory_format=torch.channels_last)), map_NCHW.flatten(1))


