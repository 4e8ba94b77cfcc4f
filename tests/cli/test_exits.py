"""``clframe exits``: thresholds of a finished run solved again, on validation data only."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import clframe
from clframe.exits import ExitEvaluation
from clframe.exits.decisions import evaluate_thresholds
from clframe.exits.study import collect_scores
from clframe.targets.exit_points import ExitPoints, hint, solve_run
from clframe.targets.opening import open_target

OPTIONS = [
    "backbone=small_cnn", "backbone.width=4", "benchmark.experiences=1", "benchmark.validation=0.2",
    "trainer.progress=false", "trainer.loggers=[csv]", "trainer.figures=none", "trainer.epochs=4",
    "strategy=exits(weights=constant) + early_exit(budget=[0.6, 0.3])",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return clframe.run("quickstart", OPTIONS, output=tmp_path_factory.mktemp("runs"))


def test_a_folder_for_the_file_is_created_and_a_file_in_its_place_is_refused(run, call, tmp_path):
    folder = tmp_path / "new" / "points"
    code, out, err = call("exits", str(run.run_folder), "--budget", "0.4", "--output", str(folder))
    (file,) = folder.iterdir()
    assert (code, err) == (0, "") and str(file) in out and json.loads(file.read_text())["points"][0]["goal"] == "budget 40%"
    code, out, err = call("exits", str(run.run_folder), "--budget", "0.4", "--output", str(file))
    assert (code, out) == (2, "") and err == f"clframe: error: --output: {file} is not a folder; choose another\n"


def test_budgets_and_drops_are_kept_on_validation_and_measured_on_test_data(run, call):
    folder = str(run.run_folder)
    code, out, err = call(
        "exits", folder, "--budget", "0.4", "0.7", "--drop", "0.02", "--measure", "entropy", "--solver", "coordinate"
    )
    assert (code, err) == (0, "")
    file = json.loads((folder_file := Path(folder) / "exits" / "operating_points_entropy.json").read_text())
    assert str(folder_file) in out and [point["goal"] for point in file["points"]] == [
        "budget 40%", "budget 70%", "drop 2 points",
    ]  # fmt: skip
    target = open_target(str(folder))
    found = {}
    for split in ("validation", "test"):
        scores = collect_scores(target, split)
        p_KNC = torch.from_numpy(scores.scores_KNC.copy()).softmax(2)
        entropy_KN = -(p_KNC * p_KNC.clamp(min=1e-45).log()).sum(2)
        confidence_KN = (1 - entropy_KN / torch.tensor(10.0).log()).clamp(0, 1)
        correct_KN = p_KNC.argmax(2) == torch.from_numpy(scores.y_N)
        found[split] = ExitEvaluation(confidence_KN=confidence_KN, correct_KN=correct_KN, cost_K=tuple(file["cost_K"]))
    assert (file["validation_samples"], file["samples"]) == (found["validation"].samples, found["test"].samples)
    full = float(found["validation"].correct_KN[-1].double().mean())
    for point in file["points"]:
        thresholds = [float("inf") if t == "Infinity" else t for t in point["thresholds"]]
        held_out, measured = (evaluate_thresholds(found[split], thresholds) for split in ("validation", "test"))
        assert point["accuracy"] == pytest.approx(measured.accuracy, abs=3 / measured.samples)
        assert point["cost"] == pytest.approx(measured.cost, abs=0.01)
        assert point["validation_accuracy"] == pytest.approx(held_out.accuracy, abs=3 / held_out.samples)
        if point["budget"] is not None:
            assert point["validation_cost"] <= point["budget"] + 1e-9
        else:
            assert point["validation_accuracy"] >= full - 0.02 - 1e-9
        assert sum(point["share_K"]) == pytest.approx(1)


@pytest.mark.parametrize("measure", ["gate", "patience"])
def test_measures_that_are_fitted_or_carry_values(run, measure):
    found = solve_run(str(run.run_folder), budgets=[0.7], measure=measure)
    (point,) = found.points
    assert point.validation_cost <= 0.7 and 0 < point.cost <= 1
    assert found.full_accuracy == pytest.approx(run.exits[-1].accuracy_K[-1])


def test_the_hint_where_heads_cost_more_than_they_save(run):
    found = solve_run(str(run.run_folder), budgets=[0.4])
    assert hint(found) == ""
    point = replace(found.points[0], goal="budget 110%", cost=1.053)
    losing = ExitPoints(**{**vars(found), "points": (point,), "cost_K": (0.3, 1.116)})
    assert hint(losing).startswith(
        "hint: budget 110%: a prediction costs 105.3 % of the backbone without exits, since the heads add up to 11.6 %; use"
    )


def test_a_list_of_budgets_gives_an_operating_point_each_and_the_first_predicts(run):
    shares = [point.budget_share for point in run.exits[-1].points.points][:-1]
    assert shares == [0.25, 0.3, 0.5, 0.6, 0.75, 1.0]
    state = clframe.load(run.run_folder).learner.state["early_exit"]
    assert set(state["solutions"]) == {0.6, 0.3} and state["thresholds"] == state["solutions"][0.6]
    assert clframe.load(run.run_folder).budgets.points[1].name == "30%"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--budget", "0.001"], "--budget: found 0.001, but the first exit costs 0."),
        (["--budget", "much"], "--budget: found 'much'; give a share above 0, such as 0.4"),
        (["--drop", "1"], "--drop: found '1'; give a share from 0 to below 1, such as 0.01"),
        ([], "exits: found no goal; give --budget SHARE or --drop SHARE"),
        (["--budget", "1", "--measure", "entropi"], "--measure: unknown confidence measure 'entropi'; did you mean"),
        (["--budget", "1", "--solver", "best"], "--solver: found 'best'; give one of shared, quantiles, coordinate"),
    ],
)
def test_what_is_refused(run, call, arguments, message):
    code, out, err = call("exits", str(run.run_folder), *arguments)
    assert (code, out) == (2, "") and err.startswith(f"clframe: error: {message}") and err.count("\n") == 1


def test_the_tables_of_one_experience_have_nothing_continual(run):
    from clframe.report.terminal import result_text

    text = result_text(run)
    assert "undefined" not in text and "forgetting" not in text
    assert "Accuracy in %" not in text and "\naccuracy  " in text
