"""The study of exits: metrics of scores by arithmetic, bad input, and the tables and figures it becomes."""

from __future__ import annotations

import dataclasses
import json
from math import isnan, nan

import numpy as np
import pytest
import torch

from clframe.errors import RunFolderError
from clframe.exits.calibration_error import brier_N, nll_N
from clframe.exits.curves import NO_VALIDATION
from clframe.exits.decisions import ExitEvaluation
from clframe.exits.diagnostics import compute_exit_metrics
from clframe.exits.failure import LABELS, RANKING_METRICS, mean_over_exits, undefined_reason
from clframe.exits.output import pictures, read_study, tables, to_json
from clframe.exits.proxy import variants_of_scores
from clframe.exits.study import ExitScores, exit_curve, study_scores
from clframe.plotting.style import render_picture
from clframe.tables import to_csv, to_latex, to_markdown, to_text

COST_K, BACKBONE = (20, 50, 110), 100


def sampled(n, *, seed=0, classes=4, experiences=2):
    """Three exits, each with more signal than the one before."""
    generator = np.random.default_rng(seed)
    y_N = generator.integers(classes, size=n)
    exits = [(k + 1) * np.eye(classes)[y_N] + generator.normal(size=(n, classes)) for k in range(3)]
    return ExitScores(np.stack(exits).astype(np.float32), y_N, np.arange(n) % experiences)


def study(test, validation=None, **options):
    return study_scores("run", validation, test, exit_names=("a", "b", "c"), cost_K=COST_K, backbone_cost=BACKBONE, **options)


def outcome(right_KN, *, classes=2, margin=3.0):
    """Scores whose exits are right exactly where ``right_KN`` is, with confidences that differ between samples."""
    right_KN = np.asarray(right_KN, dtype=bool)
    samples = right_KN.shape[1]
    scores_KNC = np.zeros((*right_KN.shape, classes), dtype=np.float32)
    strength_N = margin * (1 + np.arange(samples)) / samples
    for k, right_N in enumerate(right_KN):
        scores_KNC[k, np.arange(samples), np.where(right_N, 0, 1)] = strength_N
    return ExitScores(scores_KNC, np.zeros(samples, dtype=np.int64), np.zeros(samples, dtype=np.int64))


def test_numbers_are_those_of_the_run_on_the_same_scores():
    """``results.json`` computes its metrics from another evaluation of the same predictions."""
    test = sampled(200)
    scores = [torch.from_numpy(scores_NC) for scores_NC in test.scores_KNC]
    y_N = torch.from_numpy(test.y_N)
    evaluation = ExitEvaluation(
        confidence_KN=torch.stack([scores_NC.double().softmax(1).amax(1) for scores_NC in scores]),
        correct_KN=torch.stack([scores_NC.argmax(1) == y_N for scores_NC in scores]), cost_K=COST_K,
        nll_KN=torch.stack([nll_N(scores_NC, y_N) for scores_NC in scores]),
        brier_KN=torch.stack([brier_N(scores_NC, y_N) for scores_NC in scores]),
    )  # fmt: skip
    found, expected = study(test, sampled(60, seed=1)), compute_exit_metrics(evaluation)
    assert set(found.metrics) == {"accuracy", "smooth_ece", *LABELS}
    for name in ("accuracy", *LABELS):
        values = found.metrics[name]
        assert values == pytest.approx(expected[name], abs=1e-12, nan_ok=True), name
    for e in range(2):  # the metrics of an experience are those of its samples alone
        part = study(ExitScores(test.scores_KNC[:, e::2], test.y_N[e::2], test.experience_N[e::2]))
        for name, values in found.by_experience.items():
            assert values[e] == pytest.approx(part.metrics[name], abs=1e-12, nan_ok=True), name


def test_undecided_samples_are_those_that_no_earlier_exit_stops():
    found = study(sampled(300), sampled(100, seed=1))
    threshold = next(point.threshold for point in found.points.points if point.name == "50%")
    confidence_KN = found.evaluation.confidence_KN.numpy()
    alive_N = np.ones(300, dtype=bool)
    for k in range(3):
        assert found.undecided_samples[k] == alive_N.sum()
        right_N = found.evaluation.correct_KN[k].numpy()[alive_N]
        assert found.undecided["accuracy"][k] == pytest.approx(right_N.mean())
        alive_N &= confidence_KN[k] < threshold
    assert 300 == found.undecided_samples[0] > found.undecided_samples[1] > found.undecided_samples[2] > 0


@pytest.mark.parametrize("right", [True, False])
def test_all_right_or_all_wrong_has_nan_with_a_reason(right):
    found = study(outcome(np.full((3, 12), right)))
    for name in ("auroc", "fpr95", "eefp"):
        assert all(isnan(value) for value in found.metrics[name]), name
    assert np.isnan(found.intervals["auroc"]).all() and np.isnan(found.intervals["fpr95"]).all()
    assert undefined_reason("auroc", found.metrics, exit=0) == "all predictions are correct, or all are wrong"
    assert undefined_reason("eefp", found.metrics, exit=0) == "no sample can gain from a later exit, or every sample can"
    assert undefined_reason("eefp", found.metrics, exit=2) == "there is no later exit"
    assert found.metrics["aurc"] == pytest.approx([0.0 if right else 1.0] * 3)
    assert found.metrics["cov_at_5_risk"] == pytest.approx([1.0 if right else 0.0] * 3)
    assert "-: all predictions are correct, or all are wrong" in to_text(tables(found)[0])


def test_one_class_only():
    """With one class every probability is 1 and every prediction right."""
    test = ExitScores(np.zeros((3, 5, 1), dtype=np.float32), np.zeros(5, dtype=np.int64), np.zeros(5, dtype=np.int64))
    found = study(test, test)
    assert found.metrics["accuracy"] == (1.0, 1.0, 1.0) and found.metrics["ece"] == (0.0, 0.0, 0.0)
    assert found.metrics["nll"] == found.metrics["brier"] == (0.0, 0.0, 0.0)
    assert all(isnan(value) for value in found.metrics["auroc"])


@pytest.mark.parametrize("samples", [1, 2, 7])
def test_fewer_samples_than_bins(samples):
    found = study(sampled(samples, experiences=1), sampled(samples, seed=1))
    gaps = (found.evaluation.confidence_KN - found.evaluation.correct_KN.double()).abs().mean(dim=1)
    # A bin of equal mass has one sample at most.
    assert found.metrics["ece_equal_mass"] == pytest.approx(gaps.tolist(), abs=1e-12)
    assert all(0 <= value <= 1 for value in found.metrics["ece"])


@pytest.mark.parametrize("bad", [nan, pytest.param(np.inf, marks=pytest.mark.slow)])
@pytest.mark.parametrize("all_of_them", [False, True])
def test_scores_that_are_not_finite_are_nan_with_a_reason(bad, all_of_them):
    """An infinite logit makes a probability of inf / inf. The other exits keep their numbers."""
    test, clean = sampled(40), study(sampled(40))
    test.scores_KNC[1, slice(None) if all_of_them else 3, :] = bad
    found = study(test, test)
    for name in (*RANKING_METRICS, "eefp", "nll", "brier"):
        assert isnan(found.metrics[name][1]), name
        assert undefined_reason(name, found.metrics, exit=1) == "confidences are not finite"
    for name in (*RANKING_METRICS, "nll", "brier", "accuracy"):
        for k in (0, 2):
            assert found.metrics[name][k] == clean.metrics[name][k], name
        assert all(isnan(end) for end in found.intervals.get(name, [(), (nan,)])[1]), name
    assert not isnan(found.metrics["eefp"][0])
    if all_of_them:
        assert found.metrics["accuracy"][1] == 0  # NaN scores predict nothing, not class 0
    shown = to_text(tables(found)[0])
    assert "confidences are not finite" in shown and "there is no later exit" in shown
    if np.isnan(bad):  # probabilities are the same for both
        assert all(render_picture(picture).png.startswith(b"\x89PNG") for picture in pictures(found))
    json.dumps(to_json(found, command=["clframe"], versions={}), allow_nan=False)


def test_proxies_of_scores_that_are_not_finite_are_nan():
    validation, test = sampled(40, seed=1), sampled(40)
    test.scores_KNC[:, 3, :] = nan
    (variant,) = variants_of_scores(
        "r", validation, test, cost_K=COST_K, backbone_cost=BACKBONE, calibrations=("none",), measures=("max_probability",)
    )
    assert isnan(variant.metrics["aurc"]) and isnan(variant.metrics["eefp"]) and variant.metrics["accuracy"] > 0
    assert all(0 <= variant.gains[name] <= 1 for name in ("accuracy_50", "area"))


def test_without_validation_data_budgets_are_undefined():
    found = study(sampled(40))
    assert found.validation_samples == 0 and found.points.points is None
    assert found.undecided_samples == (40, 40, 40)  # without a threshold no exit stops a sample
    budgets = next(table for table in tables(found) if table.name == "exit_budgets")
    assert [row[0] for row in budgets.rows] == ["never stops early"]
    assert budgets.note == found.points.undefined == NO_VALIDATION


def test_budgets_below_the_first_exit_and_above_the_last():
    test, validation = sampled(60), sampled(60, seed=1)
    found = study_scores("run", validation, test, exit_names=("a", "b", "c"), cost_K=(60, 70, 80), backbone_cost=100)
    at = {point.name: point for point in found.points.points}
    for name in ("25%", "50%"):
        assert at[name].undefined == "the first exit costs 60.0% of the backbone" and isnan(at[name].accuracy)
    # A budget above the cost of the last exit allows every threshold.
    assert at["100%"].validation_accuracy == at["max"].validation_accuracy and at["100%"].cost <= 0.8
    rows = {row[0]: row for row in next(table for table in tables(found) if table.name == "exit_budgets").rows}
    assert str(rows["25 %"][2]) == "undefined: the first exit costs 60.0% of the backbone"


def test_an_exit_that_no_sample_reaches_has_no_number():
    test = sampled(30)
    found = dataclasses.replace(study(test), undecided={n: (*v[:2], nan) for n, v in study(test).metrics.items()})
    cells = next(table for table in tables(found) if table.name == "exit_metrics_undecided").rows[2][2:]
    assert {cell.undefined for cell in cells} == {"no samples", "there is no later exit"}


@pytest.mark.slow
def test_a_study_that_is_read_from_its_file_has_the_same_tables_and_figures(tmp_path):
    test = sampled(60)
    test.scores_KNC[1, 5, :] = nan
    found = study(test, sampled(40, seed=1))
    file = tmp_path / "exits.json"
    file.write_text(json.dumps(to_json(found, command=["clframe"], versions={})))
    again = read_study(file)
    assert [to_csv(table) for table in tables(again)] == [to_csv(table) for table in tables(found)]
    ours, theirs = ([render_picture(picture).svg for picture in pictures(each)] for each in (found, again))
    assert ours == theirs and len(ours) == 3
    content = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in content.items() if key != "curves"}))
    assert pictures(read_study(file)) == []  # files of older versions have none


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON of a study; run clframe analyze exits again"),
        ("[]", "cannot be read as JSON of a study"),
        ('{"schema_version": 9}', "has schema version 9; this clframe reads 1"),
        ('{"schema_version": 1, "run": "r"}', "exit_names: is missing"),
    ],
)
def test_a_damaged_study_is_one_line(text, message, tmp_path):
    (tmp_path / "exits.json").write_text(text)
    with pytest.raises(RunFolderError, match=message):
        read_study(tmp_path / "exits.json")


def test_curves_by_arithmetic_and_independent_of_the_order_of_ties():
    found = exit_curve(np.array([0.95, 0.5, 0.5, 0.1, nan]), np.array([True, True, False, False, False]))
    assert found.coverage_P == (0.25, 0.75, 1.0) and found.risk_P == pytest.approx((0, 1 / 3, 0.5))
    assert (found.right_M[14], found.right_M[7], found.wrong_M[7], found.wrong_M[1]) == (1, 1, 1, 1)
    assert sum(found.right_M) + sum(found.wrong_M) == 4
    assert found.confidence_M[7] == 0.5 and isnan(found.confidence_M[0])
    assert exit_curve(np.array([0.95, 0.5, 0.5, 0.1]), np.array([True, False, True, False])).risk_P == found.risk_P


def test_tables_have_every_number_and_the_mean_over_exits():
    found = study(sampled(80), sampled(40, seed=1))
    by_name = {table.name: table for table in tables(found)}
    assert list(by_name) == [
        "exit_metrics", "exit_intervals", "exit_metrics_undecided", "exit_budgets", "exit_metrics_by_experience"
    ]
    *exits, mean = by_name["exit_metrics"].rows
    for column, values in enumerate(found.metrics.values(), start=1):
        assert [row[column].value for row in exits] == pytest.approx(values, nan_ok=True)
        assert mean[column].value == pytest.approx(mean_over_exits(values))
    assert mean[-1].value == pytest.approx(sum(found.metrics["eefp"][:2]) / 2)  # EEFP is undefined at the last exit
    rows = by_name["exit_metrics_by_experience"].rows
    assert [row[:2] for row in rows] == [(e, name) for e in "01" for name in "abc"]
    assert rows[4][3].value == found.by_experience["aurc"][1][1]
    for table in by_name.values():
        assert max(map(len, to_text(table).splitlines())) <= 100
        assert all(render(table).strip() for render in (to_csv, to_markdown, to_latex))
