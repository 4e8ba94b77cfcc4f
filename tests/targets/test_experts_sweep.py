"""Settings, budgets and stops: chosen on validation data, read off on test data."""

import pytest
import torch

from clframe.moe import CumulativeShare, DynamicK, TopK
from clframe.moe.conversion.measure import Pass
from clframe.moe.conversion.sweep import (
    TAUS,
    Sweep,
    best_within_budget,
    cost_share,
    evaluate_threshold,
    pareto_front,
    points,
    sweep,
)


def made(share, right, *, confidence=None, costs=None, model=None):
    """A pass over samples that all cost the same: ``share`` of the networks', ``model`` of the model's cost."""
    correct_KN = torch.tensor(right, dtype=torch.float64)
    correct_KN = correct_KN if correct_KN.dim() == 2 else correct_KN[None]
    n = correct_KN.shape[1]
    model = share if model is None else model
    return Pass(
        correct_KN=correct_KN,
        confidence_KN=torch.ones_like(correct_KN) if confidence is None else torch.tensor(confidence, dtype=torch.float64),
        targets_N=torch.ones(n, dtype=torch.float64),
        y_N=torch.zeros(n, dtype=torch.long),
        tokens_NL=torch.ones(n, 1),
        ran_NL=torch.ones(n, 1),
        real_NL=torch.ones(n, 1),
        real_ran_NL=torch.ones(n, 1),
        cost_KN=torch.full_like(correct_KN, 1000 * model) if costs is None else torch.tensor(costs, dtype=torch.float64),
        ffn_N=torch.full((n,), 100.0 * share, dtype=torch.float64),
        dense_N=torch.full((n,), 1000.0, dtype=torch.float64),
        dense_ffn_N=torch.full((n,), 100.0, dtype=torch.float64),
    )


def test_budgets_are_met_on_validation_data_and_read_off_on_test_data():
    """Validation costs tau of the networks and half of that more of the model; test data cost a tenth more."""
    seen = {"validation": [], "test": []}

    def validation(gate):
        seen["validation"].append(gate)
        return made(gate.tau, [1.0, 0.0], model=0.5 + gate.tau / 2)

    def test(gate):
        seen["test"].append(gate)
        return made(1.1 * gate.tau, [1.0, float(gate.tau > 0.3)], model=0.5 + 0.55 * gate.tau)

    swept = sweep("dynamic_k", most=8, validation=validation, test=test, also=(0.33,))
    assert set(TAUS) | {0.33} <= set(swept.values) and list(swept.values) == sorted(swept.values)
    assert sorted(gate.tau for gate in seen["validation"]) == [gate.tau for gate in seen["test"]] == list(swept.values)
    assert len(seen["validation"]) == len(set(swept.values))  # each once
    found = {(point.scope, point.budget): point for point in points(swept)}
    assert len(found) == 6
    for (scope, budget), point in found.items():
        if scope == "model" and budget == 0.25:
            assert point.at is None and point.cheapest == 0.5
            continue
        share = cost_share(swept.validation[point.at], scope)
        gap = 0.2 / 2**6 * (0.5 if scope == "model" else 1.0)
        assert budget - gap <= share <= budget
        assert cost_share(swept.test[point.at], scope) == pytest.approx(share + (0.1 * swept.values[point.at]) * (
            0.5 if scope == "model" else 1.0))  # fmt: skip
    assert found["ffn", 0.25].at is not None and swept.test[found["ffn", 0.25].at].accuracy == 0.5
    assert swept.test[found["ffn", 0.75].at].accuracy == 1.0


@pytest.mark.parametrize(("kind", "gate"), [("dynamic_k", DynamicK), ("cumulative", CumulativeShare), ("top_k", TopK)])
def test_every_gate(kind, gate):
    """Whole experts are tried one by one where a budget lies between them."""
    used = []

    def run(one):
        used.append(one)
        return made(one.k / 40 if kind == "top_k" else one.tau, [1.0])

    swept = sweep(kind, most=40, validation=run, test=run)
    assert all(type(one) is gate for one in used)
    at = {point.budget: swept.values[point.at] for point in points(swept) if point.scope == "ffn"}
    if kind == "top_k":
        assert at == {0.25: 10.0, 0.5: 20.0, 0.75: 30.0} and max(swept.values) == 40.0 and min(swept.values) == 1.0
    else:
        assert all(budget - 0.01 < tau <= budget for budget, tau in at.items())


def test_a_whole_expert_below_the_budget():
    def run(one):
        return made(one.k / 7, [1.0])

    swept = sweep("top_k", most=7, validation=run, test=run)
    assert {p.budget: swept.values[p.at] for p in points(swept) if p.scope == "ffn"} == {0.25: 1.0, 0.5: 3.0, 0.75: 5.0}


CONFIDENCE = [[0.9, 0.6, 0.2], [0.1, 0.7, 0.3], [0.5, 0.5, 0.5]]
RIGHT = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]]
COSTS = [[100.0] * 3, [400.0] * 3, [900.0] * 3]


def test_stopping_longhand():
    one = made(1.0, RIGHT, confidence=CONFIDENCE, costs=COSTS)
    accuracy, share, by_exit = evaluate_threshold(one, 0.65)
    assert (accuracy, share) == (1.0, (100 + 400 + 900) / 3000) and by_exit.tolist() == [1 / 3] * 3
    assert evaluate_threshold(one, 0.0)[:2] == (1 / 3, 0.1)
    assert evaluate_threshold(one, 2.0)[:2] == (1.0, 0.9)
    accuracy, share, _ = evaluate_threshold(one, 0.55)
    assert accuracy == 2 / 3 and share == pytest.approx((100 + 100 + 900) / 3000)


def test_gate_and_exits_together():
    """Gate 0 halves all costs and gets the third sample wrong on validation data; test data say otherwise."""
    half = [[cost / 2 for cost in row] for row in COSTS]
    worse = [*RIGHT[:2], [1.0, 1.0, 0.0]]
    swept = Sweep(
        "dynamic_k", (0.5, 1.0),
        (made(0.5, worse, confidence=CONFIDENCE, costs=half), made(1.0, RIGHT, confidence=CONFIDENCE, costs=COSTS)),
        (made(0.5, RIGHT, confidence=CONFIDENCE, costs=half), made(1.0, worse, confidence=CONFIDENCE, costs=COSTS)),
    )  # fmt: skip
    thresholds = (0.0, 0.65, 2.0)
    front = pareto_front(swept, thresholds=thresholds)
    assert [(stop.at, stop.threshold) for stop in front] == [(0, 0.0), (0, 0.65), (1, 0.65)]
    shares = [0.05, 1400 / 6000, 1400 / 3000]
    assert [stop.share for stop in front] == pytest.approx(shares)
    assert [stop.accuracy for stop in front] == pytest.approx([1 / 3, 1.0, 2 / 3])  # of test data
    assert [(stop.at, stop.threshold) for stop in pareto_front(swept, gates=(1,), thresholds=(2.0,))] == [(1, 2.0)]
    assert best_within_budget(swept, 0.04, thresholds=thresholds) is None
    assert best_within_budget(swept, 0.3, thresholds=thresholds).threshold == 0.65
    best = best_within_budget(swept, 1.0, thresholds=thresholds)
    assert (best.at, best.threshold) == (1, 0.65)  # the cheapest of those that are all right on validation data
    assert best_within_budget(swept, 0.5, gates=(1,), thresholds=(2.0,)) is None
