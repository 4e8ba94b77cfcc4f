"""Measures of confidence by their formulas written out, and the laws of thresholds."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from clframe.errors import ConfigError, DataError
from clframe.exits.policies import (
    MEASURES,
    ExitPolicy,
    Gate,
    entropy,
    fit_gate,
    margin,
    max_probability,
    patience,
    patience_threshold,
    signs,
)

INF = float("inf")


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(value) for value in row]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("row", [[0.3, -1.2, 2.0], [5.0, 5.0], [-3.0, 0.1, 0.2, 0.3, 9.0], [0.7, 0.7, 0.7]])
def test_measures_are_their_formulas(row):
    p = softmax(row)
    scores_BC = torch.tensor([row])
    high, low = sorted(p)[-1], sorted(p)[-2]
    assert max_probability(0, scores_BC, ())[0].item() == pytest.approx(max(p), abs=1e-6)
    assert margin(0, scores_BC, ())[0].item() == pytest.approx(high - low, abs=1e-6)
    expected = 1 + sum(q * math.log(q) for q in p) / math.log(len(p))
    assert entropy(0, scores_BC, ())[0].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", MEASURES)
def test_classes_not_met_change_nothing(name):
    scores_BC = torch.randn(7, 4)
    gaps_BC = torch.full((7, 6), -INF)
    gaps_BC[:, [0, 2, 3, 5]] = scores_BC
    carried, gaps = (), ()
    for exit in range(3):
        confidence_B, carried = MEASURES[name](exit, scores_BC.roll(exit // 2, 0), carried)
        with_gaps_B, gaps = MEASURES[name](exit, gaps_BC.roll(exit // 2, 0), gaps)
        torch.testing.assert_close(with_gaps_B, confidence_B)


@pytest.mark.parametrize("name", ["max_probability", "entropy", "margin"])
@pytest.mark.parametrize("scores_BC", [torch.randn(3, 1), torch.tensor([[-INF, 4.0], [2.0, -INF]])])
def test_a_single_class_is_certain(name, scores_BC):
    assert MEASURES[name](0, scores_BC, ())[0].tolist() == [1.0] * len(scores_BC)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("scale", [0.0, 1e-4, 1.0, 1e4])
@pytest.mark.parametrize("classes", [1, 2, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_confidence_lies_between_zero_and_one(name, scale, classes, dtype):
    carried = ()
    for exit in range(4):
        scores_BC = scale * torch.randn(33, classes).to(dtype)
        confidence_B, carried = MEASURES[name](exit, scores_BC, carried)
        assert confidence_B.shape == (33,)
        assert ((confidence_B >= 0) & (confidence_B <= 1)).all()
        assert (confidence_B >= ExitPolicy(thresholds=0.0).of_exits(2)[0]).all()
        assert not (confidence_B >= 1.0001).any()


def test_half_precision_scores_are_judged_in_single_precision():
    scores_BC = torch.tensor([[7.0, 0.0]], dtype=torch.bfloat16)
    assert max_probability(0, scores_BC, ())[0].item() == pytest.approx(1 / (1 + math.exp(-7)), abs=1e-7)


def test_patience_counts_the_run_of_equal_answers():
    answers = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 0, 1], [2, 2, 1, 1]])
    runs = [[1, 2, 3, 4], [1, 1, 2, 3], [1, 1, 1, 1], [1, 2, 1, 2]]
    carried = ()
    for exit in range(4):
        confidence_B, carried = patience(exit, torch.nn.functional.one_hot(answers[:, exit], 3).float(), carried)
        assert confidence_B.tolist() == pytest.approx([(run[exit] - 1) / run[exit] for run in runs])


def test_a_patience_threshold_fires_at_just_that_many_agreements():
    scores_BC, carried = torch.tensor([[1.0, 0.0]]), ()
    for agreements in range(30):
        confidence_B, carried = patience(agreements, scores_BC, carried)
        assert (confidence_B >= patience_threshold(agreements)).item()
        assert not (confidence_B >= patience_threshold(agreements + 1)).item()


def test_policies_say_who_is_asked():
    policy = ExitPolicy(thresholds=(0.5, 1.5, 1.0))
    assert policy.asked(4) == (0, 2)
    assert policy.asked(4, among=[1, 2, 3]) == (2,)
    surest = ExitPolicy(thresholds=(0.5, 1.5, 1.0), fallback="confident")
    assert surest.asked(4) == (0, 1, 2, 3)
    assert surest.asked(4, among=[1]) == (1, 3)
    assert ExitPolicy(thresholds=2.0).asked(4) == ()
    assert ExitPolicy(thresholds=0.5).asked(1) == ()


def test_wrong_policies_are_one_line():
    with pytest.raises(ConfigError, match=r"^policy: found 3 thresholds for 3 exits; give one, or one for each exit but the last$"):
        ExitPolicy(thresholds=(0.1, 0.2, 0.3)).of_exits(3)
    with pytest.raises(ConfigError, match=r"^policy: found thresholds nan; give numbers$"):
        ExitPolicy(thresholds=float("nan"))
    with pytest.raises(ConfigError, match=r"^policy: found fallback 'first'; give 'last' or 'confident'$"):
        ExitPolicy(thresholds=0.5, fallback="first")


def noisy_exits(samples: int = 600) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Scores of two exits that are right the more often the surer they are; the second is better."""
    targets_N = torch.randint(5, (samples,))
    strength_N1 = 4 * torch.rand(samples, 1)
    right_NC = torch.nn.functional.one_hot(targets_N, 5) * strength_N1
    return [right_NC + torch.randn(samples, 5), 2 * right_NC + torch.randn(samples, 5)], targets_N


def test_a_fitted_gate_has_no_gradient_left():
    scores, targets_N = noisy_exits()
    gate = fit_gate(scores, targets_N, decay=0.01)
    for exit, scores_NC in enumerate(scores):
        signs_ND = signs(exit, scores_NC).double()
        mean_D, spread_D = signs_ND.mean(0), signs_ND.std(0, correction=0)
        weight_D, bias = gate.weight_KD[exit].double() * spread_D, gate.bias_K[exit] + gate.weight_KD[exit].double() @ mean_D
        error_N = gate(exit, scores_NC, ())[0].double() - (scores_NC.argmax(1) == targets_N).double()
        slope_D = (error_N[:, None] * (signs_ND - mean_D) / spread_D).mean(0) + 0.01 * weight_D
        assert slope_D.abs().max() < 1e-5
        assert abs(error_N.mean() + 0.01 * bias) < 1e-5


def test_a_gate_is_calibrated_and_ranks_right_answers_higher():
    scores, targets_N = noisy_exits()
    gate = fit_gate(scores, targets_N)
    held_out, answers_N = noisy_exits(2000)
    for exit, scores_NC in enumerate(held_out):
        confidence_N, carried = gate(exit, scores_NC, ())
        right_N = scores_NC.argmax(1) == answers_N
        assert carried == ()
        assert confidence_N.mean().item() == pytest.approx(right_N.float().mean().item(), abs=0.04)
        assert confidence_N[right_N].mean() > confidence_N[~right_N].mean() + 0.1


@pytest.mark.parametrize("targets", [[0, 0, 0, 0], [1, 1, 1, 1]])
def test_exits_always_right_or_always_wrong_give_finite_gates(targets):
    scores_NC = torch.tensor([[3.0, 0.0, -INF], [1.0, 0.0, -INF], [2.0, -1.0, -INF], [0.5, 0.2, -INF]])
    gate = fit_gate([scores_NC, scores_NC], torch.tensor(targets))
    confidence_N = gate(1, scores_NC, ())[0]
    assert gate.weight_KD.isfinite().all()
    assert ((confidence_N > 0.5) == (targets[0] == 0)).all()


def test_one_class_and_one_sample_can_be_fitted():
    gate = fit_gate([torch.randn(1, 1)], torch.tensor([0]))
    assert 0.5 < gate(0, torch.randn(1, 1), ())[0].item() < 1
    with pytest.raises(DataError, match=r"^fit_gate: found no samples; give held-out scores and targets$"):
        fit_gate([torch.empty(0, 3)], torch.empty(0, dtype=torch.long))


def test_a_gate_is_fitted_the_same_twice_and_its_state_brings_its_size():
    scores, targets_N = noisy_exits(50)
    state = copy.deepcopy(fit_gate(scores, targets_N).state_dict())
    again = fit_gate(scores, targets_N).state_dict()
    assert all(torch.equal(state[name], again[name]) for name in state)
    loaded = Gate(7)
    loaded.load_state_dict(state)
    assert torch.equal(loaded(1, scores[1], ())[0], fit_gate(scores, targets_N)(1, scores[1], ())[0])
