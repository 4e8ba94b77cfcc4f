"""Reports of runs with one experience: an accuracy, and nothing about forgetting; names as they were written."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from blank_figures import leave_figures_blank

import clframe
from clframe.report.writing import write_report

RUN = [
    "strategy=exits(every=1) + early_exit(threshold=0.6)", "backbone=mlp", "backbone.width=8", "benchmark.experiences=1",
    "trainer.epochs=1", "trainer.progress=false", "trainer.loggers=[csv]", "trainer.figures=none",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    output = tmp_path_factory.mktemp("once")
    return [Path(clframe.run("quickstart", [*RUN, f"seed={seed}"], output=output).run_folder) for seed in range(2)]


def test_the_page_has_neither_matrix_nor_forgetting(runs):
    page = write_report(runs[:1])
    text, tables = page.read_text(), page.parent / "tables"
    for word in ("forgetting", "Forgetting", "transfer", "Accuracy matrix", "undefined: needs two", "task-aware"):
        assert word not in text
    assert not (tables / "accuracy_matrix.csv").exists() and (tables / "exits.csv").exists()
    accuracy = clframe.Result.from_json(runs[0] / "results.json").final_average_accuracy
    assert (tables / "summary.csv").read_text().splitlines()[1] == f"accuracy,{accuracy!r}"
    assert f"{100 * accuracy:.1f}" in text


def test_several_are_compared_by_their_accuracy(runs, tmp_path, monkeypatch):
    leave_figures_blank(monkeypatch, but=("pareto",))  # the others are those of each run, as above
    other = clframe.run("quickstart", [*RUN, "strategy=exits(every=1)"], output=tmp_path).run_folder
    page = write_report([*runs, Path(other)])
    text = page.read_text()
    assert "orgetting" not in text and "final average accuracy" not in text
    assert "final average" not in (page.parent / "tables" / "strategies.csv").read_text()


def test_a_run_records_the_order_in_which_its_strategy_was_written(runs):
    assert yaml.safe_load((runs[0] / "config.yaml").read_text())["strategy"] == "exits + early_exit"
    assert clframe.Result.from_json(runs[0] / "results.json").strategy == "exits + early_exit"
    assert runs[0].name.startswith("exits+early_exit-seed0")
