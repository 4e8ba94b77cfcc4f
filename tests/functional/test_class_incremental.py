"""Class-incremental losses against their formulas written longhand, bias correction, and nearest means."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from clframe.functional.class_incremental import (
    among,
    binary_cross_entropy,
    binary_distillation,
    columns,
    correct_bias,
    decoupled_cross_entropy,
    fit_bias,
    nearest_mean_scores,
    separated_cross_entropy,
)
from clframe.functional.losses import cross_entropy

OLD, NEW = (0, 1, 3), (2, 4)  # neither is consecutive
Y = torch.tensor([2, 0, 4, 3, 3])
WEIGHT = torch.tensor([1.0, 0.5, 2.0, 0.25, 1.0], dtype=torch.float64)


def logits(exits=3, samples=5, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, classes)
    return [3 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(exits)]


def log_sum(row, classes):
    return math.log(sum(math.exp(row[c]) for c in classes))


def sigmoid(z):
    return 1 / (1 + math.exp(-z))


@pytest.mark.parametrize("weight_B", [None, WEIGHT])
def test_separated_softmax_longhand(weight_B):
    found_K = separated_cross_entropy(logits(), Y, new=NEW, old=OLD, weight_B=weight_B)
    w = [1.0] * 5 if weight_B is None else weight_B.tolist()
    for k, logits_BC in enumerate(logits()):
        rows = logits_BC.tolist()
        parts = [log_sum(r, NEW if y in NEW else OLD) - r[y] for r, y in zip(rows, Y.tolist(), strict=True)]
        expected = sum(a * b for a, b in zip(w, parts, strict=True)) / sum(w)
        assert found_K[k].item() == pytest.approx(expected, rel=1e-12)


def test_separated_softmax_sends_no_gradient_across_the_border():
    z = logits(exits=1)[0].requires_grad_()
    separated_cross_entropy([z], Y, new=NEW, old=OLD).sum().backward()
    for row, y in zip(z.grad.tolist(), Y.tolist(), strict=True):
        other = OLD if y in NEW else NEW
        assert all(row[c] == 0 for c in other) and row[y] < 0


def test_separated_softmax_without_old_classes_is_the_cross_entropy():
    found = separated_cross_entropy(logits(), Y, new=range(5), old=(), weight_B=WEIGHT)
    torch.testing.assert_close(found, cross_entropy(logits(), Y, weight_B=WEIGHT))
    assert separated_cross_entropy([torch.zeros(1, 1)], torch.tensor([0]), new=(0,), old=()).tolist() == [0.0]


def test_decoupled_loss_longhand():
    found_K = decoupled_cross_entropy(logits(), Y, new=NEW, old=OLD, inner=4.0, outer=0.3, weight_B=WEIGHT)
    for k, logits_BC in enumerate(logits()):
        new_part = old_part = 0.0
        for row, y, w in zip(logits_BC.tolist(), Y.tolist(), WEIGHT.tolist(), strict=True):
            if y in NEW:
                inner = log_sum(row, NEW) - row[y]
                outer = -math.log(1 - math.exp(log_sum(row, OLD) - log_sum(row, range(5))))
                new_part += w * (4.0 * inner + 0.3 * outer) / 2
            else:
                old_part += w * (log_sum(row, range(5)) - row[y]) / 3
        assert found_K[k].item() == pytest.approx(new_part + old_part, rel=1e-10)


def test_the_two_parts_of_a_new_samples_loss_make_up_its_cross_entropy():
    y_B = torch.tensor([2, 4, 4])
    z = [part[:3] for part in logits()]
    found = decoupled_cross_entropy(z, y_B, new=NEW, old=OLD, inner=1.0, outer=1.0)
    torch.testing.assert_close(found, cross_entropy(z, y_B))


@pytest.mark.parametrize("y", [[2], [1]])
def test_a_batch_of_new_or_old_samples_alone_is_finite(y):
    z = [torch.randn(1, 5, requires_grad=True)]
    loss_K = decoupled_cross_entropy(z, torch.tensor(y), new=NEW, old=OLD, inner=1.0, outer=0.1)
    loss_K.sum().backward()
    assert torch.isfinite(loss_K).all() and torch.isfinite(z[0].grad).all() and z[0].grad.abs().sum() > 0
    whole_K = decoupled_cross_entropy(z, torch.tensor(y), new=NEW, old=OLD, inner=1.0, outer=1.0)
    torch.testing.assert_close(whole_K, cross_entropy(z, torch.tensor(y)))


@pytest.mark.parametrize("weight_B", [None, WEIGHT])
def test_one_against_all_longhand(weight_B):
    student, teacher = logits(), [part[:, :4] for part in logits(seed=9)]
    task_K = binary_cross_entropy(student, Y, classes=NEW, weight_B=weight_B)
    distill_K = binary_distillation(student, teacher, classes=OLD, weight_B=weight_B)
    w = [1.0] * 5 if weight_B is None else weight_B.tolist()
    for k in range(3):
        task = distill = 0.0
        for b, y in enumerate(Y.tolist()):
            p, q = ([sigmoid(z) for z in rows[k][b].tolist()] for rows in (student, teacher))
            task += w[b] / sum(w) * sum(-math.log(p[c] if c == y else 1 - p[c]) for c in NEW)
            distill += w[b] / sum(w) * sum(-q[c] * math.log(p[c]) - (1 - q[c]) * math.log(1 - p[c]) for c in OLD)
        assert task_K[k].item() == pytest.approx(task, rel=1e-10)
        assert distill_K[k].item() == pytest.approx(distill, rel=1e-10)


def test_distillation_is_at_rest_where_student_and_teacher_agree():
    z = logits(exits=1)[0].requires_grad_()
    binary_distillation([z], [z.detach()], classes=OLD).sum().backward()
    assert z.grad.abs().max() < 1e-12


def test_gradients():
    z = [part.requires_grad_() for part in logits(exits=2)]
    teacher = logits(exits=2, seed=4)
    assert gradcheck(lambda *z: separated_cross_entropy(z, Y, new=NEW, old=OLD), z)
    assert gradcheck(lambda *z: decoupled_cross_entropy(z, Y, new=NEW, old=OLD, inner=2.0, outer=0.1), z)
    assert gradcheck(lambda *z: binary_cross_entropy(z, Y, classes=NEW), z)
    assert gradcheck(lambda *z: binary_distillation(z, teacher, classes=OLD), z)


def test_columns_of_classes_not_met_do_no_harm():
    """Class 1 was never met: its column is -inf."""
    z = logits(exits=1)[0]
    z[:, 1] = -torch.inf
    z.requires_grad_()
    total = (
        separated_cross_entropy([z], Y, new=NEW, old=(0, 3))
        + decoupled_cross_entropy([z], Y, new=NEW, old=(0, 3), inner=1.0, outer=0.1)
        + binary_cross_entropy([z], Y, classes=NEW)
        + binary_distillation([z], [z.detach()], classes=(0, 3))
    )
    total.sum().backward()
    assert torch.isfinite(total).all() and torch.isfinite(z.grad).all() and (z.grad[:, 1] == 0).all()
    corrected = correct_bias([z], torch.ones(1, 5), torch.zeros(1, 5))[0]
    assert torch.equal(corrected, z.detach())


def test_bias_correction_is_by_column_and_exit():
    alpha_KC, beta_KC = torch.tensor([[1.0, 2.0], [3.0, 1.0]]), torch.tensor([[0.0, -1.0], [0.5, 0.0]])
    z = [torch.tensor([[1.0, 1.0, 7.0]]), torch.tensor([[2.0, 2.0, 7.0]])]
    assert [part.tolist() for part in correct_bias(z, alpha_KC, beta_KC)] == [[[1, 1, 7]], [[6.5, 2, 7]]]
    narrow = correct_bias([part[:, :1] for part in z], alpha_KC, beta_KC)
    assert [part.tolist() for part in narrow] == [[[1]], [[6.5]]]


def objective(z, y, new, decay, pair):
    q = z.double().clone()
    q[:, list(new)] = pair[0] * q[:, list(new)] + pair[1]
    return torch.nn.functional.cross_entropy(q, y) + decay / 2 * ((pair[0] - 1) ** 2 + pair[1] ** 2)


@pytest.mark.parametrize("decay", [1e-4, 0.1, 10.0])
@pytest.mark.parametrize("seed", range(4))
def test_the_fitted_pair_is_a_minimum_and_lbfgs_finds_the_same(seed, decay):
    z = logits(exits=1, samples=40, seed=seed)[0]
    y = torch.randint(5, (40,), generator=torch.Generator().manual_seed(seed))
    pair = torch.tensor(fit_bias(z, y, new=NEW, decay=decay), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(objective(z, y, NEW, decay, pair), pair)
    assert slope.abs().max() < 1e-7
    other = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([other], max_iter=200, line_search_fn="strong_wolfe", tolerance_change=1e-15)

    def closure():
        solver.zero_grad()
        loss = objective(z, y, NEW, decay, other)
        loss.backward()
        return loss

    solver.step(closure)
    torch.testing.assert_close(pair, other, rtol=0, atol=1e-5)


def test_the_fit_converges_as_fast_as_newtons_method(monkeypatch):
    z = logits(exits=1, samples=40)[0]
    y = torch.randint(5, (40,), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("clframe.functional.class_incremental.NEWTON_STEPS", 6)
    pair = torch.tensor(fit_bias(z, y, new=NEW, decay=1e-3), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(objective(z, y, NEW, 1e-3, pair), pair)
    assert slope.abs().max() < 1e-12  # a wrong second derivative leaves more than 1e-3


def test_the_fit_undoes_a_known_bias():
    """Logits that are right are distorted by (4, -3): the pair is the inverse, z = (q + 3) / 4."""
    generator = torch.Generator().manual_seed(0)
    right = 2 * torch.randn(4000, 5, generator=generator, dtype=torch.float64)
    y = torch.distributions.Categorical(logits=right).probs.multinomial(1, generator=generator).flatten()
    z = right.clone()
    z[:, NEW] = 4 * z[:, NEW] - 3
    alpha, beta = fit_bias(z, y, new=NEW, decay=1e-9)
    assert alpha == pytest.approx(0.25, abs=0.02) and beta == pytest.approx(0.75, abs=0.1)


def test_samples_told_apart_perfectly_and_a_strong_pull():
    z = 50 * torch.nn.functional.one_hot(torch.tensor([0, 1]), 2).float()
    pair = fit_bias(z, torch.tensor([0, 1]), new=(1,), decay=0.1)
    assert pair == pytest.approx((1.0, 0.0), abs=1e-6)
    far = fit_bias(-1e4 * z, torch.tensor([0, 1]), new=(1,), decay=1e-6)
    assert all(math.isfinite(v) for v in far)
    z = logits(exits=1)[0]
    assert fit_bias(z, Y, new=NEW, decay=1e9) == pytest.approx((1.0, 0.0), abs=1e-6)


def test_nearest_mean_scores_longhand():
    features, means = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0], [5.0, 0.0], [1.0, 1.0]])
    scores = nearest_mean_scores(features, means, torch.tensor([True, True, False]), classes=4)
    expected = [-(0.6**2 + 0.2**2), -(0.4**2 + 0.8**2), -math.inf, -math.inf]
    assert scores[0].tolist() == pytest.approx(expected)
    torch.testing.assert_close(scores, nearest_mean_scores(7 * features, 3 * means, torch.tensor([True, True, False]), classes=4))


def test_scores_of_half_precision_features_are_single_and_never_above_zero():
    unit = torch.nn.functional.normalize(torch.randn(50, 9), dim=1)
    scores = nearest_mean_scores(unit.half(), unit, torch.ones(50, dtype=torch.bool), classes=50)
    assert scores.dtype == torch.float32 and (scores <= 0).all()
    assert scores.argmax(1).tolist() == list(range(50))


def test_classes_as_masks_and_columns():
    y_B = torch.arange(6)
    assert among(y_B, NEW).tolist() == [c in NEW for c in range(6)]
    assert among(y_B, (5,)).tolist() == [False] * 5 + [True]
    assert columns([4]) == slice(4, 5) and columns((3, 1, 2, 3)) == slice(1, 4) and columns(OLD) == [0, 1, 3]
