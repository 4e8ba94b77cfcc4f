"""Classifiers without gradients: running sums against all samples at once, and against the formulas longhand."""

from __future__ import annotations

import math

import pytest
import torch

from clframe.functional.prototypes import (
    cosines,
    discriminant,
    held_out_errors,
    mask_unmet_classes,
    pad_classes,
    random_features,
    ridge_regression,
    scatter_update,
    to_double,
    update_means,
)

FEATURES, CLASSES = 5, 4


def samples(count=37, *, seed=0):
    """Features far from zero, classes in random order, one of them never met."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES - 1, (count,), generator=generator)
    x = torch.randn(count, FEATURES, generator=generator, dtype=torch.float64) * torch.arange(1, 6)
    return x + 100 + y[:, None], y


def streamed(x, y, size, *, published=False):
    mean, count = torch.zeros(CLASSES, FEATURES, dtype=torch.float64), torch.zeros(CLASSES, dtype=torch.float64)
    scatter = torch.zeros(FEATURES, FEATURES, dtype=torch.float64)
    for x_B, y_B in zip(x.split(size), y.split(size), strict=True):
        scatter += scatter_update(x_B, y_B, mean, count, total=count.sum() if published else None)
        mean, count = update_means(mean, count, x_B, y_B)
    return mean, count, scatter


@pytest.mark.parametrize("size", [1, 2, 7, 37])
def test_streaming_is_the_closed_form_on_all_samples_whatever_the_batch(size):
    x, y = samples()
    mean, count, scatter = streamed(x, y, size)
    for c in range(CLASSES - 1):
        torch.testing.assert_close(mean[c], x[y == c].mean(0), rtol=1e-12, atol=0)
    assert mean[3].tolist() == [0.0] * FEATURES and count.tolist() == torch.bincount(y, minlength=4).tolist()
    away = x - torch.stack([x[y == c].mean(0) for c in range(CLASSES - 1)])[y]
    torch.testing.assert_close(scatter, away.T @ away, rtol=1e-9, atol=1e-9)


def test_streaming_does_not_depend_on_the_order_of_samples():
    x, y = samples()
    other = torch.randperm(len(y), generator=torch.Generator().manual_seed(5))
    for a, b in zip(streamed(x, y, 6), streamed(x[other], y[other], 9), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [1, 4, 37])
def test_the_published_scatter_is_the_papers_recursion_sample_by_sample(size):
    """``S_(t+1) = (t S_t + t (z - mu)(z - mu)' / (t + 1)) / (t + 1)``, mu the class mean before z, at first 0."""
    x, y = samples()
    covariance, mu, n = torch.ones(FEATURES, FEATURES).double(), torch.zeros(CLASSES, FEATURES).double(), [0] * 4
    for t, (z, c) in enumerate(zip(x, y.tolist(), strict=True)):
        delta = t * torch.outer(z - mu[c], z - mu[c]) / (t + 1)
        covariance = (t * covariance + delta) / (t + 1)
        mu[c] += (z - mu[c]) / (n[c] + 1)
        n[c] += 1
    mean, _, scatter = streamed(x, y, size, published=True)
    torch.testing.assert_close(scatter / len(y), covariance, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(mean, mu, rtol=1e-12, atol=0)


def test_one_sample_has_no_scatter_and_is_its_class_mean():
    x, y = torch.full((1, FEATURES), 3.0).double(), torch.tensor([2])
    mean, count, scatter = streamed(x, y, 1)
    assert scatter.abs().max() == 0 and mean[2].tolist() == [3.0] * FEATURES and count.tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("shrinkage", [1e-4, 0.5, 1.0])
def test_the_discriminant_ranks_and_spaces_classes_as_the_formula_longhand(shrinkage):
    x, y = samples()
    mean, count, scatter = streamed(x, y, 10)
    weight, bias = discriminant(mean, scatter / len(y), count, shrinkage=shrinkage)
    precision = torch.linalg.inv((1 - shrinkage) * scatter / len(y) + shrinkage * torch.eye(FEATURES).double())
    expected = torch.stack([x @ precision @ mu - 0.5 * mu @ precision @ mu for mu in mean[:3]], dim=1)
    scores = (x @ weight.T + bias)[:, :3]
    torch.testing.assert_close(scores - scores[:, :1], expected - expected[:, :1], rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(scores.softmax(1), expected.softmax(1))


def test_full_shrinkage_is_the_nearest_mean():
    x, y = samples()
    mean, count, scatter = streamed(x, y, 10)
    weight, bias = discriminant(mean, scatter, count, shrinkage=1.0)
    assert torch.equal((x @ weight.T + bias)[:, :3].argmax(1), torch.cdist(x, mean[:3]).argmin(1))


def test_one_class_scores_zero():
    x = samples(8)[0]
    mean, count, scatter = streamed(x, torch.zeros(8).long(), 3)
    weight, bias = discriminant(mean, scatter, count, shrinkage=1e-4)
    assert (x @ weight.T + bias)[:, 0].abs().max() == 0


@pytest.mark.parametrize("ridge", [1e-3, 1.0, 1e3])
def test_ridge_regression_has_a_zero_gradient(ridge):
    h, y = samples()
    targets = torch.nn.functional.one_hot(y, CLASSES).double()
    weight = ridge_regression(h.T @ h, h.T @ targets, ridge=ridge).requires_grad_()
    loss = (h @ weight - targets).square().sum() + ridge * weight.square().sum()
    (gradient,) = torch.autograd.grad(loss, weight)
    assert gradient.abs().max() < 1e-6 * (h.T @ targets).abs().max()
    assert weight[:, 3].abs().max() == 0


def test_ridge_regression_survives_a_system_that_is_singular_in_double_precision():
    h = torch.full((3, 4), 1e8, dtype=torch.float64)
    weight = ridge_regression(h.T @ h, h.T @ torch.ones(3, 1).double(), ridge=1e-8)
    torch.testing.assert_close(h @ weight, torch.ones(3, 1).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(weight, torch.full((4, 1), 0.25e-8).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("fit, held", [(20, 10), (3, 5), (1, 1)])
def test_held_out_errors_are_those_of_each_regression(fit, held):
    h, y = samples(fit + held)
    ridges = (1e-2, 1.0, 1e4)
    errors = held_out_errors(h[:fit], y[:fit], h[fit:], y[fit:], classes=CLASSES, ridges=ridges)
    for error, ridge in zip(errors, ridges, strict=True):
        targets = torch.nn.functional.one_hot(y, CLASSES).double()
        weight = ridge_regression(h[:fit].T @ h[:fit], h[:fit].T @ targets[:fit], ridge=ridge)
        expected = (h[fit:] @ weight - targets[fit:]).square().mean()
        torch.testing.assert_close(error, expected, rtol=1e-6, atol=1e-9)


def test_cosines_and_random_features_longhand():
    x, p = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[6.0, 8.0], [4.0, -3.0], [1.0, 0.0]])
    torch.testing.assert_close(cosines(x, p), torch.tensor([[1.0, 0.0, 0.6], [0.0, 0.0, 0.0]]))
    projected = random_features(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, -1.0], [1.0, 0.0]]))
    assert projected.tolist() == [[3.0, 0.0]]


def test_small_parts():
    assert to_double(torch.ones(2)).dtype == torch.float64
    assert pad_classes(torch.ones(2, 3), 1).shape == (2, 3) and pad_classes(torch.ones(2, 3), 5)[2:].abs().sum() == 0
    scores = mask_unmet_classes(torch.ones(2, 3), torch.tensor([True, False, True]), classes=4)
    assert scores.tolist() == [[1.0, -math.inf, 1.0, -math.inf]] * 2
    assert mask_unmet_classes(torch.ones(1, 1), torch.tensor([True]), classes=0).tolist() == [[1.0]]
