"""Quadratics, layouts, per-sample gradients and path integrals against the formulas written longhand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from clframe.regularization.importance import (
    add_quadratics,
    find_spans,
    flatten,
    gradient_sums,
    gradient_sums_by_loop,
    move_to_layout,
    path_importance,
    penalty_values,
    quadratic,
    squared_norm,
)

F64 = torch.float64


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def value(terms, weight_P):
    return (terms["importance"] * (weight_P - terms["center"]) ** 2).sum() + terms["constant"]


def three_quadratics(size=7):
    importances = [draws(size, seed=i).abs() for i in range(3)]
    importances[0][:2] = 0
    importances[1][1:3] = 0
    return [quadratic(a, draws(size, seed=9 + i)) for i, a in enumerate(importances)]


def test_a_sum_of_quadratics_is_one_at_every_point():
    a, b, c = three_quadratics()
    whole = add_quadratics(add_quadratics(a, b), c)
    for seed in range(5):
        weight_P = 3 * draws(7, seed=seed)
        expected = value(a, weight_P) + value(b, weight_P) + value(c, weight_P)
        assert torch.allclose(value(whole, weight_P), expected, rtol=1e-12)
    assert whole["constant"] > 0.1


def test_adding_a_quadratic_without_importance_changes_nothing():
    a, _, _ = three_quadratics()
    nothing = quadratic(torch.zeros(7, dtype=F64), draws(7, seed=5))
    for whole in (add_quadratics(a, nothing), add_quadratics(nothing, a)):
        assert torch.allclose(value(whole, draws(7)), value(a, draws(7)), rtol=1e-13)
    assert not torch.isnan(add_quadratics(nothing, nothing)["center"]).any()


def test_penalties_are_the_formula_and_so_is_their_gradient():
    first, second = draws(2, 3).requires_grad_(), draws(4, seed=1).requires_grad_()
    upper, lower = draws(6, seed=2).abs(), draws(5, seed=3).abs()
    terms = [quadratic(upper, draws(6, seed=4)), quadratic(lower, draws(5, seed=5))]
    spans = [((0, 2), (6, 10)), ((1, 6),)]
    flat_P = torch.cat([first.flatten(), second])
    parts = [torch.cat([flat_P[:2], flat_P[6:]]), flat_P[1:6]]
    expected_K = torch.stack([value(t, part) for t, part in zip(terms, parts, strict=True)])
    found_K = penalty_values([first, second], terms, spans)
    assert torch.allclose(found_K, expected_K, rtol=1e-13)
    weight_K = torch.tensor([0.3, 2.0], dtype=F64)
    wanted = torch.autograd.grad(weight_K @ expected_K, [first, second])
    for a, b in zip(torch.autograd.grad(weight_K @ found_K, [first, second]), wanted, strict=True):
        assert torch.allclose(a, b, rtol=1e-12)
    assert torch.autograd.gradcheck(lambda *w: penalty_values(w, terms, spans), (first, second))


def test_weights_that_do_not_learn_get_no_gradient():
    still, moving = draws(3), draws(3, seed=1).requires_grad_()
    terms = [quadratic(torch.ones(6, dtype=F64), torch.zeros(6, dtype=F64))]
    penalty_values([still, moving], terms, [((0, 6),)]).sum().backward()
    assert still.grad is None and torch.allclose(moving.grad, 2 * moving)


def test_growing_pads_with_zeros_in_every_direction():
    old = (("a", (2, 2)), ("gone", (3,)), ("b", ()))
    new = (("fresh", (2,)), ("a", (3, 3)), ("b", ()))
    found = move_to_layout(torch.arange(1.0, 9.0), old, new)
    assert found.tolist() == [0, 0, 1, 2, 0, 3, 4, 0, 0, 0, 0, 8]
    assert find_spans(new, ["fresh", "b"]) == ((0, 2), (11, 12))
    assert find_spans(new, []) == ()


def net():
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 4),
    ]
    model = nn.Sequential(*layers).double()
    model(draws(9, 1, 6, 6))
    return model.eval()


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("samples, chunk", [(5, 2), (1, 8), (4, 4)])
def test_gradient_sums_are_those_of_one_sample_after_the_other(power, samples, chunk):
    model, x, y = net(), draws(samples, 1, 6, 6), torch.arange(samples) % 4
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss_of(values, x_1, y_1):
        return F.cross_entropy(functional_call(model, values, (x_1[None],)), y_1[None])

    expected = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for b in range(samples):
        model.zero_grad()
        F.cross_entropy(model(x[b : b + 1]), y[b : b + 1]).backward()
        for name, p in model.named_parameters():
            expected[name] += p.grad.abs() ** power
    for found in (
        gradient_sums(loss_of, parameters, x, y, power=power, chunk=chunk),
        gradient_sums_by_loop(loss_of, parameters, x, y, power=power),
    ):
        assert all(torch.allclose(found[name], expected[name], rtol=1e-10) for name in expected)


def test_what_cannot_be_batched_goes_one_by_one():
    calls = []

    def loss_of(values, x_1, y_1):
        calls.append(1)
        return values["w"] * x_1 if float(x_1.sum()) > 0 else 3 * values["w"]  # asks for a value: not under vmap

    x, parameters = torch.tensor([2.0, -1.0]), {"w": torch.tensor(1.0)}
    found = gradient_sums(loss_of, parameters, x, torch.zeros(2), power=2, chunk=2)
    assert found["w"].item() == 2**2 + 3**2 and len(calls) == 3


def test_path_importance():
    old, path, moved = 0.1 * draws(6).abs(), draws(6, seed=1), draws(6, seed=2)
    found = path_importance(old, path, moved, damping=0.1)
    expected = torch.tensor([max(0.0, o + p / (m**2 + 0.1)) for o, p, m in zip(old, path, moved, strict=True)])
    assert torch.allclose(found, expected.to(F64), rtol=1e-6) and 0 < (found == 0).sum() < 6


def test_squared_norm_leaves_out_classes_not_met():
    logits_BC = torch.tensor([[1.0, -torch.inf, 2.0], [0.0, -torch.inf, 3.0]], requires_grad=True)
    loss = squared_norm(logits_BC)
    loss.backward()
    assert loss.item() == (1 + 4 + 9) / 2
    assert logits_BC.grad.tolist() == [[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]]


def test_flat_of_nothing():
    assert flatten([]).shape == (0,)
