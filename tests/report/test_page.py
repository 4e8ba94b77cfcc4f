"""Every number on TensorBoard's first page is one of results.json, ledger.json or metrics.csv, or follows from them."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import clframe
from clframe.exits.diagnostics import all_exit_metrics
from clframe.metrics import all_metrics
from clframe.results import Result

RUN = ["strategy=er(memory=40) + exits + early_exit(threshold=0.6) + sparsity", "backbone=mlp", "backbone.width=18",
       "trainer.epochs=2", "trainer.progress=false", "trainer.log_every=3", "benchmark.experiences=3",
       "benchmark.validation=0.2"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Path(clframe.run("quickstart", RUN, output=tmp_path_factory.mktemp("page")).run_folder)


@pytest.fixture(scope="module")
def result(folder):
    return Result.from_json(folder / "results.json")


@pytest.fixture(scope="module")
def page(folder):
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def close(values):
    """Event files hold float32."""
    return pytest.approx(values, rel=1e-6, abs=1e-7)


def test_accuracy_and_forgetting(page, result):
    matrix = result.accuracy_matrix
    seen = {i: sum(matrix[i][: i + 1]) / (i + 1) for i in range(3)}
    assert page["1_progress/accuracy"] == close(seen)
    lost = {
        i: sum(max(matrix[k][j] for k in range(j, i)) - matrix[i][j] for j in range(i)) / i for i in (1, 2)
    }
    assert page["1_progress/forgetting"] == close(lost)
    assert page["1_progress/accuracy"][2] == close(result.final_average_accuracy)
    assert page["1_progress/forgetting"][2] == close(result.forgetting)
    for j in range(3):
        assert page[f"experience_accuracy/0{j}"] == close({i: matrix[i][j] for i in range(j, 3)})


def test_cost_and_exits_come_from_the_ledger(page, folder, result):
    stops = defaultdict(list)
    costs = json.loads((folder / "ledger.json").read_text())
    assert sum(costs["inference_macs"].values()) == result.macs
    assert list(costs["exit_macs"].items()) == list(zip(result.exit_names, result.exits[-1].macs_K, strict=True))
    for stop in costs["ledger"]["predictions"]["stops"]:
        stops[stop["experience"]].append(stop)
    for i, rows in stops.items():
        samples = sum(row["samples"] for row in rows)
        assert samples == sum(result.test_samples[: i + 1])
        assert page["1_progress/macs_per_prediction"][i] == close(sum(row["macs"] * row["samples"] for row in rows) / samples)
        for k, name in enumerate(result.exit_names):
            share = sum(row["samples"] for row in rows if row["exit"] == name) / samples
            assert page[f"exits_used/0{k}_{name}"][i] == close(share)
    assert sorted(stops) == [0, 1, 2]
    assert 0 < page["exits_used/00_layer1"][2] < 1
    assert page["final/macs_per_prediction"] == {2: page["1_progress/macs_per_prediction"][2]}


def test_neurons(page, result):
    assert len(result.activity) == 3
    for i, record in enumerate(result.activity):
        layers = list(record.layers.values())
        assert len(layers) == 2
        assert page["1_progress/sparsity"][i] == close(sum(layer.sparsity for layer in layers) / 2)
        for n, (name, layer) in enumerate(record.layers.items()):
            assert page[f"sparsity/0{n}_{name}"][i] == close(layer.sparsity)
            if i:
                assert page[f"neurons_kept/0{n}_{name}"][i] == close(sum(layer.kept_E[:i]) / i)
                assert page[f"neurons_shared/0{n}_{name}"][i] == close(sum(layer.overlap_E[:i]) / i)
    assert page["final/sparsity"] == {2: page["1_progress/sparsity"][2]}


def test_losses_are_those_of_metrics_csv_and_add_up(page, folder, result):
    rows = defaultdict(dict)
    with open(folder / "metrics.csv", newline="") as file:
        for row in csv.DictReader(file):
            rows[row["name"]][int(row["step"])] = float(row["value"])
    terms = [name for name in rows if name.startswith("loss/")]
    assert sorted(terms) == ["loss/sparsity/penalty", "loss/task/ce"]
    for name in rows:
        assert page[name] == close(rows[name])
    total = {step: sum(rows[name].get(step, 0.0) for name in terms) for step in rows["loss/task/ce"]}
    assert page["1_progress/loss"] == close(total)
    assert set(page["1_progress/samples_per_second"]) == set(total)
    assert all(value > 0 and math.isfinite(value) for value in page["1_progress/samples_per_second"].values())
    assert max(total) == result.steps


def test_every_metric_is_on_tensorboard_under_its_tag(page, result):
    last = len(result.accuracy_matrix) - 1
    for name, metric in all_metrics().items():
        if metric.per_token:
            assert name not in result.metrics
            continue
        drawn = page.get(metric.tag or f"continual/{name}", {})
        assert math.isnan(result.metrics[name]) == (last not in drawn), name
        if last in drawn:
            assert drawn[last] == close(result.metrics[name]), name
    for name in all_exit_metrics():
        for k, exit in enumerate(result.exit_names):
            values = {i: record.metrics[name][k] for i, record in enumerate(result.exits)}
            found = page.get(f"exit_{name}/0{k}_{exit}", {})
            assert found == close({i: value for i, value in values.items() if not math.isnan(value)}), name


def test_a_failure_to_draw_loses_neither_the_run_nor_its_results(tmp_path, monkeypatch, caplog):
    def broken(*args, **options):
        raise MemoryError("no room for pixels")

    monkeypatch.setattr("clframe.training.tensorboard_pages.draw_pictures", broken)
    monkeypatch.setattr("clframe.execution.write_figures", broken)
    quick = ["backbone=mlp", "backbone.width=6", "strategy=naive", "trainer.epochs=1", "trainer.progress=false",
             "benchmark.experiences=2"]  # fmt: skip
    result = clframe.run("quickstart", quick, output=tmp_path)
    assert str(Result.from_json(f"{result.run_folder}/results.json")) == str(result)
    assert len(result.accuracy_matrix) == 2
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("clframe")]
    assert [line.split(": ", 1)[1].split(" (")[0] for line in lines] == [
        "experience 1 could not be drawn", "figures could not be drawn",
    ]
    assert all("MemoryError: no room for pixels" in line for line in lines)
