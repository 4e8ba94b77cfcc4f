"""Calibration of exits: optimality, the two facts about order, and the same scores in every way of inference."""

from __future__ import annotations

import copy
import io
from math import log

import numpy as np
import pytest
import torch
from torch import inf, nan
from torch.nn import functional as F

from clframe.errors import ConfigError, DataError
from clframe.exits.calibration import (
    COLDEST,
    MARGIN,
    RIDGE,
    Calibrated,
    _with_confidence,
    fit_isotonic,
    fit_temperature,
    fit_vector_scaling,
    interpolate,
)
from clframe.exits.calibration_error import ece
from clframe.exits.ensembles import make_ensemble
from clframe.exits.ranking import rank
from clframe.nn.exit_ensemble import Single

KINDS = ["temperature", "vector", "isotonic"]


def sampled(n=400, classes=4, *, sharpness=3.0, seed=0):
    """Logits ``sharpness`` times as large as the log-odds that the classes were drawn from."""
    generator = torch.Generator().manual_seed(seed)
    true_NC = torch.randn(n, classes, generator=generator)
    y_N = torch.multinomial(true_NC.softmax(1), 1, generator=generator)[:, 0]
    return sharpness * true_NC, y_N


def nll(logits_NC, y_N):
    return float(F.cross_entropy(logits_NC.double(), y_N))


@pytest.mark.parametrize(("classes", "n"), [(2, 50), (4, 400), (7, 33)])
def test_the_temperature_is_the_best_one(classes, n):
    logits_NC, y_N = sampled(n, classes)
    found = fit_temperature(logits_NC, y_N)
    for factor in (0.98, 0.999, 1.001, 1.02):
        assert nll(logits_NC / found, y_N) <= nll(logits_NC / (found * factor), y_N)


def test_the_temperature_undoes_a_known_sharpness():
    logits_NC, y_N = sampled(20_000)
    assert fit_temperature(logits_NC, y_N) == pytest.approx(3.0, rel=0.05)


def test_all_correct_ends_at_the_limit_and_classes_not_met_change_nothing():
    logits_NC = torch.eye(3)
    assert fit_temperature(logits_NC, torch.arange(3)) == pytest.approx(COLDEST)
    logits_NC, y_N = sampled(60, 3)
    gap_NC = torch.cat([logits_NC[:, :1], torch.full((60, 1), -inf), logits_NC[:, 1:]], 1)
    assert fit_temperature(gap_NC, y_N + (y_N > 0)) == pytest.approx(fit_temperature(logits_NC, y_N), rel=1e-9)


def test_vector_scaling_is_stationary():
    logits_NC, y_N = sampled(200, 3)
    scale_C, bias_C = (each.requires_grad_() for each in fit_vector_scaling(logits_NC, y_N))
    loss = F.cross_entropy(logits_NC.double() * scale_C + bias_C, y_N)
    (loss + RIDGE * ((scale_C - 1).square() + bias_C.square()).sum()).backward()
    assert scale_C.grad.abs().max() < 1e-4 and bias_C.grad.abs().max() < 1e-4
    assert nll((logits_NC * scale_C + bias_C).detach(), y_N) < nll(logits_NC / fit_temperature(logits_NC, y_N), y_N) + 1e-6


def test_isotonic_regression_is_monotone_and_means_of_its_blocks():
    x_M, y_M = fit_isotonic(torch.tensor([0.2, 0.4, 0.6, 0.8]), torch.tensor([False, True, False, True]))
    assert x_M.tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8]) and y_M.tolist() == [0.0, 0.5, 0.5, 1.0]
    at = torch.tensor([0.0, 0.3, 0.5, 0.7, 1.0], dtype=torch.float64)
    assert interpolate(at, x_M, y_M).tolist() == pytest.approx(np.interp(at, x_M, y_M).tolist())


def test_a_temperature_changes_the_order_of_samples_with_three_classes():
    """The example of the specification: equal at T = 1, A first at T = 2, B first at T = 0.5."""
    p_A, p_B = torch.tensor([0.6, 0.399, 0.001]).log(), torch.tensor([0.6, 0.2, 0.2]).log()
    top = {T: (float((p_A / T).softmax(0).max()), float((p_B / T).softmax(0).max())) for T in (0.5, 1.0, 2.0)}
    assert top[1.0][0] == pytest.approx(top[1.0][1])
    assert top[2.0] == pytest.approx((0.539, 0.464), abs=1e-3) and top[0.5] == pytest.approx((0.693, 0.818), abs=1e-3)


def test_two_classes_keep_their_order_at_any_temperature():
    logits_NC, _ = sampled(100, 2)
    one, other = ((logits_NC.double() / T).softmax(1).amax(1).argsort() for T in (1.0, 3.0))
    assert torch.equal(one, other)


def test_a_monotone_map_changes_a_shared_threshold_and_no_quantile_of_an_exit():
    """Which samples stop: the same for each exit's own quantile, others for one threshold shared by both exits."""
    generator = np.random.default_rng(0)
    confidence_KN = generator.random((2, 200))
    mapped_KN = np.stack([confidence_KN[0] ** 3, confidence_KN[1] ** 0.5])  # another map at each exit
    for k in range(2):
        own = [row >= np.quantile(row, 0.7, method="higher") for row in (confidence_KN[k], mapped_KN[k])]
        assert (own[0] == own[1]).all()
    shared = [(rows >= 0.6).mean(1) for rows in (confidence_KN, mapped_KN)]
    assert abs(shared[0] - shared[1]).max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ensemble", ["single", "geometric"])
def test_step_by_step_equals_all_exits_and_predictions_are_kept(kind, ensemble):
    logits, y_N = [sampled(80, 3, seed=k)[0] for k in range(3)], sampled(80, 3, seed=9)[1]
    inner = make_ensemble(ensemble, exits=3)
    inner.grow([0, 1, 2])
    calibrated = Calibrated(inner, kind, exits=3)
    before = inner(logits)
    assert all(torch.equal(a, b) for a, b in zip(calibrated(logits), before, strict=True))  # identity before it is fitted
    calibrated.fit(logits, y_N)
    carried, whole = (), calibrated(logits)
    for exit, logits_NC in enumerate(logits):
        scores_NC, carried = calibrated.step(exit, logits_NC, carried)
        torch.testing.assert_close(scores_NC, whole[exit])
        if kind != "vector":
            assert torch.equal(scores_NC.argmax(1), before[exit].argmax(1))
        assert nll(scores_NC, y_N) <= nll(before[exit], y_N) + (0.02 if kind == "isotonic" else 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_calibration_lowers_the_error_on_held_out_data(kind):
    n = 8000  # with 15 bins, a measure without any error has an ECE of about 0.5 sqrt(15 * 2 / (pi n)) = 0.017
    logits_NC, y_N = sampled(2 * n)
    calibrated = Calibrated(Single(), kind, exits=1)
    calibrated.fit([logits_NC[:n]], y_N[:n])
    (scores_NC,) = calibrated([logits_NC[n:]])
    errors = []
    for each_NC in (logits_NC[n:], scores_NC):
        top_N, class_N = each_NC.softmax(1).max(1)
        errors.append(float(ece(rank(top_N.numpy(), (class_N == y_N[n:]).numpy()))[0]))
    assert errors[1] < 0.03 and errors[0] > 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_has_it_whatever_the_size(kind):
    logits_NC, y_N = sampled(90, 3)
    calibrated = Calibrated(Single(), kind, exits=1)
    calibrated.fit([logits_NC], y_N)
    file = io.BytesIO()
    torch.save(calibrated.state_dict(), file)
    file.seek(0)
    fresh = Calibrated(Single(), kind, exits=1)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    for other in (fresh, copy.deepcopy(calibrated)):
        assert torch.equal(other([logits_NC])[0], calibrated([logits_NC])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_new_classes_gaps_one_class_and_one_sample(kind):
    logits_NC, y_N = sampled(60, 2)
    calibrated = Calibrated(Single(), kind, exits=1)
    calibrated.fit([logits_NC], y_N)
    wider_BC = torch.tensor([[1.0, 2.0, -inf, 0.5]])
    found_BC = calibrated([wider_BC])[0]
    assert found_BC[0, 2] == -inf and found_BC[:, [0, 1, 3]].isfinite().all()
    one = Calibrated(Single(), kind, exits=1)
    one.fit([torch.zeros(5, 1)], torch.zeros(5, dtype=torch.long))
    assert one([torch.zeros(2, 1)])[0].softmax(1).tolist() == [[1.0], [1.0]]


@pytest.mark.parametrize("kind", KINDS)
def test_bad_input_is_one_line(kind):
    calibrated = Calibrated(Single(), kind, exits=1)
    with pytest.raises(DataError, match=r"no held-out samples; set benchmark\.validation"):
        calibrated.fit([torch.zeros(0, 3)], torch.zeros(0, dtype=torch.long))
    with pytest.raises(DataError, match="NaN or infinite logits"):
        calibrated.fit([torch.full((2, 3), nan)], torch.zeros(2, dtype=torch.long))
    with pytest.raises(DataError, match="NaN or infinite logits"):
        calibrated.fit([torch.tensor([[0.0, inf], [1.0, 0.0]])], torch.zeros(2, dtype=torch.long))


def test_an_unknown_kind_is_refused():
    with pytest.raises(ConfigError, match="found 'platt'; give temperature, vector or isotonic"):
        Calibrated(Single(), "platt", exits=1)


def test_log_odds_by_arithmetic():
    """Nine right of ten with a margin of 1: T = 1 / ln 9."""
    logits_NC, y_N = torch.tensor([[1.0, 0.0]] * 10), torch.tensor([0] * 9 + [1])
    assert fit_temperature(logits_NC, y_N) == pytest.approx(1 / log(9), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_isotonic_calibration_of_sure_samples_changes_the_confidence_alone(dtype):
    """The largest probability of [20, 0, -3] is 1 in float32, where the other classes must keep their proportions."""
    logits_BC = torch.tensor([[20.0, 0, -3], [300, 1, 0], [-3, -200, 0.5], [40, -torch.inf, 0]], dtype=dtype)
    knots_M, values_M = torch.tensor([0.4, 0.9, 1]), torch.tensor([0.3, 0.8, 0.97])
    found_BC = _with_confidence(logits_BC, knots_M, values_M)
    p_BC = found_BC.double().softmax(1)
    assert found_BC.argmax(1).tolist() == [0, 0, 2, 0] and found_BC.dtype == dtype
    for row, others in enumerate([[1, 2], [1, 2], [0], [2]]):
        top = logits_BC[row].double().softmax(0).max().float()
        wanted = float(interpolate(top[None], knots_M, values_M))
        assert float(p_BC[row].max()) == pytest.approx(wanted, abs=1e-6)
        expected = (1 - wanted) * logits_BC[row, others].double().softmax(0)
        torch.testing.assert_close(p_BC[row, others], expected, rtol=1e-4, atol=0)


def test_no_isotonic_calibration_changes_a_prediction():
    generator = torch.Generator().manual_seed(3)
    logits_NC = 40 * torch.randn(500, 5, generator=generator)
    y_N = torch.randint(5, (500,), generator=generator)
    calibrated = Calibrated(Single(), kind="isotonic", exits=1)
    calibrated.fit([logits_NC], y_N)
    (found_NC,) = calibrated([logits_NC])
    assert torch.equal(found_NC.argmax(1), logits_NC.argmax(1)) and found_NC.isfinite().all()
    assert nll(found_NC, y_N) < nll(logits_NC, y_N)


def test_other_classes_are_evened_out_where_the_second_would_exceed_the_calibrated_confidence():
    knots_M, values_M = torch.tensor([0.0, 1.0]), torch.tensor([0.3, 0.3])  # every sample is right in 30 % of cases
    p_BC = torch.tensor([[0.5, 0.45, 0.04, 0.01], [0.4, 0.2, 0.2, 0.2], [0.01, 0.09, 0.9, 0.0]]).double()
    found_BC = _with_confidence(p_BC.log(), knots_M, values_M).softmax(1)
    # others of sample 0 are .9, .08, .02 of what is left: the second may have (0.3 - m) / 0.7 of it, m the margin
    most = (0.3 - MARGIN) / 0.7
    mixed = (0.9 - most) / (0.9 - 1 / 3)
    rest = [0.7 * ((1 - mixed) * q + mixed / 3) for q in (0.9, 0.08, 0.02)]
    assert found_BC[0].tolist() == pytest.approx([0.3, *rest], abs=1e-6)
    assert found_BC[1].tolist() == pytest.approx([0.3, 0.7 / 3, 0.7 / 3, 0.7 / 3], abs=1e-6)  # its proportions fit
    low = (0.5 + MARGIN) / 1.5  # of three classes met the predicted one has 1 / 3 and the margin at least
    assert found_BC[2].tolist() == pytest.approx([(1 - low) / 2, (1 - low) / 2, low, 0.0], abs=1e-6)


@pytest.mark.parametrize(("classes", "n", "share"), [(2, 50, 0.0), (5, 400, 0.5), (20, 400, 1.5), (100, 1000, 2.0)])
def test_isotonic_calibration_of_weak_exits_keeps_the_order_of_samples_and_is_calibrated(classes, n, share):
    """Exits that are right in 4 to 50 % of cases, and sure of it: the second class must not limit the confidence."""
    generator = torch.Generator().manual_seed(0)
    y_N = torch.randint(classes, (n,), generator=generator)
    logits_NC = 3 * torch.randn(n, classes, generator=generator) + share * F.one_hot(y_N, classes)
    calibrated = Calibrated(Single(), "isotonic", exits=1)
    calibrated.fit([logits_NC], y_N)
    (found_NC,) = calibrated([logits_NC])
    before_N, after_N = logits_NC.double().softmax(1).amax(1), found_NC.double().softmax(1).amax(1)
    assert torch.equal(found_NC.argmax(1), logits_NC.argmax(1))
    assert after_N[before_N.argsort()].diff().min() > -1e-6  # no sample overtakes another
    x_M, y_M = fit_isotonic(before_N, logits_NC.argmax(1) == y_N)
    wanted_N = np.interp(before_N, x_M, y_M).clip(min=(1 + MARGIN * (classes - 1)) / classes)
    assert after_N.tolist() == pytest.approx(wanted_N.tolist(), abs=1e-3)  # steps are steep
