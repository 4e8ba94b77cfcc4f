"""Diagnostics against loops written out, and what they are by definition on small cases."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

import clframe
from clframe.errors import ClframeError
from clframe.exits import ExitEvaluation
from clframe.exits.decisions import evaluate_thresholds
from clframe.exits.diagnostics import (
    EXIT_METRICS,
    ExitMetric,
    ExitRecord,
    accuracy_K,
    compute_exit_metrics,
    forgetting_by_exit,
    make_exit_record,
    static_accuracies,
)
from clframe.metrics import forgetting

# one column a sample: all right, only the first, first two, only the last, none, all but the first, middle alone
RIGHT = torch.tensor([[1, 1, 1, 0, 0, 0, 0],
                      [1, 0, 1, 0, 0, 1, 1],
                      [1, 0, 0, 1, 0, 1, 0]]).bool()  # fmt: skip


def answers(correct_KN, *, confidence_KN=None, **more):
    exits = len(correct_KN)
    confidence_KN = torch.rand(correct_KN.shape) if confidence_KN is None else confidence_KN
    return ExitEvaluation(confidence_KN=confidence_KN, correct_KN=correct_KN, cost_K=range(1, exits + 1), **more)


def record_of(evaluation):
    return make_exit_record(
        evaluation, None, backbone_macs=10, accuracy_KE=(), correct={}, similarity_K=(1.0,) * evaluation.exits
    )


def random_evaluation(exits, samples, seed):
    generator = torch.Generator().manual_seed(seed)
    return answers(torch.rand(exits, samples, generator=generator) < 0.6)


def test_seven_samples_by_hand():
    found = compute_exit_metrics(answers(RIGHT))
    assert found["accuracy"] == (3 / 7, 4 / 7, 3 / 7)
    record = record_of(answers(RIGHT))
    assert record.oracle_accuracy == 6 / 7
    assert record.overthinking == pytest.approx(3 / 7)
    assert record.overthinking_relative == pytest.approx(1.0)
    assert found["unique_accuracy"] == (1 / 7, 1 / 7, 1 / 7)
    assert found["fixed_final_errors"] == (2 / 4, 2 / 4, 0.0)
    assert math.isnan(found["hindsight_improvability"][0])
    # exit 1 is wrong on samples 1, 3, 4: the first exit had 1; exit 2 on 1, 2, 4, 6: all but 4 were known
    assert found["hindsight_improvability"][1:] == (1 / 3, 3 / 4)


def test_points_and_curve_have_the_fallback_of_the_policy():
    """Two samples, no exit sure: the last exit is right on the first alone, the most confident on both."""
    given = answers(
        torch.tensor([[False, True], [True, False]]), confidence_KN=torch.tensor([[0.1, 0.8], [0.9, 0.7]])
    )  # fmt: skip
    for fallback, expected in (("last", 0.5), ("confident", 1.0)):
        record = make_exit_record(
            given, given, backbone_macs=2, accuracy_KE=(), correct={}, similarity_K=(1.0, 1.0), fallback=fallback
        )
        assert record.curve.accuracies[-1] == expected and record.curve.costs[-1] == 1.0
        never = evaluate_thresholds(given, [0.85], fallback=fallback)
        assert (never.accuracy, never.cost) == (expected, 2.0)


def test_a_run_records_the_fallback_of_its_policy(tmp_path):
    found = {}
    for fallback in ("last", "confident"):
        result = clframe.run(
            "quickstart",
            [f"strategy=er(memory=20) + exits(at=['block1', 'block2']) + early_exit(threshold=0.99, fallback={fallback})",
             "benchmark.validation=0.2", "trainer.epochs=1", "trainer.progress=false",
             "trainer.loggers=[]", "trainer.figures=none"],
            output=tmp_path / fallback,
        )  # fmt: skip
        record = json.loads((Path(result.run_folder) / "results.json").read_text())["exits"][-1]
        found[fallback] = record["curve"]["accuracies"][-1], record["static"]["confident"], record["static"]["last"]
    assert found["last"][0] == found["last"][2] and found["confident"][0] == found["confident"][1]
    assert found["last"][1:] == found["confident"][1:] and found["last"][1] != found["last"][2]


@pytest.mark.parametrize(("exits", "samples"), [(1, 1), (1, 9), (2, 1), (3, 17), (7, 301)])
def test_against_loops_over_samples(exits, samples):
    given = random_evaluation(exits, samples, seed=exits * samples)
    found, right = compute_exit_metrics(given), given.correct_KN.tolist()
    columns = [[right[k][n] for k in range(exits)] for n in range(samples)]
    assert record_of(given).oracle_accuracy == sum(any(column) for column in columns) / samples
    assert record_of(given).accuracy_K == found["accuracy"]
    for k in range(exits):
        assert found["accuracy"][k] == sum(column[k] for column in columns) / samples
        alone = [column for column in columns if column[k] and sum(column) == 1]
        assert found["unique_accuracy"][k] == len(alone) / samples
        wrong = [column for column in columns if not column[k]]
        if k and wrong:
            assert found["hindsight_improvability"][k] == sum(any(column[:k]) for column in wrong) / len(wrong)
        else:
            assert math.isnan(found["hindsight_improvability"][k])
        missed = [column for column in columns if not column[-1]]
        if missed:
            assert found["fixed_final_errors"][k] == sum(column[k] for column in missed) / len(missed)
        else:
            assert math.isnan(found["fixed_final_errors"][k])


def test_what_is_undefined_is_nan():
    perfect = compute_exit_metrics(answers(torch.ones(2, 3).bool()))
    assert all(math.isnan(share) for share in perfect["fixed_final_errors"] + perfect["hindsight_improvability"])
    flawless = record_of(answers(torch.ones(2, 3).bool()))
    assert (flawless.overthinking, flawless.overthinking_relative) == (0.0, 0.0)
    hopeless = record_of(answers(torch.tensor([[True], [False]])))
    assert hopeless.overthinking == 1.0
    assert math.isnan(hopeless.overthinking_relative)


def test_one_exit_never_overthinks():
    found = compute_exit_metrics(answers(torch.tensor([[True, False, True]])))
    assert record_of(answers(torch.tensor([[True, False, True]]))).overthinking == 0.0
    assert found["unique_accuracy"] == found["accuracy"] == (2 / 3,)


def test_one_entry_in_the_registry_reaches_the_record_and_an_older_record_is_read(monkeypatch):
    entry = ExitMetric(label="errors", values=lambda e: [int((~right_N).sum()) for right_N in e.correct_KN])
    monkeypatch.setitem(EXIT_METRICS._entries, "errors", entry)
    content = dataclasses.asdict(record_of(answers(RIGHT)))
    assert content["metrics"]["errors"] == (4.0, 3.0, 4.0)
    metrics = content.pop("metrics")
    older = {**content, "diagnostics": {"accuracy_K": metrics["accuracy"], "oracle_accuracy": 6 / 7}}
    assert ExitRecord.of(older).accuracy_K == metrics["accuracy"]


@pytest.mark.parametrize(
    "values, problem",
    [(lambda found: [0.5], "returned 1 values for 3 exits"), (lambda found: 1 / 0, "raised ZeroDivisionError"),
     (lambda found: 0.5, "raised TypeError")],
)  # fmt: skip
def test_a_metric_of_another_package_that_fails_is_undefined_at_every_exit(values, problem, monkeypatch, caplog):
    monkeypatch.setattr(EXIT_METRICS, "_entries", {**EXIT_METRICS._entries, "own": ExitMetric(label="x", values=values)})
    found = compute_exit_metrics(
        ExitEvaluation(confidence_KN=torch.rand(3, 4), cost_K=(1, 2, 3), correct_KN=torch.ones(3, 4))
    )
    assert len(found["own"]) == 3 and all(map(math.isnan, found["own"])) and found["accuracy"] == (1.0, 1.0, 1.0)
    assert f"exit metric 'own': {problem}" in caplog.text


def test_static_decisions():
    confidence_KN = torch.tensor([[0.9, 0.2, 0.5], [0.1, 0.3, 0.5]])
    correct_KN = torch.tensor([[1, 0, 1], [0, 1, 0]]).bool()
    given = answers(correct_KN, confidence_KN=confidence_KN)
    vote_N = torch.tensor([True, False, False])
    assert static_accuracies(given, correct={"vote": vote_N}) == {
        "last": 1 / 3, "confident": 1.0, "oracle": 1.0, "vote": 1 / 3,
    }  # fmt: skip
    with pytest.raises(ClframeError, match=r"correct\.mean: found shape \(2,\); give one flag for each of 3 samples"):
        static_accuracies(given, correct={"mean": vote_N[:2]})


def test_the_earliest_of_equally_confident_exits():
    given = answers(torch.ones(4, 3).bool(), confidence_KN=torch.tensor([[1, 2, 0], [1, 3, 0], [1, 3, 0], [0, 3, 0]]))
    assert given.most_confident_N().tolist() == [0, 1, 0]


def test_by_experience():
    given = answers(RIGHT, experience_N=torch.tensor([0, 0, 2, 2, 2, 0, 0]))
    assert accuracy_K(given.of(0)) == (2 / 4, 3 / 4, 2 / 4)
    assert accuracy_K(given.of(2)) == (1 / 3, 1 / 3, 1 / 3)
    with pytest.raises(ClframeError, match=r"confidence_KN \(3, 0\)"):
        given.of(1)
    with pytest.raises(ClframeError, match="found no experience_N"):
        answers(RIGHT).of(0)


def test_forgetting_of_each_exit_is_that_of_its_matrix():
    accuracy_KTE = [[[0.5, 0.0, 0.0], [0.75, 0.5, 0.0], [0.25, 0.5, 1.0]], [[1.0, 0, 0], [0.5, 1.0, 0], [0, 0, 1.0]]]
    found = forgetting_by_exit(accuracy_KTE)
    assert [score.value for score in found] == [0.25, 1.0]
    assert found == tuple(forgetting(accuracy_TE) for accuracy_TE in accuracy_KTE)
    assert forgetting_by_exit([[[0.5]]])[0].undefined == "needs two experiences, found one"


@pytest.mark.parametrize(("change", "message"), [
    ({"cost_K": (1, 2)}, "2 costs for 3 exits"),
    ({"cost_K": (3, 2, 4)}, "which rise with depth"),
    ({"cost_K": (0, 2, 4)}, "which rise with depth"),
    ({"cost_K": (1, 2, math.nan)}, "which rise with depth"),
    ({"cost_K": (1, 2, math.inf)}, "which rise with depth"),
    ({"correct_KN": RIGHT[:, :3]}, r"confidence_KN \(3, 7\), correct_KN \(3, 3\)"),
    ({"correct_KN": RIGHT[0], "confidence_KN": torch.rand(7)}, "for every exit and sample"),
    ({"experience_N": torch.zeros(3)}, "each of 7 samples"),
])  # fmt: skip
def test_arrays_that_do_not_fit(change, message):
    fitting = {"confidence_KN": torch.rand(3, 7), "correct_KN": RIGHT, "cost_K": (1, 2, 3)}
    with pytest.raises(ClframeError, match=message):
        ExitEvaluation(**(fitting | change))
