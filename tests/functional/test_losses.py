"""Losses against their formulas written longhand, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from clframe.functional.losses import cross_entropy, distillation


def softmax(row):
    top = max(row)
    powers = [math.exp(v - top) for v in row]
    return [p / sum(powers) for p in powers]


def logits(batch, classes, exits, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, classes, generator=generator, dtype=torch.float64) * 3 for _ in range(exits)]


@pytest.mark.parametrize("batch, classes, exits", [(1, 1, 1), (1, 5, 1), (7, 3, 1), (5, 4, 3)])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy(batch, classes, exits, weighted):
    l_K = logits(batch, classes, exits)
    y = torch.arange(batch) % classes
    weight = torch.rand(batch, dtype=torch.float64) + 0.1 if weighted else None
    w = [1.0] * batch if weight is None else weight.tolist()
    expected = [
        sum(-w[b] * math.log(softmax(row[b].tolist())[int(y[b])]) for b in range(batch)) / sum(w) for row in l_K
    ]
    found = cross_entropy(l_K, y, weight_B=weight)
    assert found.shape == (exits,)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12)


def test_weights_of_one_change_nothing_but_rounding():
    l_K, y = logits(6, 4, 2), torch.tensor([0, 1, 2, 3, 0, 1])
    assert torch.allclose(
        cross_entropy(l_K, y), cross_entropy(l_K, y, weight_B=torch.ones(6).double()), rtol=1e-12
    )


@pytest.mark.parametrize("groups", [[(0, 1)], [(0, 1), (2,)], [(0, 2), (1, 3)], [(0,)]])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("batch, exits", [(1, 1), (5, 2)])
def test_distillation(groups, temperature, batch, exits):
    student, teacher = logits(batch, 6, exits, seed=1), logits(batch, 4, exits, seed=2)
    expected = []
    for s, t in zip(student, teacher, strict=True):
        value = 0.0
        for group in groups:
            for b in range(batch):
                p = softmax([float(t[b, c]) / temperature for c in group])
                q = softmax([float(s[b, c]) / temperature for c in group])
                value += sum(a * math.log(a / b_) for a, b_ in zip(p, q, strict=True)) / batch
        expected.append(value * temperature**2)
    found = distillation(student, teacher, groups=groups, temperature=temperature)
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-14)


def test_equal_logits_distil_to_zero_and_no_gradient():
    (teacher,) = logits(4, 5, 1)
    student = teacher.clone().requires_grad_()
    loss = distillation([student], [teacher], groups=[(0, 1, 2), (3, 4)], temperature=2.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(0, abs=1e-15)
    assert student.grad.abs().max() < 1e-15


def test_one_class_groups_teach_nothing():
    student, teacher = logits(3, 4, 1, seed=3), logits(3, 4, 1, seed=4)
    assert float(distillation(student, teacher, groups=[(0,), (3,)], temperature=2.0)) == 0.0


def test_a_high_temperature_matches_centered_logits():
    """For T to infinity the loss tends to half the squared distance of centered logits over C."""
    (student,), (teacher,) = logits(3, 4, 1, seed=5), logits(3, 4, 1, seed=6)
    centered = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    expected = (centered**2).sum(1).mean() / (2 * 4)
    found = distillation([student], [teacher], groups=[range(4)], temperature=1e4)
    assert float(found) == pytest.approx(float(expected), rel=1e-3)


def test_gradients():
    y = torch.tensor([0, 2, 1])
    teacher = logits(3, 3, 2, seed=7)
    student = [each.requires_grad_() for each in logits(3, 4, 2, seed=8)]
    weight = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *s: cross_entropy(s, y, weight_B=weight), student)
    assert torch.autograd.gradcheck(
        lambda *s: distillation(s, teacher, groups=[(0, 1), (2,)], temperature=2.0), student
    )
