"""Every metric against loops written out, on matrices of every shape."""

from __future__ import annotations

import math
import random

import pytest

from clframe.errors import ClframeError
from clframe.metrics import (
    average_incremental_accuracy,
    average_seen_accuracy,
    backward_transfer,
    final_average_accuracy,
    final_weighted_accuracy,
    forgetting,
    forgetting_E,
    forward_transfer,
    learning_accuracy,
)

NAN = float("nan")
SHAPES = [(1, 1), (2, 2), (3, 3), (5, 5), (3, 5), (5, 3), (8, 1), (1, 4), (2, 3), (4, 3)]


def random_matrix(rows, columns, seed=0):
    source = random.Random(f"{rows},{columns},{seed}")
    return [[source.random() for _ in range(columns)] for _ in range(rows)]


def mean(values):
    total, count = 0.0, 0
    for value in values:
        total, count = total + value, count + 1
    return total / count


@pytest.fixture(params=SHAPES, ids=lambda shape: f"T{shape[0]}E{shape[1]}")
def accuracy_TE(request):
    return random_matrix(*request.param)


def test_final_average_accuracy(accuracy_TE):
    assert final_average_accuracy(accuracy_TE).value == pytest.approx(mean(accuracy_TE[-1]), abs=1e-15)


def test_weighted_is_right_over_total_on_sizes_5_1_7():
    right, sizes = (4, 1, 2), (5, 1, 7)
    accuracy_TE = [[0.0, 0.0, 0.0], [r / n for r, n in zip(right, sizes, strict=True)]]
    assert final_weighted_accuracy(accuracy_TE, sizes).value == pytest.approx(7 / 13, abs=1e-15)
    assert final_average_accuracy(accuracy_TE).value == pytest.approx((4 / 5 + 1 + 2 / 7) / 3, abs=1e-15)


def test_weighted_leaves_out_an_experience_without_samples():
    assert final_weighted_accuracy([[0.5, NAN, 1.0]], (4, 0, 4)).value == 0.75
    score = final_weighted_accuracy([[NAN]], (0,))
    assert math.isnan(score.value)
    assert score.undefined == "there are no test samples"


def test_average_incremental_accuracy(accuracy_TE):
    rows, columns = len(accuracy_TE), len(accuracy_TE[0])
    per_row = []
    for i in range(rows):
        seen = [accuracy_TE[i][j] for j in range(columns) if j <= i]
        per_row.append(mean(seen))
    assert average_incremental_accuracy(accuracy_TE).value == pytest.approx(mean(per_row), abs=1e-15)
    assert average_seen_accuracy(accuracy_TE).value == pytest.approx(per_row[-1], abs=1e-15)


def test_forgetting(accuracy_TE):
    rows, columns = len(accuracy_TE), len(accuracy_TE[0])
    expected = {}
    for j in range(columns):
        if j < rows - 1:
            best = -1.0
            for i in range(j, rows - 1):
                best = max(best, accuracy_TE[i][j])
            expected[j] = best - accuracy_TE[rows - 1][j]
    found = forgetting_E(accuracy_TE)
    assert len(found) == columns
    for j, score in enumerate(found):
        if j in expected:
            assert score.value == pytest.approx(expected[j], abs=1e-15)
            assert score.undefined == ""
        else:
            assert math.isnan(score.value)
            assert score.undefined == "no experience came after it"
    if rows == 1:
        assert math.isnan(forgetting(accuracy_TE).value)
        assert forgetting(accuracy_TE).undefined == "needs two experiences, found one"
    else:
        assert forgetting(accuracy_TE).value == pytest.approx(mean(expected.values()), abs=1e-15)


def test_forgetting_starts_when_the_experience_is_learnt_and_may_be_negative():
    # 0.9 on experience 1 was before it was learned, by chance
    accuracy_TE = [[0.5, 0.9, 0.0], [0.5, 0.2, 0.0], [0.75, 0.5, 1.0]]
    assert [score.value for score in forgetting_E(accuracy_TE)[:2]] == pytest.approx([-0.25, -0.3], abs=1e-15)
    assert forgetting(accuracy_TE).value == pytest.approx(-0.275, abs=1e-15)


def test_forgetting_takes_the_best_past_not_the_first():
    accuracy_TE = [[0.5], [0.75], [0.25]]
    assert forgetting(accuracy_TE).value == 0.5
    assert backward_transfer(accuracy_TE).value == -0.25


def test_backward_transfer(accuracy_TE):
    rows, columns = len(accuracy_TE), len(accuracy_TE[0])
    changes = [accuracy_TE[rows - 1][j] - accuracy_TE[j][j] for j in range(columns) if j < rows - 1]
    found = backward_transfer(accuracy_TE)
    if changes:
        assert found.value == pytest.approx(mean(changes), abs=1e-15)
    else:
        assert math.isnan(found.value)
        assert found.undefined == "needs two experiences, found one"


def test_forward_transfer(accuracy_TE):
    rows, columns = len(accuracy_TE), len(accuracy_TE[0])
    baseline_E = random_matrix(1, columns, seed=1)[0]
    starts = [accuracy_TE[j - 1][j] - baseline_E[j] for j in range(1, columns) if j < rows]
    found = forward_transfer(accuracy_TE, baseline_E)
    if starts:
        assert found.value == pytest.approx(mean(starts), abs=1e-15)
    else:
        assert math.isnan(found.value)
        assert found.undefined == "needs two experiences, found one"


def test_forward_transfer_without_a_baseline_says_so():
    found = forward_transfer([[1.0, 0.5], [1.0, 1.0]], None)
    assert math.isnan(found.value)
    assert found.undefined == "accuracy at random initialization was not evaluated"


def test_learning_accuracy(accuracy_TE):
    diagonal = [accuracy_TE[k][k] for k in range(min(len(accuracy_TE), len(accuracy_TE[0])))]
    assert learning_accuracy(accuracy_TE).value == pytest.approx(mean(diagonal), abs=1e-15)


METRICS_AND_ENTRIES = [
    (final_average_accuracy, {(2, 0), (2, 1), (2, 2)}),
    (lambda a: final_weighted_accuracy(a, (5, 1, 7)), {(2, 0), (2, 1), (2, 2)}),
    (average_incremental_accuracy, {(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)}),
    (forgetting, {(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)}),
    (backward_transfer, {(0, 0), (1, 1), (2, 0), (2, 1)}),
    (lambda a: forward_transfer(a, (0.1, 0.1, 0.1)), {(0, 1), (1, 2)}),
    (learning_accuracy, {(0, 0), (1, 1), (2, 2)}),
]


@pytest.mark.parametrize(("metric", "needed"), METRICS_AND_ENTRIES, ids=[
    "final", "weighted", "incremental", "forgetting", "backward", "forward", "learning"])  # fmt: skip
def test_a_missing_accuracy_undefines_exactly_the_metrics_that_need_it(metric, needed):
    whole = random_matrix(3, 3)
    for i in range(3):
        for j in range(3):
            holed = [list(row) for row in whole]
            holed[i][j] = NAN
            found = metric(holed)
            if (i, j) in needed:
                assert math.isnan(found.value)
                assert found.undefined == f"experience {j} was not evaluated after experience {i}"
            else:
                assert found == metric(whole)


def test_a_missing_baseline_is_named():
    found = forward_transfer([[1.0, 0.5], [1.0, 1.0]], (NAN, NAN))
    assert found.undefined == "experience 1 was not evaluated before training"


def test_one_experience():
    assert final_average_accuracy([[0.25]]).value == 0.25
    assert average_incremental_accuracy([[0.25]]).value == 0.25
    assert learning_accuracy([[0.25]]).value == 0.25


@pytest.mark.parametrize("bad", [[], [[]], [[0.5, 0.5], [0.5]]])
def test_a_matrix_that_is_none_is_refused(bad):
    with pytest.raises(ClframeError, match=r"^accuracy matrix: .*; give at least one row"):
        final_average_accuracy(bad)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ClframeError, match=r"^samples_E: 1 entries for 2 test experiences; give one each$"):
        final_weighted_accuracy([[0.5, 0.5]], (3,))
    with pytest.raises(ClframeError, match=r"^baseline_E: 3 entries for 2 test experiences; give one each$"):
        forward_transfer([[0.5, 0.5]], (0.1, 0.1, 0.1))
