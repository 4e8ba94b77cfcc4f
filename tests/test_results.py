"""The results object, its file and the means over seeds."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import pickle
import re
import statistics
from pathlib import Path

import pytest
import torch

from clframe.errors import ClframeError, RunFolderError
from clframe.metrics import METRICS, Metric, Tally, all_metrics, registry
from clframe.results import Aggregate, Result, aggregate, summarize
from clframe.sparsity.activity import ActivityRecord

SCHEMA = Path(__file__).parents[1] / "docs" / "results_schema.md"
TOTAL = ((3, 2, 0), (0, 0, 7))
FIRST = Tally(TOTAL, ((3, 1, 0), (0, 0, 0)), ((3, 2, 0), (0, 0, 1)))
SECOND = Tally(TOTAL, ((1, 0, 0), (0, 0, 5)), ((3, 1, 0), (0, 0, 7)))
FACTS = {
    "name": "quickstart", "strategy": "er + lwf", "benchmark": "digits", "backbone": "small_cnn", "seed": 3,
    "class_order": (7, 0, 9), "experiences": ((0, 1), (2,)), "parameters": 1234, "macs": 56789,
    "train_seconds": 1.5, "steps": 40, "state_bytes": {"er": 12800}, "versions": {"torch": "2.6"},
    "run_folder": "runs/quickstart/1",
}  # fmt: skip


def result(*tallies, **facts):
    return summarize(tallies or (FIRST, SECOND), **{**FACTS, **facts})


def test_metrics_and_original_class_ids():
    found = result()
    assert found.schema_version == 2
    assert found.final_average_accuracy == pytest.approx((1 / 5 + 5 / 7) / 2)
    assert found.final_average_accuracy_task_aware == pytest.approx((4 / 5 + 1) / 2)
    assert found.final_weighted_accuracy == pytest.approx(6 / 12)
    assert found.average_incremental_accuracy == pytest.approx((4 / 5 + (1 / 5 + 5 / 7) / 2) / 2)
    assert found.forgetting == pytest.approx(3 / 5)
    assert found.backward_transfer == pytest.approx(-3 / 5)
    assert found.learning_accuracy == pytest.approx((4 / 5 + 5 / 7) / 2)
    assert found.accuracy_matrix == ((4 / 5, 0.0), (1 / 5, 5 / 7))
    assert found.accuracy_matrix_task_aware == ((1.0, 1 / 7), (4 / 5, 1.0))
    assert found.accuracy_by_class == {7: 1 / 3, 0: 0.0, 9: 5 / 7}
    assert found.experiences == ((7, 0), (9,))
    assert found.test_samples == (5, 7)


def test_what_is_undefined_is_nan_with_its_reason():
    found = result()
    assert math.isnan(found.forward_transfer)
    assert found.undefined == {"forward_transfer": "accuracy at random initialization was not evaluated"}
    assert set(result(FIRST).undefined) == {"forgetting", "backward_transfer", "forward_transfer"}


def test_a_baseline_defines_forward_transfer():
    baseline = Tally(TOTAL, ((0, 0, 0), (0, 0, 1)), TOTAL)
    found = result(baseline=baseline)
    assert found.forward_transfer == pytest.approx(0 - 1 / 7)
    assert found.undefined == {}


def test_json_round_trip_with_nan_and_infinity(tmp_path):
    terms = ({"er/replay": 0.25, "lwf/distill": math.inf}, {"er/replay": math.nan, "lwf/distill": -math.inf})
    never = Tally(((3, 2, 0), (0, 0, 0)), ((3, 1, 0), (0, 0, 0)), ((3, 2, 0), (0, 0, 0)))
    written = result(never, never, loss_terms=terms, macs=None)
    written.write(tmp_path / "results.json")
    read = Result.from_json(tmp_path / "results.json")
    assert read.to_json() == written.to_json()
    for field in dataclasses.fields(Result):  # the same types too: repr distinguishes 1 from 1.0, () from []
        assert repr(getattr(read, field.name)) == repr(getattr(written, field.name))
    assert math.isnan(read.accuracy_matrix[0][1])
    assert math.isnan(read.accuracy_by_class[9])
    assert read.loss_terms[0]["lwf/distill"] == math.inf


def test_finite_results_come_back_equal(tmp_path):
    written = result(baseline=FIRST)
    written.write(tmp_path / "results.json")
    assert Result.from_json(tmp_path / "results.json") == written


def test_the_file_is_strict_json_with_the_metrics_on_top():
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads(result(FIRST, loss_terms=({"er/replay": math.nan},)).to_json(), parse_constant=refuse)
    assert next(iter(found)) == "schema_version"
    assert found["metrics"]["final_average_accuracy"] == pytest.approx((4 / 5 + 0) / 2)
    assert found["metrics"]["average_incremental_accuracy"] == pytest.approx(4 / 5)
    assert found["metrics"]["forgetting"] is None
    assert found["loss_terms"] == [{"er/replay": None}]
    assert found["accuracy_by_class"] == {"7": 1.0, "0": 0.5, "9": 0.0}


def test_the_document_names_exactly_the_fields_in_order():
    documented = re.findall(r"^\| `(\w+)` \|", SCHEMA.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert documented == [field.name for field in dataclasses.fields(Result)]


def test_the_document_names_exactly_the_metrics_in_order():
    text = SCHEMA.read_text(encoding="utf-8")
    assert re.findall(r"^\| `metrics\.(\w+)` \|", text, flags=re.MULTILINE) == [
        *registry.OWN_METRICS, *registry.TOKEN_METRICS
    ]  # fmt: skip


def test_metrics_are_attributes():
    found = result(baseline=FIRST)
    assert {name: getattr(found, name) for name in found.metrics} == found.metrics
    with pytest.raises(AttributeError, match=r"^Result has no field or metric 'forgeting'; did you mean 'forgetting'\?$"):
        _ = found.forgeting


def test_a_result_survives_copying_and_pickling():
    found = result(baseline=FIRST)
    assert copy.deepcopy(found) == pickle.loads(pickle.dumps(found)) == found


def test_a_metric_that_a_run_has_not_computed_is_undefined_with_its_reason():
    assert result().score("newer").undefined.startswith("not in results.json, ")


def test_one_entry_in_the_registry_reaches_results_and_aggregates(monkeypatch):
    worst = Metric(label="accuracy on the worst experience", score=lambda found: min(found.accuracy_TE[-1]))
    monkeypatch.setitem(METRICS._entries, "worst_experience", worst)
    assert result().worst_experience == 1 / 5
    assert json.loads(result().to_json())["metrics"]["worst_experience"] == 1 / 5
    assert aggregate([result()]).mean["worst_experience"] == 1 / 5


def test_a_metric_that_fails_loses_no_other_number(monkeypatch):
    monkeypatch.setitem(METRICS._entries, "broken", Metric(label="broken", score=lambda found: 1 / 0))
    found = result()
    assert math.isnan(found.broken)
    assert found.undefined["broken"] == "ZeroDivisionError: division by zero"
    assert found.forgetting == pytest.approx(3 / 5)


def test_class_orders_that_do_not_fit_are_refused():
    for order in ((7, 0), (7, 0, 7), (7, 0, 9, 1)):
        with pytest.raises(ClframeError, match=r"^class_order: .* for 3 classes; name each class once$"):
            result(class_order=order)


def test_numbers_of_arrays_are_written_as_numbers():
    found = result(class_order=torch.tensor([7, 0, 9]), experiences=torch.tensor([[0], [2]]))
    assert json.loads(found.to_json())["experiences"] == [[7], [9]]
    assert found.accuracy_by_class == result().accuracy_by_class


def damaged(change):
    found = json.loads(result().to_json())
    change(found)
    return json.dumps(found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON; give the results.json of a finished run"),
        ("[]", "schema_version None, this clframe reads 1 to 2; "),
        ("{}", "schema_version None, this clframe reads 1 to 2; "),
        (damaged(lambda f: f.update(schema_version=3)), "schema_version 3, this clframe reads 1 to 2; "),
        (damaged(lambda f: f.pop("seed")), "seed: is missing; "),
        (damaged(lambda f: f.update(seed="3")), 'seed: found "3"; '),
        (damaged(lambda f: f.update(seed=None)), "seed: found null; "),
        (damaged(lambda f: f.update(seed=True)), "seed: found true; "),
        (damaged(lambda f: f["metrics"].update(forgetting="much")), 'metrics: found "much"; '),
        (damaged(lambda f: f["metrics"].update(forgetting=[])), "metrics: found []; "),
        (damaged(lambda f: f.update(accuracy_matrix=[0.5])), "accuracy_matrix: found 0.5; "),
        (damaged(lambda f: f.update(accuracy_by_class={"a": 1})), "accuracy_by_class: found the key 'a'"),
        (damaged(lambda f: f.update(state_bytes=[1])), "state_bytes: found [1]; "),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(RunFolderError) as caught:
        Result.from_json(path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


def test_a_missing_or_binary_file_is_refused(tmp_path):
    with pytest.raises(RunFolderError, match="No such file"):
        Result.from_json(tmp_path / "results.json")
    (tmp_path / "results.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RunFolderError, match="not JSON"):
        Result.from_json(tmp_path / "results.json")


def test_fields_of_a_later_clframe_are_ignored_and_optional_ones_may_be_absent(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(damaged(lambda f: (f.update(new_field=1), f.pop("loss_terms"))))
    assert Result.from_json(path).loss_terms == ()


def test_records_of_a_later_or_an_earlier_clframe_are_read(tmp_path):
    path = tmp_path / "results.json"
    record = {"samples_E": [4], "layers": {"a": {"neurons": 8, "sparsity": 0.5, "newer": 1}}, "newer": []}
    path.write_text(damaged(lambda f: f.update(activity=[record, {}])))
    first, second = Result.from_json(path).activity
    assert first.layers["a"].sparsity == 0.5
    assert first.layers["a"].kept_E == ()
    assert second == ActivityRecord()


VERSION_1 = sorted((Path(__file__).parent / "report" / "data").glob("version_1*/results.json"))


@pytest.mark.parametrize("path", VERSION_1, ids=[path.parent.name for path in VERSION_1])
def test_a_file_of_version_1_is_read(path, tmp_path):
    written, found = json.loads(path.read_text()), Result.from_json(path)
    assert (written["schema_version"], found.schema_version) == (1, 2)
    for name in ("final_average_accuracy", "forgetting", "forward_transfer", "learning_accuracy"):
        assert getattr(found, name) == written[name]
    assert len(found.exits) == len(found.accuracy_matrix) == len(written["accuracy_matrix"])
    for record, old in zip(found.exits, written["exits"], strict=True):
        assert list(record.accuracy_K) == old["diagnostics"]["accuracy_K"]
        assert list(record.metrics["unique_accuracy"]) == old["diagnostics"]["unique_accuracy_K"]
        assert record.overthinking == pytest.approx(old["diagnostics"]["overthinking"])
        assert [p.budget_share for p in record.points.points or ()][:3] in ([], [0.25, 0.5, 0.75])
    found.write(tmp_path / "results.json")
    assert str(Result.from_json(tmp_path / "results.json")) == str(found)  # NaN differs from itself


def test_writing_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    result().write(path)
    assert os.listdir(tmp_path) == ["results.json"]
    assert path.read_text(encoding="utf-8") == result().to_json()


def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    path.write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunFolderError, match=r"results.json: cannot be written \(No space left on device\)"):
        result().write(path)
    assert os.listdir(tmp_path) == ["results.json"]
    assert path.read_text() == "old"


def test_the_data_is_synced_before_the_rename(tmp_path, monkeypatch):
    order = []
    sync, rename = os.fsync, os.replace

    def fsync(descriptor):
        order.append(("fsync", os.fstat(descriptor).st_size))
        sync(descriptor)

    def replace(source, target):
        order.append(("replace", Path(source).parent == tmp_path))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    result().write(tmp_path / "results.json")
    assert order[:2] == [("fsync", len(result().to_json().encode())), ("replace", True)]


def test_a_missing_folder_is_one_line(tmp_path):
    with pytest.raises(RunFolderError, match=r"cannot be written \(No such file or directory\)"):
        result().write(tmp_path / "none" / "results.json")


def seeded(values):
    base = result()
    return [
        dataclasses.replace(base, seed=s, metrics={**base.metrics, "forgetting": value})
        for s, value in enumerate(values)
    ]


def test_aggregate_is_mean_and_sample_deviation():
    found = aggregate(seeded([0.25, 0.5, 0.125]))
    mean = (0.25 + 0.5 + 0.125) / 3
    deviation = math.sqrt(sum((x - mean) ** 2 for x in (0.25, 0.5, 0.125)) / 2)
    assert found.seeds == (0, 1, 2)
    assert found.mean["forgetting"] == pytest.approx(mean, abs=1e-15)
    assert found.deviation["forgetting"] == pytest.approx(deviation, abs=1e-15)
    assert found.deviation["forgetting"] != pytest.approx(statistics.pstdev((0.25, 0.5, 0.125)), abs=1e-3)
    assert found.deviation["final_average_accuracy"] == 0.0
    names = [name for name, metric in all_metrics().items() if not metric.per_token]
    assert list(found.mean) == list(found.deviation) == names


def test_aggregate_of_one_seed_has_no_deviation():
    found = aggregate(seeded([0.25]))
    assert found.mean["forgetting"] == 0.25
    assert math.isnan(found.deviation["forgetting"])
    assert json.loads(found.to_json())["deviation"]["forgetting"] is None


def test_aggregate_skips_no_seed():
    found = aggregate(seeded([0.25, math.nan, 0.5]))
    assert math.isnan(found.mean["forgetting"])
    assert math.isnan(found.deviation["forgetting"])


def test_aggregate_json_has_every_field():
    found = json.loads(aggregate(seeded([0.25, 0.5])).to_json())
    assert list(found) == [field.name for field in dataclasses.fields(Aggregate)]
    assert found["seeds"] == [0, 1]
    assert found["mean"]["forgetting"] == 0.375


def test_aggregates_that_make_no_sense_are_refused():
    first, second = seeded([0.25, 0.5])
    with pytest.raises(ClframeError, match=r"^aggregate: no results; "):
        aggregate([])
    with pytest.raises(ClframeError, match=r"^aggregate: a seed is there twice in \[0, 0\]; "):
        aggregate([first, first])
    with pytest.raises(ClframeError, match=r"^aggregate: .* more than one strategy, er \+ lwf, naive; "):
        aggregate([first, dataclasses.replace(second, strategy="naive")])
