"""The proxy study: correlations, their intervals, and variants of one run."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy.stats import spearmanr

from clframe.errors import DataError
from clframe.exits.curves import AccuracyCostCurve
from clframe.exits.proxy import (
    CALIBRATIONS,
    GAINS,
    MEASURES,
    Variant,
    area,
    correlations,
    difference,
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


def test_too_few_variants_are_refused():
    with pytest.raises(DataError, match="found 2 variants; give at least 3"):
        correlations(made(2))
