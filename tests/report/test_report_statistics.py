"""Statistics against formulas written longhand and values of printed tables."""

from __future__ import annotations

import math

import pytest

from clframe.metrics.statistics import Point, cost_at, deviation, mean, paired, pareto_front

NAN = float("nan")


def test_the_interval_is_the_textbooks():
    """d = 0.1, 0.2, 0.3: mean 0.2, s = 0.1, half width 4.303 s / sqrt(3); 4.303 is the printed t(0.975, 2)."""
    found = paired({0: 0.5, 1: 0.5, 2: 0.5}, {0: 0.6, 1: 0.7, 2: 0.8})
    assert (found.seeds, found.undefined) == ((0, 1, 2), "")
    assert found.mean == pytest.approx(0.2)
    assert found.half_width == pytest.approx(4.30265 * 0.1 / math.sqrt(3), rel=1e-5)
    assert found.relative == pytest.approx(0.4)


def test_pairs_are_of_common_seeds_only():
    found = paired({0: 0.1, 4: 0.5}, {4: 0.75, 7: 1.0})
    assert (found.seeds, found.base, found.mean) == ((4,), 0.5, 0.25)
    assert math.isnan(found.half_width)
    nothing = paired({0: 0.1}, {1: 0.2})
    assert nothing.undefined == "no seed in common" and math.isnan(nothing.mean)


def test_a_nan_is_named_and_never_skipped():
    found = paired({0: 0.1, 1: NAN}, {0: 0.2, 1: 0.3})
    assert found.undefined == "seed 1 has no number" and math.isnan(found.mean)
    assert math.isnan(paired({0: 0.0}, {0: 0.5}).relative)


def test_means_and_deviations():
    assert mean([1.0, 2.0, 6.0]) == 3.0
    assert deviation([1.0, 2.0, 6.0]) == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert math.isnan(mean([])) and math.isnan(deviation([1.0])) and math.isnan(deviation([1.0, NAN]))


def test_the_front_has_no_point_that_another_beats():
    points = [Point(3, 0.9), Point(1, 0.5), Point(2, 0.5), Point(2, 0.7), Point(4, 0.9), Point(0.5, NAN)]
    front = pareto_front(points)
    assert [(p.cost, p.accuracy) for p in front] == [(1, 0.5), (2, 0.7), (3, 0.9)]
    for p in front:
        assert not any(q.cost <= p.cost and q.accuracy >= p.accuracy and q != p for q in points)


def test_cost_at_equal_accuracy():
    points = [Point(100, 0.5), Point(200, 0.6), Point(400, 0.9)]
    assert cost_at(points, 0.5) == 100
    assert cost_at(points, 0.4) == 100
    assert cost_at(points, 0.9) == 400
    # straight from 100 to 400 beats the way over 200: 100 + 300 * 0.25 / 0.4
    assert cost_at(points, 0.75) == pytest.approx(287.5)
    assert math.isnan(cost_at(points, 0.91)) and math.isnan(cost_at([], 0.5)) and math.isnan(cost_at(points, NAN))
