"""Logits to match, asymmetric and smoothed cross-entropy, projected gradients: against the formulas longhand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from clframe.data.avalanche import import_avalanche
from clframe.functional.losses import (
    asymmetric_cross_entropy,
    cross_entropy,
    logit_matching,
    project_gradient,
    smoothed_cross_entropy,
)

import_avalanche()

from avalanche.training.plugins import AGEMPlugin
from avalanche.training.regularization import ACECriterion


def logits(*shape, seed=0, exits=3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(exits)]


def stored(rows, exits, widths, seed=9):
    """stored_RKW of samples met when there were ``widths`` classes."""
    values = torch.randn(rows, exits, max(widths), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for r in range(rows):
        values[r, :, widths[r] :] = -torch.inf
    return values


@pytest.mark.parametrize("exits", [1, 3])
@pytest.mark.parametrize("widths", [(2,), (2, 4, 4), (1, 1)])
def test_logits_are_compared_on_the_columns_that_were_stored(exits, widths):
    student, teacher = logits(len(widths), 5, exits=exits), stored(len(widths), exits, widths)
    loss_K = logit_matching(student, teacher)
    assert loss_K.shape == (exits,)
    for k in range(exits):
        squares = [(student[k][r, c] - teacher[r, k, c]).item() ** 2 for r, w in enumerate(widths) for c in range(w)]
        assert loss_K[k].item() == pytest.approx(sum(squares) / sum(widths), rel=1e-12)


def test_padded_logits_are_avalanches_mean_squared_error():
    student, teacher = logits(3, 5, exits=1), stored(3, 1, (2, 4, 4))
    expected = F.mse_loss(student[0], F.pad(teacher[:, 0].masked_fill(teacher[:, 0].isinf(), 0.0), (0, 1)))
    assert torch.allclose(logit_matching(student, teacher, columns="padded"), expected.unsqueeze(0), rtol=1e-12)
    full = stored(3, 1, (5, 5, 5))  # no class came later: both ways are the plain one
    for columns in ("stored", "padded"):
        assert torch.allclose(logit_matching(student, full, columns=columns)[0], F.mse_loss(student[0], full[:, 0]))


@pytest.mark.parametrize("columns", ["stored", "padded"])
def test_gaps_among_classes_pull_nothing_and_spoil_no_gradient(columns):
    inner = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    student = inner.masked_fill(torch.tensor([False, True, False]), -torch.inf)
    teacher = torch.tensor([[[1.0, -math.inf, 2.0]], [[0.5, -math.inf, 0.0]]], dtype=torch.float64)
    loss = logit_matching([student], teacher, columns=columns).sum()
    loss.backward()
    seen = inner[:, [0, 2]] - teacher[:, 0, [0, 2]]
    assert loss.item() == pytest.approx(seen.square().mean().item(), rel=1e-12)
    assert torch.allclose(inner.grad[:, [0, 2]], seen.detach() / 2) and inner.grad[:, 1].tolist() == [0, 0]


def test_equal_logits_cost_nothing_and_columns_of_later_classes_are_free():
    student = logits(2, 4, exits=1)[0]
    teacher = student.detach()[:, None, :3].clone()
    loss = logit_matching([student], teacher)
    assert loss.tolist() == [0.0]
    (gradient,) = torch.autograd.grad(logit_matching([student], teacher + 1).sum(), student)
    assert gradient[:, 3].tolist() == [0, 0] and torch.allclose(gradient[:, :3], torch.tensor(-2 / 6).double())


@pytest.mark.parametrize("columns", ["stored", "padded"])
def test_logit_matching_gradients(columns):
    teacher = stored(3, 2, (2, 3, 3))
    assert gradcheck(lambda a, b: logit_matching([a, b], teacher, columns=columns), logits(3, 4, exits=2))


# --- asymmetric cross-entropy ----------------------------------------------------------------------------------------


def longhand_asymmetric(logits_BC, y, new, present, weight):
    sums, counts = {True: 0.0, False: 0.0}, {True: 0, False: 0}
    for row, target, is_new, w in zip(logits_BC.tolist(), y, new, weight, strict=True):
        columns = [c for c in range(len(row)) if c in present or not is_new]
        log_sum = math.log(sum(math.exp(row[c]) for c in columns))
        sums[is_new] += w * (log_sum - row[target])
        counts[is_new] += 1
    return sum(sums[side] / max(counts[side], 1) for side in sums)


@pytest.mark.parametrize("weight", [None, [1.0, 1.0, 0.25, 0.25, 0.25]])
@pytest.mark.parametrize("exits", [1, 3])
def test_new_samples_compete_among_the_classes_present(exits, weight):
    student, y = logits(5, 6, exits=exits), [4, 5, 0, 1, 3]
    new, present = [True, True, False, False, False], {4, 5}
    mask = torch.tensor([c in present for c in range(6)])
    weight_B = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    loss_K = asymmetric_cross_entropy(
        student, torch.tensor(y), new_B=torch.tensor(new), present_C=mask, weight_B=weight_B
    )
    for k in range(exits):
        expected = longhand_asymmetric(student[k], y, new, present, weight or [1.0] * 5)
        assert loss_K[k].item() == pytest.approx(expected, rel=1e-12)
    grads = torch.autograd.grad(loss_K.sum(), student)
    assert all(bool((g[:2, :4] == 0).all()) and bool((g[2:] != 0).all()) for g in grads)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_new_samples_stand_for_their_share_of_a_memory(share):
    student, y = logits(5, 6, exits=2), torch.tensor([4, 5, 0, 1, 3])
    new_B, present_C = torch.arange(5) < 2, torch.arange(6) >= 4
    weight_B = torch.tensor([1.0, 1.0, 0.5, 0.5, 0.5], dtype=torch.float64)
    loss_K = asymmetric_cross_entropy(student, y, new_B=new_B, present_C=present_C, share=share, weight_B=weight_B)
    for k, l_BC in enumerate(student):
        own = F.cross_entropy(l_BC[:2, 4:], y[:2] - 4)
        expected = own + (1 - share) * 0.5 * F.cross_entropy(l_BC[2:], y[2:]) + share * F.cross_entropy(l_BC[:2], y[:2])
        assert torch.allclose(loss_K[k], expected, rtol=1e-12)


def test_it_is_avalanches_criterion_but_for_its_half():
    student, y = logits(6, 7, exits=1)[0], torch.tensor([5, 6, 5, 0, 3, 2])
    new_B, present = torch.arange(6) < 3, torch.zeros(7, dtype=torch.bool)
    present[[5, 6]] = True
    theirs = ACECriterion()(student[:3], y[:3], student[3:], y[3:])
    ours = asymmetric_cross_entropy([student], y, new_B=new_B, present_C=present)
    assert torch.allclose(ours, 2 * theirs, rtol=1e-12)


@pytest.mark.parametrize("new", [True, False])
def test_one_side_alone_is_its_own_cross_entropy(new):
    student, y = logits(3, 4, exits=2), torch.tensor([0, 3, 1])
    loss_K = asymmetric_cross_entropy(
        student, y, new_B=torch.full((3,), new), present_C=torch.ones(4, dtype=torch.bool)
    )
    assert torch.allclose(loss_K, cross_entropy(student, y), rtol=1e-12)


def test_asymmetric_gradients_where_classes_have_gaps():
    y, new_B, present = torch.tensor([2, 0, 2]), torch.tensor([True, False, True]), torch.tensor([False, True, True])

    def loss(a):
        gapped = a.masked_fill(torch.tensor([False, True, False]), -torch.inf)
        return asymmetric_cross_entropy([gapped], y, new_B=new_B, present_C=present, share=0.3)

    assert gradcheck(loss, logits(3, 3, exits=1))


# --- smoothed cross-entropy ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("batch, classes", [(1, 1), (1, 4), (5, 3)])
def test_smoothing_is_torchs_where_all_classes_are_met(smoothing, batch, classes):
    student, y = logits(batch, classes), torch.arange(batch) % classes
    loss_K = smoothed_cross_entropy(student, y, smoothing=smoothing)
    for k in range(3):
        expected = F.cross_entropy(student[k], y, label_smoothing=smoothing)
        assert torch.allclose(loss_K[k], expected, rtol=1e-10, atol=1e-12)


def test_smoothing_gives_no_share_to_classes_not_met_and_weighs_samples():
    inner, y, weight_B = logits(3, 4, exits=1)[0], torch.tensor([0, 3, 0]), torch.tensor([1.0, 0.5, 0.0]).double()
    gapped = inner.masked_fill(torch.tensor([False, True, True, False]), -torch.inf)
    loss_K = smoothed_cross_entropy([gapped], y, smoothing=0.2, weight_B=weight_B)
    dense = F.cross_entropy(inner[:, [0, 3]], torch.tensor([0, 1, 0]), label_smoothing=0.2, reduction="none")
    assert torch.allclose(loss_K[0], (dense * weight_B).sum() / 1.5, rtol=1e-12)
    (gradient,) = torch.autograd.grad(loss_K.sum(), inner)
    assert bool(gradient.isfinite().all()) and gradient[:, [1, 2]].abs().sum() == 0
    assert gradcheck(lambda a: smoothed_cross_entropy([a], y, smoothing=0.2, weight_B=weight_B), [inner])


# --- projected gradients ---------------------------------------------------------------------------------------------


def gradients(seed, shapes=((2, 3), (4,), ())):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def flat(parts):
    return torch.cat([part.reshape(-1) for part in parts])


@pytest.mark.parametrize("seed", range(6))
def test_a_projected_gradient_never_opposes_the_reference(seed):
    g, r = gradients(seed), gradients(100 + seed)
    before, reference = flat(g), flat(r)
    project_gradient(g, r)
    dot = (before @ reference).item()
    if dot >= 0:
        assert torch.equal(flat(g), before)
    else:
        share = dot / (reference @ reference).item()
        assert torch.allclose(flat(g), before - share * reference, rtol=1e-12)
        assert (flat(g) @ reference).item() == pytest.approx(0, abs=1e-12)


def test_both_cases_are_among_the_seeds():
    signs = {bool(flat(gradients(s)) @ flat(gradients(100 + s)) < 0) for s in range(6)}
    assert signs == {True, False}


@pytest.mark.parametrize("seed", range(6))
def test_it_is_avalanches_projection(seed):
    model = torch.nn.Linear(3, 2).double()
    own, references = gradients(seed, ((2, 3), (2,))), gradients(100 + seed, ((2, 3), (2,)))
    for parameter, g in zip(model.parameters(), own, strict=True):
        parameter.grad = g.clone()
    plugin = AGEMPlugin(1, 1)
    plugin.buffers, plugin.reference_gradients = [None], flat(references)

    class Strategy:
        device = "cpu"

    Strategy.model = model
    plugin.after_backward(Strategy())
    project_gradient(own, references)
    for parameter, g in zip(model.parameters(), own, strict=True):
        assert torch.allclose(parameter.grad, g, rtol=1e-12, atol=1e-15)


def test_parts_without_a_reference_stay_and_a_reference_of_zero_changes_nothing():
    g = gradients(0)
    before = [part.clone() for part in g]
    project_gradient(g, [torch.zeros(2, 3).double(), None, None])
    project_gradient(g, [None, None, None])
    assert all(torch.equal(a, b) for a, b in zip(g, before, strict=True))
    project_gradient(g, [None, -before[1], None])
    assert torch.equal(g[0], before[0]) and g[1].abs().max() < 1e-15 and torch.equal(g[2], before[2])
