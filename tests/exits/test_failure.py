"""Calibration and failure prediction, against scikit-learn, longhand loops and the definitions of other libraries."""

from __future__ import annotations

import itertools
from math import isnan, nan

import numpy as np
import pytest
import torch
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score, roc_curve

from clframe.errors import DataError
from clframe.exits.bootstrap import bootstrap
from clframe.exits.calibration_error import brier_N, ece, ece_equal_mass, nll_N
from clframe.exits.failure import (
    LOWER_IS_BETTER,
    RANKING_METRICS,
    UNDEFINED,
    eefp_K,
    failure_metrics,
    failure_targets,
    undefined_reason,
)
from clframe.exits.ranking import aurc, coverage_at_risk, fpr95, rank, risk_at_coverage


def cases(count, *, most=40, levels=(5, 1000)):
    """Random confidences and outcomes, with many ties and with few, of 2 to ``most`` samples."""
    generator = np.random.default_rng(0)
    for case in range(count):
        n = int(generator.integers(2, most + 1))
        level = levels[case % len(levels)]
        confidence_N = generator.integers(0, level + 1, n) / level
        yield confidence_N, generator.random(n) < generator.random()


def risks(correct):
    """Error rate among the first k, for k = 1..n, in the order given."""
    return [sum(1 - c for c in correct[:k]) / k for k in range(1, len(correct) + 1)]


def mean_over_orders(confidence_N, correct_N, of):
    """Mean of ``of(outcomes in the order)`` over every order that sorts by confidence."""
    groups = {}
    for s, c in zip(confidence_N, correct_N, strict=True):
        groups.setdefault(s, []).append(int(c))
    arranged = [list(itertools.permutations(groups[s])) for s in sorted(groups, reverse=True)]
    orders = [list(itertools.chain(*parts)) for parts in itertools.product(*arranged)]
    return sum(of(order) for order in orders) / len(orders)


def test_auroc_is_scikit_learns():
    for confidence_N, correct_N in cases(300):
        found = failure_metrics(confidence_N, correct_N)["auroc"]
        if correct_N.all() or not correct_N.any():
            assert isnan(found)
        else:
            assert found == pytest.approx(roc_auc_score(correct_N, confidence_N), abs=1e-12)


def test_fpr95_is_read_off_the_roc_curve():
    for confidence_N, correct_N in cases(500):
        if correct_N.all() or not correct_N.any():
            assert isnan(fpr95(rank(confidence_N, correct_N))[0])
            continue
        fpr, tpr, _ = roc_curve(correct_N, confidence_N, drop_intermediate=False)
        assert fpr95(rank(confidence_N, correct_N))[0] == pytest.approx(fpr[tpr >= 0.95 - 1e-12].min(), abs=1e-12)


def test_areas_are_means_over_every_order_of_ties():
    """The double loop over all orders, so few samples."""
    for confidence_N, correct_N in cases(120, most=6, levels=(2, 4)):
        n, found = len(correct_N), failure_metrics(confidence_N, correct_N)
        best = sorted((int(c) for c in correct_N), reverse=True)
        aurc = mean_over_orders(confidence_N, correct_N, lambda order: sum(risks(order)) / len(order))
        augrc = mean_over_orders(
            confidence_N, correct_N, lambda order: sum(k * r for k, r in enumerate(risks(order), 1)) / len(order) ** 2
        )
        assert found["aurc"] == pytest.approx(aurc, abs=1e-12)
        assert found["augrc"] == pytest.approx(augrc, abs=1e-12)
        assert found["e_aurc"] == pytest.approx(aurc - sum(risks(best)) / n, abs=1e-12)
        assert found["e_augrc"] == pytest.approx(augrc - sum(k * r for k, r in enumerate(risks(best), 1)) / n**2, abs=1e-12)
        assert found["risk_at_80_cov"] == pytest.approx(
            mean_over_orders(confidence_N, correct_N, lambda order: risks(order)[-(-4 * len(order) // 5) - 1]), abs=1e-12
        )


def trapezoid(y, x):
    return sum((x[i + 1] - x[i]) * (y[i + 1] + y[i]) / 2 for i in range(len(x) - 1))


def test_torch_uncertaintys_areas_follow_from_ours():
    """Its rule without ties: trapezoids over coverages 1/n .. 1, divided by 1 - 1/n."""
    for _, correct_N in cases(1000):
        n = len(correct_N)
        confidence_N = np.linspace(1, 0, n)
        found, risk = failure_metrics(confidence_N, correct_N), risks([int(c) for c in correct_N])
        coverage = [k / n for k in range(1, n + 1)]
        generalized = [c * r for c, r in zip(coverage, risk, strict=True)]
        for name, curve in (("aurc", risk), ("augrc", generalized)):
            theirs = trapezoid(curve, coverage) / (1 - 1 / n)
            assert (found[name] * n - (curve[0] + curve[-1]) / 2) / (n - 1) == pytest.approx(theirs, abs=1e-6)


def test_fd_shifts_areas_follow_from_ours():
    """Its rule with ties: one point a group, trapezoids from coverage 0; its AUGRC lacks err / (2 n), E-AUGRC is equal."""
    for confidence_N, correct_N in cases(300):
        n, err = len(correct_N), 1 - correct_N.mean()
        levels = sorted(set(confidence_N), reverse=True)
        coverage = [0.0, *((confidence_N >= level).mean() for level in levels)]
        generalized = [0.0, *((~correct_N & (confidence_N >= level)).mean() for level in levels)]
        theirs = trapezoid(generalized, coverage)
        found = failure_metrics(confidence_N, correct_N)
        assert found["augrc"] - err / (2 * n) == pytest.approx(theirs, abs=1e-6)
        assert found["e_augrc"] == pytest.approx(theirs - err**2 / 2, abs=1e-6)


@pytest.mark.parametrize("bins", [1, 3, 15])
def test_ece_longhand(bins):
    for confidence_N, correct_N in cases(200):
        n, total = len(correct_N), 0.0
        for m in range(bins):
            low, high = m / bins, (m + 1) / bins
            inside = [(s, c) for s, c in zip(confidence_N, correct_N, strict=True) if low + 1e-12 < s <= high + 1e-12 or (m == 0 and s == 0)]
            total += abs(sum(c - s for s, c in inside)) / n
        assert ece(rank(confidence_N, correct_N), bins=bins)[0] == pytest.approx(total, abs=1e-9)


@pytest.mark.parametrize("bins", [1, 4, 15])
def test_ece_of_equal_mass_longhand(bins):
    generator = np.random.default_rng(1)
    for n in (1, 3, 15, 40):
        confidence_N, correct_N = generator.permutation(n) / max(n, 2), generator.random(n) < 0.5
        order = np.argsort(confidence_N)
        parts = np.array_split(order, bins)
        total = sum(abs(sum(float(correct_N[i]) - confidence_N[i] for i in part)) for part in parts) / n
        assert ece_equal_mass(rank(confidence_N, correct_N), bins=bins)[0] == pytest.approx(total, abs=1e-12)


def test_nll_and_brier_are_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    scores_NC, y_N = 2 * torch.randn(200, 5, generator=generator), torch.randint(5, (200,), generator=generator)
    p_NC = scores_NC.double().softmax(1).numpy()
    assert float(nll_N(scores_NC, y_N).mean()) == pytest.approx(log_loss(y_N, p_NC, labels=range(5)), abs=1e-6)
    one_NC = np.eye(5)[y_N]
    assert brier_N(scores_NC, y_N).numpy() == pytest.approx(((p_NC - one_NC) ** 2).sum(1), abs=1e-12)
    two_N = brier_N(scores_NC[:, :2], y_N % 2).mean() / 2  # scikit-learn halves the score of two classes
    assert float(two_N) == pytest.approx(brier_score_loss(y_N % 2, scores_NC[:, :2].double().softmax(1)[:, 1]), abs=1e-9)


def test_no_metric_depends_on_the_order_of_samples():
    generator = np.random.default_rng(2)
    for confidence_N, correct_N in cases(100):
        order = generator.permutation(len(correct_N))
        one, other = failure_metrics(confidence_N, correct_N), failure_metrics(confidence_N[order], correct_N[order])
        assert one == pytest.approx(other, abs=1e-12, nan_ok=True)


def test_ranking_metrics_are_invariant_to_monotone_maps_and_calibration_is_not():
    generator = np.random.default_rng(3)
    confidence_N = generator.random(300)
    correct_N = generator.random(300) < confidence_N
    one, other = failure_metrics(confidence_N, correct_N), failure_metrics(confidence_N**3, correct_N)
    for name in RANKING_METRICS:
        assert (one[name] == pytest.approx(other[name], abs=1e-12)) == (not name.startswith("ece"))


def test_coverage_at_risk_is_that_of_a_threshold():
    assert coverage_at_risk(rank([0.9, 0.8, 0.8, 0.1], [1, 1, 0, 1]), risk=0.05)[0] == 0.25
    assert coverage_at_risk(rank([0.9, 0.8, 0.8, 0.1], [1, 1, 0, 1]), risk=0.25)[0] == 1.0
    assert coverage_at_risk(rank([0.9, 0.8], [0, 1]), risk=0.05)[0] == 0.0
    assert risk_at_coverage(rank([0.9, 0.8, 0.8, 0.1], [1, 1, 0, 1]), coverage=0.5)[0] == 0.25  # half of a tie


def test_extremes_by_arithmetic():
    perfect = failure_metrics([0.9, 0.8, 0.2, 0.1], [1, 1, 0, 0])
    assert perfect["auroc"] == 1 and perfect["fpr95"] == 0 and perfect["e_aurc"] == pytest.approx(0, abs=1e-15)
    assert perfect["e_augrc"] == pytest.approx(0, abs=1e-15)
    constant = failure_metrics([0.5] * 6, [1, 0, 1, 0, 0, 0])
    assert constant["auroc"] == 0.5 and constant["fpr95"] == 1 and constant["aurc"] == pytest.approx(4 / 6)
    one = failure_metrics([0.7], [True])
    assert isnan(one["auroc"]) and one["aurc"] == 0 and one["ece"] == pytest.approx(0.3)


def test_targets_of_failure_prediction():
    """All eight outcomes of three exits."""
    right_KN = np.array(list(itertools.product([0, 1], repeat=3)), dtype=bool).T
    expected = [[r[k] or not any(r[k + 1 :]) for r in right_KN.T.tolist()] for k in range(3)]
    assert failure_targets(right_KN).tolist() == expected
    assert failure_targets(right_KN)[-1].all()


def test_eefp_is_the_auroc_of_the_target_and_undefined_at_the_last_exit():
    generator = np.random.default_rng(4)
    confidence_KN, correct_KN = generator.random((3, 50)), generator.random((3, 50)) < 0.6
    found = eefp_K(confidence_KN, correct_KN)
    for k in range(2):
        assert found[k] == pytest.approx(roc_auc_score(failure_targets(correct_KN)[k], confidence_KN[k]), abs=1e-12)
    assert isnan(found[2])
    assert all(isnan(value) for value in eefp_K(confidence_KN, np.ones((3, 50))))


@pytest.mark.parametrize("levels", [12, 10**9])
@pytest.mark.parametrize("metric", list(RANKING_METRICS))
def test_bootstrap_is_a_loop_over_resamples(metric, levels):
    """The same draws, one resample after the other; with ties and without."""
    generator = np.random.default_rng(5)
    confidence_N = generator.integers(0, levels, 30) / levels
    correct_N = generator.random(30) < confidence_N
    index_RN = np.random.default_rng(7).integers(30, size=(50, 30), dtype=np.int32)
    values = [failure_metrics(confidence_N[index_N], correct_N[index_N])[metric] for index_N in index_RN]
    values = [value for value in values if not isnan(value)]
    low, high = bootstrap(confidence_N, correct_N, metric=metric, resamples=50, level=0.9, seed=7)
    assert (low, high) == pytest.approx(tuple(np.quantile(values, [0.05, 0.95])), abs=1e-12)
    assert bootstrap(confidence_N, correct_N, metric=metric, resamples=50, level=0.9, seed=7) == (low, high)


def test_bootstrap_in_portions_draws_the_same_resamples():
    """More samples than fit into one portion; the reference is one resample after the other."""
    generator = np.random.default_rng(6)
    confidence_N = generator.random(120_000)
    correct_N = generator.random(120_000) < confidence_N
    draws = np.random.default_rng(1)
    index_RN = np.concatenate([draws.integers(120_000, size=(r, 120_000), dtype=np.int32) for r in (4, 2)])
    values = [aurc(rank(confidence_N[index_N], correct_N[index_N]))[0] for index_N in index_RN]
    found = bootstrap(confidence_N, correct_N, metric="aurc", resamples=6, level=0.5, seed=1)
    assert found == pytest.approx(tuple(np.quantile(values, [0.25, 0.75])), abs=1e-12)


def test_an_undefined_metric_has_no_interval():
    assert bootstrap([0.1, 0.2], [1, 1], metric="auroc") == pytest.approx((nan, nan), nan_ok=True)


@pytest.mark.parametrize(
    ("confidence", "correct", "found"),
    [([], [], "shapes"), ([0.1], [1, 0], "shapes"), ([nan, 0.2], [1, 0], "not finite")],
)
def test_bad_input_is_one_line(confidence, correct, found):
    with pytest.raises(DataError, match=found):
        rank(confidence, correct)
    if found == "shapes":
        with pytest.raises(DataError, match=found):
            bootstrap(confidence, correct, metric="aurc")


def test_confidences_that_are_not_finite_are_undefined():
    for bad in (nan, np.inf, -np.inf):
        assert all(isnan(value) for value in failure_metrics([bad, 0.2, 0.4], [1, 0, 1]).values())
        assert bootstrap([bad, 0.2, 0.4], [1, 0, 1], metric="aurc") == pytest.approx((nan, nan), nan_ok=True)
    correct_KN = [[0, 0, 1], [1, 0, 1], [1, 0, 1]]
    found = eefp_K([[0.1, 0.5, 0.9], [nan, 0.5, 0.9], [0.1, 0.5, 0.9]], correct_KN)
    # Only the exit itself is undefined: the target of the first exit depends on correctness alone.
    assert found == pytest.approx((1.0, nan, nan), nan_ok=True)


@pytest.mark.parametrize(
    ("metric", "values", "exit", "reason"),
    [
        ("eefp", {"eefp": (0.5, nan), "aurc": (0.1, 0.1)}, 1, "there is no later exit"),
        ("eefp", {"eefp": (nan, nan), "aurc": (0.1, 0.1)}, 0, UNDEFINED["eefp"]),
        ("auroc", {"auroc": (nan, 0.5), "aurc": (0.0, 0.1)}, 0, UNDEFINED["auroc"]),
        ("auroc", {"auroc": (nan, 0.5), "aurc": (nan, 0.1), "accuracy": (0.1, 0.2)}, 0, "confidences are not finite"),
        ("auroc", {"auroc": (nan, 0.5), "aurc": (nan, 0.1), "accuracy": (nan, 0.2)}, 0, "no samples"),
        ("brier", {"brier": (nan, nan), "aurc": (0.1, 0.1)}, 0, "not recorded"),
    ],
)
def test_reasons_of_undefined_metrics(metric, values, exit, reason):
    assert undefined_reason(metric, values, exit=exit) == reason


def test_calibration_needs_probabilities():
    with pytest.raises(DataError, match="give probabilities"):
        ece(rank([3.0, 0.2], [1, 0]))


def test_every_metric_has_a_direction():
    assert set(RANKING_METRICS) - LOWER_IS_BETTER == {"auroc", "cov_at_5_risk"}
