"""The proxy study: correlations, their intervals, and variants of one run."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from clframe.errors import DataError
from clframe.exits.curves import AccuracyCostCurve, budget_points
from clframe.exits.decisions import ExitEvaluation
from clframe.exits.gate import LearnedConfidence
from clframe.exits.learned import confidences, out_of_fold
from clframe.exits.proxy import (
    CALIBRATIONS,
    GAINS,
    MEASURES,
    Variant,
    area,
    correlations,
    difference,
    spearman,
    variants_of_scores,
)
from clframe.exits.study import ExitScores


def made(count=12, runs=4, *, seed=0, noise=0.3):
    """Variants whose EEFP follows the gain closely and whose ECE follows it loosely, downwards."""
    generator = np.random.default_rng(seed)
    variants = []
    for v in range(count):
        gain = float(generator.random())
        metrics = {"eefp": gain + 0.01 * generator.random(), "ece": -gain + noise * 5 * generator.random()}
        variants.append(Variant(run=f"r{v % runs}", label=f"{v}", metrics=metrics, gains={"accuracy_50": gain}))
    return variants


def test_correlations_are_scipys_and_missing_numbers_are_left_out():
    variants = [*made(), Variant(run="r0", label="nan", metrics={"eefp": float("nan"), "ece": 0.1}, gains={"accuracy_50": 0.5})]
    found = {(c.metric, c.gain): c for c in correlations(variants, resamples=50)}
    for metric in ("eefp", "ece"):
        pairs = [(v.metrics[metric], v.gains["accuracy_50"]) for v in variants if v.metrics[metric] == v.metrics[metric]]
        one = found[metric, "accuracy_50"]
        assert one.rho == pytest.approx(spearmanr(*zip(*pairs, strict=True)).statistic, abs=1e-12)
        assert one.low <= one.high and one.variants == len(pairs)
    assert np.isnan(found["auroc", "accuracy_50"].rho) and np.isnan(found["eefp", "area"].low)


def test_weighted_spearman_is_scipys_on_repeated_pairs():
    """Multiplicities against the pairs written out, with ties, gaps and constant sides."""
    generator = np.random.default_rng(3)
    for levels in (2, 5, 1000):
        x_V, y_V = (generator.integers(levels, size=15).astype(float) for _ in range(2))
        x_V[3] = y_V[7] = np.nan
        weight_RV = generator.integers(0, 3, size=(40, 15)).astype(float)
        weight_RV[0] = 0
        weight_RV[1] = np.arange(15) == 5
        for weight_V, found in zip(weight_RV, spearman(x_V, y_V, weight_RV), strict=True):
            index = np.repeat(np.arange(15), weight_V.astype(int))
            index = index[~np.isnan(x_V[index]) & ~np.isnan(y_V[index])]
            if len(index) < 3 or len(set(x_V[index])) < 2 or len(set(y_V[index])) < 2:
                assert np.isnan(found)
            else:
                assert found == pytest.approx(spearmanr(x_V[index], y_V[index]).statistic, abs=1e-12)


def test_the_interval_is_that_of_runs_drawn_with_replacement():
    variants = made(12, runs=4)
    found = next(c for c in correlations(variants, resamples=30, seed=5) if (c.metric, c.gain) == ("ece", "accuracy_50"))
    values = []
    for chosen in np.random.default_rng(5).integers(4, size=(30, 4)):
        drawn = [v for r in chosen for v in variants if v.run == f"r{r}"]
        values.append(spearmanr([v.metrics["ece"] for v in drawn], [v.gains["accuracy_50"] for v in drawn]).statistic)
    assert (found.low, found.high) == pytest.approx(tuple(np.nanquantile(values, [0.025, 0.975])), abs=1e-12)


def test_the_difference_has_the_sign_of_the_better_proxy_and_is_seeded():
    variants = made(60, runs=20)
    found = difference(variants, "eefp", "ece", gain="accuracy_50", resamples=300, seed=1)
    assert found.rho > 0 and found.low > 0
    assert difference(variants, "eefp", "ece", gain="accuracy_50", resamples=300, seed=1) == found
    opposite = difference(variants, "ece", "eefp", gain="accuracy_50", resamples=300, seed=1)
    assert (opposite.rho, opposite.low, opposite.high) == pytest.approx((-found.rho, -found.high, -found.low))


def test_intervals_resample_runs_not_variants():
    """Copies of a run are no further evidence: every resample of two equal runs has the same correlation."""
    variants = made(12, runs=1)
    copies = [dataclasses.replace(variant, run="copy") for variant in variants]
    one, two = (
        next(c for c in correlations(found, resamples=20) if (c.metric, c.gain) == ("eefp", "accuracy_50"))
        for found in (variants, [*variants, *copies])
    )
    assert two.low == pytest.approx(two.rho) == pytest.approx(two.high) == pytest.approx(one.rho)
    assert np.isnan([one.low, one.high]).all()  # one run has no spread over runs


def test_area_by_arithmetic():
    curve = AccuracyCostCurve(
        thresholds=(0, 1, 2), costs=(0.2, 0.6, 1.0), accuracies=(0.5, 0.7, 0.9), exit_costs=(0.2, 1.0), exit_accuracies=(0.5, 0.9)
    )
    assert area(curve) == pytest.approx((0.6 * 0.4 + 0.8 * 0.4) / 0.8)


def test_variants_of_scores_have_every_calibration_and_measure():
    generator = np.random.default_rng(0)

    def scores(n):
        y_N = generator.integers(3, size=n)
        exits = [(k + 1) * np.eye(3)[y_N] + generator.normal(size=(n, 3)) for k in range(3)]
        return ExitScores(np.stack(exits).astype(np.float32), y_N.astype(np.int64), np.full(n, -1))

    found = variants_of_scores("r", scores(80), scores(200), cost_K=(10, 20, 40), backbone_cost=36)
    assert [v.label for v in found] == [f"{kind}, {measure}" for kind in CALIBRATIONS for measure in MEASURES]
    assert all(set(v.gains) == set(GAINS) for v in found)
    plain, hot = found[0], found[len(MEASURES)]
    assert plain.metrics["accuracy"] == hot.metrics["accuracy"]  # a temperature changes no prediction
    assert plain.metrics["nll"] != hot.metrics["nll"] and plain.metrics["ece"] != hot.metrics["ece"]


def test_thresholds_of_a_measure_that_overfits_are_chosen_out_of_fold(monkeypatch):
    monkeypatch.setattr(LearnedConfidence, "overfits", True)
    generator = np.random.default_rng(1)
    y_N = generator.integers(3, size=25)
    scores_KNC = np.stack([(k + 1) * np.eye(3)[y_N] + 2 * generator.normal(size=(25, 3)) for k in range(3)])
    scores = ExitScores(scores_KNC.astype(np.float32), y_N, np.full(25, -1))
    (variant,) = variants_of_scores(
        "r", scores, scores, cost_K=(10, 20, 40), backbone_cost=36, calibrations=("none",), measures=("gate",)
    )
    tensors, targets_N = [torch.from_numpy(s) for s in scores.scores_KNC], torch.from_numpy(y_N)
    correct_KN = torch.stack([s.argmax(1) == targets_N for s in tensors])
    measure = LearnedConfidence.fit(tensors, targets_N)
    held_out, test = (
        ExitEvaluation(confidence_KN=c_KN, correct_KN=correct_KN, cost_K=(10, 20, 40))
        for c_KN in (out_of_fold(LearnedConfidence, tensors, targets_N), confidences(measure, tensors).double())
    )
    at = {p.name: p.accuracy for p in budget_points(held_out, test, backbone_cost=36).points}
    assert variant.gains["accuracy_50"] == at["50%"] and variant.gains["accuracy_75"] == at["75%"]
    in_sample = {p.name: p.threshold for p in budget_points(test, test, backbone_cost=36).points}
    assert in_sample != {p.name: p.threshold for p in budget_points(held_out, test, backbone_cost=36).points}


def test_too_few_variants_are_refused():
    with pytest.raises(DataError, match="found 2 variants; give at least 3"):
        correlations(made(2))
