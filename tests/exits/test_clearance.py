"""Thresholds between two samples: the same decisions, also after the rounding of another runtime."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from clframe.exits import ExitEvaluation, budgets, curves
from clframe.exits.budgets import solve
from clframe.exits.clearance import CLEARANCE, clear_threshold, clear_thresholds
from clframe.exits.curves import budget_points
from clframe.exits.decisions import ALWAYS, NEVER, decide
from clframe.exits.policies import patience, patience_threshold

METHODS = ("shared", "quantiles", "coordinate")
ONE_BELOW = float(np.nextafter(np.float32(1), np.float32(0)))


def evaluation(samples=60, *, levels=1000, seed=0, exits=4):
    """Confidences of float32 on a grid of 1 / levels, and correctness that they inform."""
    generator = torch.Generator().manual_seed(seed)
    confidence_KN = (torch.rand(exits, samples, generator=generator) * levels).ceil() / levels
    right_KN = torch.rand(exits, samples, generator=generator) < confidence_KN
    return ExitEvaluation(confidence_KN=confidence_KN, correct_KN=right_KN, cost_K=(20, 45, 70, 100)[:exits])


def raw(monkeypatch):
    """Leave thresholds at the confidences of samples, as the solvers find them."""
    monkeypatch.setattr(budgets, "clear_thresholds", lambda _, thresholds: thresholds)
    monkeypatch.setattr(curves, "clear_threshold", lambda threshold, _: threshold)


@pytest.mark.parametrize(
    ("threshold", "confidences", "expected"),
    [
        (0.9, [0.9, 0.5], 0.9 - CLEARANCE),
        (0.7, [0.9, 0.5], 0.7),  # far from both
        (0.500001, [0.9, 0.5], 0.5 + CLEARANCE),
        (0.899999, [0.9, 0.5], 0.9 - CLEARANCE),
        (0.5, [0.5, 0.5, 0.499998], 0.499999),  # halfway; equal confidences stop together
        (0.5, [0.9, 0.5], 0.5 - CLEARANCE),  # nothing below
        (1.0, [1.0, 0.5], 1 - CLEARANCE),
        (0.0, [0.3, 0.0], 0.0),  # no confidence is lower
        (4e-6, [4e-6, 0.3], 0.0),
        (4e-6, [4e-6, 0.0], 2e-6),
        (4e-6, [4e-6, -math.inf], 0.0),
        (1.0, [1.0, ONE_BELOW], 1.0),  # neighbors in float32
        (2000.0, [2000.0, 3.0], 2000 * (1 - CLEARANCE)),
        (-1000.0, [-1000.0, -2000.0], -1000 * (1 + CLEARANCE)),
        (0.6, [0.5, 0.4], 0.6),
        (ALWAYS, [0.5, 0.4], ALWAYS),
        (NEVER, [0.5, 0.4], NEVER),
        (0.5, [], 0.5),
    ],
)
def test_by_hand(threshold, confidences, expected):
    confidence_M = torch.tensor(confidences, dtype=torch.float32).double()
    threshold = float(np.float32(threshold))
    found = clear_threshold(threshold, confidence_M)
    assert found == pytest.approx(expected, rel=1e-7, abs=1e-8)
    assert torch.equal(confidence_M >= found, confidence_M >= threshold)
    assert found == float(np.float32(found))  # exact in the type that dynamic inference compares in
    assert clear_threshold(found, confidence_M) == found


def test_values_of_patience_keep_their_meaning():
    carried, values = (), []
    for exit in range(4):
        value_B, carried = patience(exit, torch.tensor([[1.0, 0.0]]), carried)
        values.append(float(value_B))
    for agreements, value in enumerate(values):
        found = clear_threshold(value, torch.tensor(values, dtype=torch.float64))
        assert max(0, value - 1.1 * CLEARANCE) <= found <= patience_threshold(agreements)


@pytest.mark.parametrize("levels", [3, 1000, 2**24])
@pytest.mark.parametrize(("goal", "fallback"), [({"budget": 60}, "last"), ({"accuracy": 0.55}, "confident")])
@pytest.mark.parametrize("method", METHODS)
def test_the_solution_is_that_of_the_samples_themselves(method, goal, fallback, levels, monkeypatch):
    data = evaluation(levels=levels, seed=levels % 7)
    found = solve(data, method=method, fallback=fallback, **goal)
    raw(monkeypatch)
    plain = solve(data, method=method, fallback=fallback, **goal)
    assert replace(found.validation, thresholds=()) == replace(plain.validation, thresholds=())
    stop_N, plain_N = (decide(data, solution.thresholds).stop_N for solution in (found, plain))
    assert torch.equal(stop_N, plain_N)
    for exit, (moved, at) in enumerate(zip(found.thresholds, plain.thresholds, strict=True)):
        assert moved == at or abs(at - moved) <= 1.1 * CLEARANCE
        if levels != 2**24:  # the gaps of the others are wide enough in float32
            assert not bool((data.confidence_KN[exit, stop_N >= exit] == moved).any())


@pytest.mark.parametrize("method", METHODS)
def test_rounding_of_another_runtime_changes_no_decision(method, monkeypatch):
    data = evaluation(200)
    generator = torch.Generator().manual_seed(1)
    noise_KN = CLEARANCE * (torch.rand(4, 200, generator=generator, dtype=torch.float64) - 0.5)
    rounded = replace(data, confidence_KN=data.confidence_KN + noise_KN)
    changed = []
    for clear in (True, False):
        if not clear:
            raw(monkeypatch)
        thresholds = solve(data, method=method, budget=50).thresholds
        changed.append(int((decide(data, thresholds).stop_N != decide(rounded, thresholds).stop_N).sum()))
    assert changed[0] == 0 < changed[1]


def test_recorded_budgets_are_clear_of_the_validation_samples(monkeypatch):
    validation, test = evaluation(200), evaluation(300, seed=1)
    found = budget_points(validation, test, backbone_cost=100).points
    raw(monkeypatch)
    for point, plain in zip(found, budget_points(validation, test, backbone_cost=100).points, strict=True):
        assert replace(point, threshold=0.0) == replace(plain, threshold=0.0)
        assert math.isinf(plain.threshold) or point.threshold == pytest.approx(plain.threshold - CLEARANCE, abs=1e-7)
    assert any(math.isfinite(point.threshold) for point in found)


def test_only_the_samples_that_reach_an_exit_count():
    """The second exit's confidence of a sample that stopped at the first one does not limit the clearance."""
    data = ExitEvaluation(
        confidence_KN=[[0.9, 0.1, 0.2], [0.699999, 0.7, 0.3], [1.0] * 3], correct_KN=torch.ones(3, 3), cost_K=(1, 2, 3)
    )
    assert clear_thresholds(data, (0.9, 0.7)) == pytest.approx((0.9 - CLEARANCE, 0.7 - CLEARANCE), abs=1e-7)
    assert clear_thresholds(data, (NEVER, 0.7)) == pytest.approx((NEVER, 0.6999995), abs=1e-7)
