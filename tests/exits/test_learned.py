"""The learned exit policy: its target, its fit, and its use like any other confidence measure."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import inf, nan
from torch.nn import functional as F

from clframe.errors import DataError
from clframe.exits import DynamicNetwork, ExitPolicy, select
from clframe.exits.failure import failure_targets
from clframe.exits.gate import LearnedConfidence
from clframe.exits.head_kinds import make_head
from clframe.exits.learned import (
    DECAY,
    FEATURES,
    HIDDEN,
    FailureConfidence,
    _loss_and_gradient,
    confidences,
    held_out_confidences,
    out_of_fold,
)
from clframe.exits.policies import max_probability, restore_confidence
from clframe.exits.ranking import auroc, rank
from clframe.nn import Network
from clframe.nn.backbones import mlp


def scores_of(n=300, classes=4, exits=3, *, seed=0):
    """Exits that become better with depth, on samples of which some are hard for all of them."""
    generator = torch.Generator().manual_seed(seed)
    y_N = torch.randint(classes, (n,), generator=generator)
    ease_N = torch.rand(n, generator=generator)
    scores = []
    for exit in range(exits):
        noise_NC = torch.randn(n, classes, generator=generator)
        scores.append(noise_NC + 3 * (exit + 1) / exits * ease_N[:, None] * F.one_hot(y_N, classes))
    return scores, y_N


def test_the_fit_is_a_stationary_point_of_its_loss():
    scores, y_N = scores_of()
    fitted = FailureConfidence.fit(scores, y_N)
    correct_KN = torch.stack([scores_NC.argmax(1) == y_N for scores_NC in scores])
    target_N = torch.as_tensor(failure_targets(correct_KN.numpy()))[0].double()
    value_N = fitted(0, scores[0].double(), ())[0].double()
    # The derivative by the output's offset: mean(p - t) + DECAY * offset.
    assert abs(float((value_N - target_N).mean() + DECAY * fitted.offset_K[0])) < 1e-4


def test_the_gradient_of_the_loss_is_that_of_automatic_differentiation():
    generator = np.random.default_rng(0)
    x_ND, t_N = generator.normal(size=(9, FEATURES)), (generator.random(9) < 0.5).astype(float)
    parameters = generator.normal(size=HIDDEN * FEATURES + 2 * HIDDEN + 1)
    loss, gradient = _loss_and_gradient(parameters, x_ND, t_N)
    p = torch.tensor(parameters, requires_grad=True)
    weight, bias_H, out_H, offset = p.split([HIDDEN * FEATURES, HIDDEN, HIDDEN, 1])
    z_N = torch.tanh(torch.from_numpy(x_ND) @ weight.view(HIDDEN, FEATURES).T + bias_H) @ out_H + offset
    squares = weight.square().sum() + out_H.square().sum() + offset.square().sum()
    expected = F.binary_cross_entropy_with_logits(z_N, torch.from_numpy(t_N)) + DECAY / 2 * squares
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), abs=1e-12)
    assert gradient == pytest.approx(p.grad.numpy(), abs=1e-12)


def test_it_finds_futile_samples_that_the_largest_probability_takes_for_hard_ones():
    """Three kinds at exit 0: easy (stop), improvable by the next exit (continue), wrong at every exit (stop)."""
    p_3C = torch.tensor([[0.7, 0.15, 0.15], [0.6, 0.39, 0.01], [0.34, 0.33, 0.33]])
    kind_N = torch.arange(300) % 3
    y_N = torch.tensor([0, 1, 2])[kind_N]  # right, wrong, wrong at exit 0
    generator = torch.Generator().manual_seed(0)
    first_NC = p_3C[kind_N].log() + 0.01 * torch.randn(300, 3, generator=generator)
    second_NC = F.one_hot(torch.tensor([0, 1, 0])[kind_N], 3).float() * 4  # right, right, wrong
    fitted = FailureConfidence.fit([first_NC, second_NC], y_N)
    target_N = failure_targets(torch.stack([s.argmax(1) == y_N for s in (first_NC, second_NC)]).numpy())[0]
    assert target_N.tolist() == (kind_N != 1).tolist()
    learned, plain = fitted(0, first_NC, ())[0], max_probability(0, first_NC, ())[0]
    assert auroc(rank(learned.numpy(), target_N))[0] == 1.0
    assert auroc(rank(plain.numpy(), target_N))[0] == pytest.approx(0.5, abs=0.02)


def test_same_samples_same_fit_and_the_state_restores_it():
    scores, y_N = scores_of(120)
    one, other = FailureConfidence.fit(scores, y_N), FailureConfidence.fit(scores, y_N)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    assert one.weight_KHD.shape == (3, HIDDEN, FEATURES)
    restored = restore_confidence("failure", one.state_dict(), exits=3)
    carried = again = ()
    for exit, scores_NC in enumerate(scores):
        (value_N, carried), (same_N, again) = one(exit, scores_NC, carried), restored(exit, scores_NC, again)
        assert torch.equal(value_N, same_N) and ((0 <= value_N) & (value_N <= 1)).all()


@pytest.mark.parametrize("batch", [1, 7])
def test_dynamic_inference_equals_all_exits_and_selection(batch):
    torch.manual_seed(0)
    backbone = mlp((5,), width=9, depth=3)
    network = Network(backbone, exits=[(tap, make_head("auto", backbone.tap_shapes[tap])) for tap in ("layer1", "layer2")])
    network.grow(range(4))
    network.eval()
    x_ND, y_N = torch.randn(80, 5), torch.randint(4, (80,))
    with torch.no_grad():
        measure = FailureConfidence.fit(network(x_ND).logits, y_N)
        policy = ExitPolicy(measure=measure, thresholds=0.5)
        dynamic = DynamicNetwork(network, policy)
        for x_BD in x_ND.split(batch):
            expected, found = select(network(x_BD).logits, policy), dynamic(x_BD)
            assert torch.equal(expected.exit_B, found.exit_B)
            torch.testing.assert_close(expected.scores_BC, found.scores_BC)


def test_two_classes_one_class_gaps_and_constant_targets():
    y_N = torch.tensor([0, 1, 1, 0])
    for scores_NC in (torch.randn(4, 2), torch.tensor([[1.0, -inf, 0.5]]).repeat(4, 1), F.one_hot(y_N, 2).float()):
        fitted = FailureConfidence.fit([scores_NC, scores_NC], y_N)
        assert fitted(0, scores_NC, ())[0].isfinite().all()
    one = FailureConfidence.fit([torch.zeros(3, 1)] * 2, torch.zeros(3, dtype=torch.long))
    assert (one(0, torch.zeros(2, 1), ())[0] > 0.9).all()  # every sample may stop


@pytest.mark.parametrize("folds", [3])
def test_out_of_fold_confidences_are_those_of_measures_that_have_not_seen_the_sample(folds):
    scores, y_N = scores_of(30)
    found_KN = out_of_fold(FailureConfidence, scores, y_N, folds=folds)
    for fold in range(folds):
        rest = [i for i in range(30) if i % folds != fold]
        measure = FailureConfidence.fit([scores_NC[rest] for scores_NC in scores], y_N[rest])
        expected_KN = confidences(measure, [scores_NC[fold::folds] for scores_NC in scores]).double()
        assert torch.equal(found_KN[:, fold::folds], expected_KN)


def test_only_measures_that_overfit_are_evaluated_out_of_fold():
    scores, y_N = scores_of(30)
    small, large = LearnedConfidence.fit(scores, y_N), FailureConfidence.fit(scores, y_N)
    assert torch.equal(held_out_confidences(small, scores, y_N), confidences(small, scores))
    assert torch.equal(held_out_confidences(large, scores, y_N), out_of_fold(FailureConfidence, scores, y_N))
    of_shares = held_out_confidences(large, scores, y_N, method="quantiles")
    assert torch.equal(of_shares, confidences(large, scores))  # shares of samples of the measure that decides
    assert not torch.equal(held_out_confidences(large, scores, y_N), confidences(large, scores).double())


def test_folds_of_few_samples():
    scores, y_N = scores_of(3)
    assert out_of_fold(FailureConfidence, scores, y_N).isfinite().all()  # three folds
    one = out_of_fold(LearnedConfidence, [scores_NC[:1] for scores_NC in scores], y_N[:1])
    fitted = LearnedConfidence.fit([scores_NC[:1] for scores_NC in scores], y_N[:1])
    assert torch.equal(one, confidences(fitted, [scores_NC[:1] for scores_NC in scores]).double())
    with pytest.raises(DataError, match="no held-out samples"):
        out_of_fold(FailureConfidence, [torch.zeros(0, 2)] * 2, torch.zeros(0, dtype=torch.long))


def test_bad_input_is_one_line():
    with pytest.raises(DataError, match="no held-out samples"):
        FailureConfidence.fit([torch.zeros(0, 2)] * 2, torch.zeros(0, dtype=torch.long))
    with pytest.raises(DataError, match="NaN or infinite scores"):
        FailureConfidence.fit([torch.full((2, 2), nan)] * 2, torch.tensor([0, 1]))
    with pytest.raises(DataError, match="NaN or infinite scores"):
        FailureConfidence.fit([torch.full((2, 2), inf)] * 2, torch.tensor([0, 1]))


def test_one_exit_only_is_always_asked_last():
    """The target of the last exit is 1 for every sample."""
    one = FailureConfidence.fit([torch.randn(20, 3)], torch.randint(3, (20,)))
    assert (one(0, torch.randn(20, 3), ())[0] > 0.9).all()
