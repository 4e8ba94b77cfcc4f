"""Linear CKA against the formula written longhand, and the invariances that define it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from clframe.errors import ClframeError
from clframe.functional import similarity
from clframe.functional.similarity import (
    cka_from_features,
    cka_from_grams,
    flat_tap,
    linear_cka,
    tap_similarity,
    unbiased_linear_cka,
)

SHAPES = [(2, 1, 1), (3, 5, 2), (17, 4, 9), (40, 3, 3), (9, 64, 33)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(samples, features, others, seed=0):
    x_ND = normal(samples, features, seed=seed) + 5
    return x_ND, x_ND @ normal(features, others, seed=seed + 1) + normal(samples, others, seed=seed + 2)


def longhand(x_ND, y_NE):
    """<K, L> / sqrt(<K, K> <L, L>) with K, L the Gram matrices, centered by H = I - 1/N."""
    samples = len(x_ND)
    center_NN = torch.eye(samples, dtype=torch.float64) - 1 / samples
    gram_x, gram_y = (center_NN @ (z @ z.T) @ center_NN for z in (x_ND, y_NE))
    inner = [sum(float(a * b) for a, b in zip(u.flatten(), v.flatten(), strict=True))
             for u, v in ((gram_x, gram_y), (gram_x, gram_x), (gram_y, gram_y))]  # fmt: skip
    return inner[0] / math.sqrt(inner[1] * inner[2])


@pytest.mark.parametrize("shape", SHAPES)
def test_both_ways_are_the_formula(shape):
    x_ND, y_NE = related(*shape)
    expected = longhand(x_ND, y_NE)
    for way in (linear_cka, cka_from_features, cka_from_grams):
        assert way(x_ND, y_NE) == pytest.approx(expected, abs=1e-10)
        assert way(y_NE, x_ND) == pytest.approx(expected, abs=1e-10)


def test_two_features_by_hand():
    # centered: (1, -1, 0) and (1, 1, -2): <x, y>^2 / (|x|^2 |y|^2) for single features; 0 and 3/4
    x_N1 = torch.tensor([[3.0], [1.0], [2.0]])
    assert linear_cka(x_N1, torch.tensor([[2.0], [2.0], [-1.0]])) == pytest.approx(0.0, abs=1e-15)
    assert linear_cka(x_N1, torch.tensor([[2.0], [1.0], [1.0]])) == pytest.approx(1 / (2 * (2 / 3)), abs=1e-15)


@pytest.mark.parametrize("shape", SHAPES)
def test_one_with_itself_and_invariant_to_rotation_scale_and_shift(shape):
    x_ND, y_NE = related(*shape)
    assert linear_cka(x_ND, x_ND) == pytest.approx(1.0, abs=1e-12)
    rotation_DD = torch.linalg.qr(normal(shape[1], shape[1], seed=5)).Q
    expected = linear_cka(x_ND, y_NE)
    for changed_ND in (x_ND @ rotation_DD, -0.001 * x_ND, x_ND + 100 * normal(1, shape[1], seed=6)):
        assert linear_cka(changed_ND, y_NE) == pytest.approx(expected, abs=1e-9)
    order_N = torch.randperm(shape[0], generator=torch.Generator().manual_seed(7))
    assert linear_cka(x_ND[order_N], y_NE[order_N]) == pytest.approx(expected, abs=1e-12)


def test_a_linear_map_that_is_no_rotation_changes_it():
    x_ND = normal(50, 3)
    stretched = x_ND * torch.tensor([1.0, 10.0, 100.0])
    assert linear_cka(x_ND, stretched) < 0.9


def test_unrelated_features_of_many_samples_are_unlike():
    assert linear_cka(normal(4000, 3, seed=1), normal(4000, 4, seed=2)) < 0.01


def test_single_precision_features_are_taken_in_double():
    x_ND, y_NE = related(30, 8, 5)
    assert linear_cka((x_ND + 1000).float(), y_NE.float()) == pytest.approx(linear_cka(x_ND, y_NE), abs=1e-5)


@pytest.mark.parametrize("way", [linear_cka, cka_from_features, cka_from_grams])
def test_without_variance_there_is_no_similarity(way):
    x_ND = normal(7, 3)
    assert math.isnan(way(x_ND, torch.full((7, 2), 0.1)))
    assert math.isnan(way(torch.zeros(7, 2), x_ND))
    assert math.isnan(way(x_ND[:1], x_ND[:1]))


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
def test_the_unbiased_one_is_its_definition_over_distinct_samples(shape):
    x_ND, y_NE = related(*shape)
    assert unbiased_linear_cka(x_ND, y_NE) == pytest.approx(unbiased_longhand(x_ND, y_NE), abs=1e-10)
    assert unbiased_linear_cka(3 * x_ND - 1, y_NE) == pytest.approx(unbiased_linear_cka(x_ND, y_NE), abs=1e-9)
    assert unbiased_linear_cka(x_ND, x_ND) == pytest.approx(1.0, abs=1e-12)


def test_only_the_unbiased_one_tells_unrelated_features_that_outnumber_the_samples():
    x_ND, y_ND = normal(64, 4000, seed=1), normal(64, 4000, seed=2)
    assert linear_cka(x_ND, y_ND) > 0.9
    assert abs(unbiased_linear_cka(x_ND, y_ND)) < 0.02
    assert math.isnan(unbiased_linear_cka(x_ND[:3], y_ND[:3]))
    assert math.isnan(unbiased_linear_cka(x_ND, torch.ones(64, 2)))


def test_a_gram_matrix_in_pieces_is_the_same(monkeypatch):
    x_ND, y_NE = related(6, 23, 11)
    whole = cka_from_grams(x_ND, y_NE)
    monkeypatch.setattr(similarity, "COLUMNS_AT_ONCE", 4)
    assert cka_from_grams(x_ND, y_NE) == pytest.approx(whole, abs=1e-13)


@pytest.mark.parametrize("shapes", [((3, 2), (4, 2)), ((3, 2, 2), (3, 2)), ((0, 2), (0, 2)), ((3,), (3,))])
def test_shapes_that_cannot_be_compared(shapes):
    with pytest.raises(ClframeError, match="linear CKA: shapes"):
        linear_cka(*(torch.zeros(shape) for shape in shapes))


def test_taps_are_compared_position_by_position():
    map_NCHW, tokens_NTD, flat_ND = normal(9, 3, 5, 7), normal(9, 4, 6), normal(9, 8)
    then = {"map": map_NCHW, "tokens": tokens_NTD, "flat": flat_ND, "gone": flat_ND}
    now = {"flat": 2 * flat_ND, "map": map_NCHW + normal(9, 3, 5, 7, seed=3), "tokens": tokens_NTD.flip(0)}
    found = tap_similarity(then, now)
    assert list(found) == ["flat", "map", "tokens"]
    assert found["flat"] == pytest.approx(1.0, abs=1e-12)
    assert found["map"] == linear_cka(map_NCHW.flatten(1), now["map"].flatten(1)) < 0.99
    assert found["tokens"] == linear_cka(tokens_NTD.flatten(1), tokens_NTD.flip(0).flatten(1)) < 0.9
    assert tap_similarity(then, {"map": map_NCHW.contiguous(memory_format=torch.channels_last)})["map"] == \
        pytest.approx(1.0, abs=1e-12)  # fmt: skip


def test_large_maps_are_averaged_down_to_the_grid_and_nothing_else_is():
    map_NCHW, small_NCHW, tokens_NTD = normal(5, 2, 8, 6), normal(5, 2, 3, 4), normal(5, 9, 9)
    assert flat_tap(map_NCHW, grid=4).shape == (5, 2 * 4 * 4)
    assert torch.equal(flat_tap(map_NCHW, grid=2), F.avg_pool2d(map_NCHW.float(), (4, 3)).flatten(1))
    assert torch.equal(flat_tap(small_NCHW, grid=4), small_NCHW.flatten(1))
    assert torch.equal(flat_tap(tokens_NTD, grid=2), tokens_NTD.flatten(1))
    then, now = {"map": map_NCHW}, {"map": map_NCHW + 0.5 * normal(5, 2, 8, 6, seed=4)}
    assert tap_similarity(then, now, grid=2)["map"] == linear_cka(
        flat_tap(map_NCHW, grid=2), flat_tap(now["map"], grid=2)
    )


def test_taps_that_do_not_match():
    with pytest.raises(ClframeError, match="reference taps: unknown tap 'layer2'; did you mean 'layer1'"):
        tap_similarity({"layer1": normal(3, 2)}, {"layer2": normal(3, 2)})
    with pytest.raises(ClframeError, match="tap 'layer1': 4 samples, 3 in the reference; use the same samples"):
        tap_similarity({"layer1": normal(3, 2)}, {"layer1": normal(4, 2)})
