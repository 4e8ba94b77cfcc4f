"""Reports of runs whose numbers are known: one run, groups of seeds, and comparisons."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import pytest
from blank_figures import leave_figures_blank
from report_page import Page

from clframe.cli import main
from clframe.report import write_report

DATA = Path(__file__).parent / "data"


def test_one_run(make_run, exits, read_table):
    run = make_run("run", (12, 18), records=[exits(0.5, 0.9), exits(0.25, 0.75, at_half=(0.4, 0.7))])
    path = write_report([run])
    assert path == run / "report" / "report.html"
    scalars = {row["metric"]: row["value"] for row in read_table(path, "summary")}
    assert float(scalars["final average accuracy"]) == (12 / 20 + 18 / 20) / 2
    assert float(scalars["forgetting"]) == pytest.approx(1 - 12 / 20)
    assert float(scalars["average incremental accuracy"]) == (1 + 0.75) / 2
    assert float(scalars["state of er, bytes"]) == 16
    matrix = read_table(path, "accuracy_matrix")
    assert [[float(row[c]) for c in ("on 0", "on 1", "so far")] for row in matrix] == [[1, 0, 1], [0.6, 0.9, 0.75]]
    first, last = read_table(path, "exits")
    assert (first["exit"], float(first["MACs up to it"]), float(first["share of the backbone"])) == ("early", 100, 0.25)
    assert float(first["forgetting"]) == 0.5 - 0.25 and float(last["accuracy"]) == 0.75
    assert float(first["only this exit correct"]) == 0.0 and float(last["only this exit correct"]) == 0.25
    assert float(last["CKA"]) == 1.0
    half, whole = read_table(path, "budgets")
    assert (half["budget"], float(half["realized cost"]), float(half["accuracy"])) == ("50 %", 0.4, 0.7)
    assert float(half["usage of early"]) == 0.75 and float(half["usage of final"]) == 0.25
    assert (whole["budget"], float(whole["realized cost"]), float(whole["accuracy"])) == ("never stops early", 1, 0.75)
    text = Page(path.read_text(encoding="utf-8")).text
    assert "last exit 75.0 %, oracle 100.0 %; overthinking (oracle minus last exit) 25.0 %" in text
    assert [float(row["share"]) for row in read_table(path, "cost")] == [0.75, 0.25, 1.0]
    assert [float(row["share"]) for row in read_table(path, "run_cost")] == [0.25, 0.75, 1.0]
    assert "Not counted in the costs: aten::odd." in Page(path.read_text(encoding="utf-8")).text
    figures = {file.name for file in (path.parent / "figures").iterdir()}
    assert figures == {
        f"{name}.{ending}" for ending in ("png", "svg")
        for name in ("average_accuracy", "accuracy_matrix", "forgetting", "losses", "accuracy_cost", "exit_usage",
                     "exit_accuracy", "exit_decisions", "exit_similarity", "exit_metrics", "cost")
    }  # fmt: skip


def test_calibration_and_failure_prediction_have_a_table_and_a_figure_of_their_own(make_run, exits, read_table, monkeypatch):
    leave_figures_blank(monkeypatch, but=("exit_metrics", "exit_failure_prediction"))

    def record(first, last):
        found = {"ece": (first, last), "aurc": (0.25, last), "auroc": (0.5, math.nan), "nll": (1.5, 2.0), "eefp": (first, math.nan)}
        plain = exits(0.25, 0.75)
        return dataclasses.replace(plain, metrics={**plain.metrics, **found})

    runs = [make_run(f"run{seed}", (12, 18), seed=seed, records=[exits(0.5, 0.9), record(value, 0.5)])
            for seed, value in enumerate((0.125, 0.375))]  # fmt: skip
    path = write_report(runs)
    first, last = read_table(path, "exit_failure_prediction")
    assert (first["exit"], float(first["ECE"]), float(first["EEFP"]), float(first["NLL, nats"])) == ("early", 0.25, 0.25, 1.5)
    assert float(first["ECE: deviation"]) == pytest.approx(0.25 / 2**0.5)
    assert last["EEFP"] == "undefined: there is no later exit"
    assert last["AUROC"] == "undefined: all predictions are correct, or all are wrong"
    assert not {"ECE", "AURC", "EEFP"} & set(read_table(path, "exits")[0])
    text = Page(path.read_text(encoding="utf-8")).text
    assert "Calibration and failure prediction by exit" in text
    assert "Higher is better for AUROC, EEFP, lower for the others." in text
    figures = {file.stem for file in (path.parent / "figures").iterdir()}
    assert {"exit_metrics", "exit_failure_prediction"} <= figures
    older = write_report([make_run("older", (12, 18), records=[exits(0.5, 0.9), exits(0.25, 0.75)])])
    assert not (older.parent / "tables" / "exit_failure_prediction.csv").exists()


def test_the_page_needs_nothing_and_runs_nothing(make_run, exits):
    run = make_run("run", (12, 18), records=[exits(0.5, 0.9), exits(0.25, 0.75, at_half=(0.4, 0.7))])
    text = write_report([run]).read_text(encoding="utf-8")
    page = Page(text)
    assert not {"script", "img", "iframe", "object", "embed"} & set(page.seen)
    assert page.seen.count("svg") == 11
    assert "http" not in text and "@import" not in text and "//" not in text
    assert all(value in ("data:,", None) or value.startswith("#") for name, value in page.attributes if name == "href")
    assert not [name for name, _ in page.attributes if name.startswith("on") or name == "src"]
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(set(ids)) == len(ids)
    for target in re.findall(r"url\(#([^)]+)\)", text):
        assert target in ids
    for message in ("clframe run quickstart strategy=er --seed 0", "prefers-color-scheme: dark", "strategy: er"):
        assert message in text


def test_the_same_runs_give_the_same_page(make_run):
    run = make_run("run", (12, 18))
    once = write_report([run], output=run / "a").read_bytes()
    assert write_report([run], output=run / "b").read_bytes() == once


def test_names_cannot_inject(make_run, read_table):
    """From the config, the results, the environment, the ledger and the log; through the page and through its SVG."""
    evil = '<script>alert("1")</script>$\\frac{_'
    change = {"benchmark": evil, "versions": {"torch": evil}, "strategy": evil}
    run = make_run("run", (12, 18), change={**change, "metrics": {"forgetting": None}, "undefined": {"forgetting": evil}})
    with open(run / "config.yaml", "a") as file:
        file.write(f"# {evil}\n")
    (run / "environment.json").write_text(json.dumps({"command": ["clframe", "run", evil], "git_revision": evil}))
    (run / "ledger.json").write_text(json.dumps({"inference_macs": {evil: 10, "_hidden": 5}}))
    log = run / "metrics.csv"
    log.write_text(log.read_text() + '1,40,"loss/<b onload=x>&/_",0.5\n')
    path = write_report([run])
    page = Page(path.read_text(encoding="utf-8"))
    assert not {"script", "img", "b"} & set(page.seen)
    assert not [key for key, _ in page.attributes if key.startswith("on")]
    assert page.text.count(evil) >= 7
    assert read_table(path, "cost")[0]["stage"] == evil
    assert evil[:23] + "…" in page.words  # the stage's name, shortened, in the figure
    assert " _hidden" in page.words and "<b onload=x>&/_" in page.words


@pytest.mark.usefixtures("without_figures")
def test_seeds_are_one_group(make_run, tmp_path, read_table):
    for seed, right in enumerate((12, 14, 16)):
        make_run(f"runs/{seed}", (right, 18), seed=seed)
    path = write_report([tmp_path / "runs"])
    assert path == tmp_path / "runs" / "report" / "report.html"
    row = next(row for row in read_table(path, "summary") if row["metric"].startswith("final average"))
    assert float(row["value"]) == pytest.approx((0.75 + 0.8 + 0.85) / 3)
    assert float(row["value: deviation"]) == pytest.approx(0.05)
    assert "80.0 ± 5.0" in Page(path.read_text()).text
    assert not (path.parent / "tables" / "differences.csv").exists()


@pytest.mark.usefixtures("without_figures")
def test_groups_are_told_apart_by_what_differs(make_run, tmp_path, read_table):
    make_run("runs/a", (12, 18), overrides=["components.er.memory=50"])
    make_run("runs/b", (12, 18), overrides=["components.er.memory=100", "trainer.log_every=3", "output=elsewhere"])
    make_run("runs/c", (12, 18), strategy="er(memory=50)", seed=1)  # the same as a, written otherwise
    make_run("runs/d", (12, 18), strategy="naive", overrides=["components.er.memory=7"])
    make_run("runs/e", (12, 18), strategy="naive", seed=1)  # a block that is not selected makes no difference
    rows = read_table(write_report([tmp_path / "runs"]), "groups")
    # a, b and c are named "er" by their results
    assert [(row["group"], row["seeds"]) for row in rows] == [
        ("er, er.memory=50", "0, 1"), ("er, er.memory=100", "0"), ("naive", "0, 1"),
    ]  # fmt: skip


@pytest.mark.usefixtures("without_figures")
def test_differences_are_paired_and_costs_are_at_equal_accuracy(make_run, tmp_path, exits, read_table):
    for seed, (base, other) in enumerate([((10, 10), (12, 12)), ((12, 12), (16, 16))]):
        make_run(f"base/{seed}", base, seed=seed, macs=1000)
        late = other[0] / 20
        records = [exits(0.5, 0.9), exits(0.2, late, at_half=(0.5, late - 0.1))]
        make_run(f"other/{seed}", other, seed=seed, strategy="er + exits", records=records, macs=400)
    path = write_report([tmp_path / "base", tmp_path / "other"], output=tmp_path / "out")
    row = read_table(path, "differences")[0]
    assert (row["group"], row["metric"], row["common seeds"]) == ("er + exits", "final average accuracy", "0, 1")
    assert float(row["er"]) == pytest.approx(0.55)
    assert float(row["difference"]) == pytest.approx(0.15)
    # d = 0.1, 0.2: s = 0.1 / sqrt(2), half width t(0.975, 1) s / sqrt(2) = 12.7062 * 0.05
    assert float(row["95 % CI from"]) == pytest.approx(0.15 - 12.7062 * 0.05, rel=1e-5)
    assert float(row["to"]) == pytest.approx(0.15 + 12.7062 * 0.05, rel=1e-5)
    assert (row["excludes 0"], float(row["relative change"])) == ("no", pytest.approx(0.15 / 0.55))
    # points of the other: 200 MACs at 0.6 and 400 MACs at 0.7; 0.55 is reached at the first
    (equal,) = read_table(path, "equal_accuracy")
    assert float(equal["target accuracy"]) == pytest.approx(0.55)
    assert (float(equal["MACs of er"]), float(equal["MACs needed"]), float(equal["share"])) == (1000, 200, 0.2)
    assert (path.parent / "figures" / "pareto.svg").exists()


@pytest.mark.usefixtures("without_figures")
def test_a_table_of_contents_links_every_section(make_run, tmp_path):
    make_run("a", (12, 18))
    make_run("b", (14, 18), strategy="naive")
    page = Page(write_report([tmp_path / "a", tmp_path / "b"]).read_text())
    links = [value for name, value in page.attributes if name == "href" and value.startswith("#section")]
    ids = [f"#{value}" for name, value in page.attributes if name == "id" and value.startswith("section")]
    assert links == ids and len(links) == 1 + 2 * 3


@pytest.mark.parametrize("drawn", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_runs_of_schema_version_1_are_reported(drawn, tmp_path, read_table, monkeypatch):
    if not drawn:
        leave_figures_blank(monkeypatch)
    for run in ("version_1", "version_1_exits"):
        shutil.copytree(DATA / run, tmp_path / run)
    path = write_report([tmp_path / "version_1"], output=tmp_path / "one")
    summary = {row["metric"]: row["value"] for row in read_table(path, "summary")}
    results = json.loads((DATA / "version_1" / "results.json").read_text())
    assert float(summary["final average accuracy"]) == results["final_average_accuracy"]
    assert float(summary["forgetting"]) == results["forgetting"]
    path = write_report([tmp_path / "version_1_exits"], output=tmp_path / "two")
    last = json.loads((DATA / "version_1_exits" / "results.json").read_text())["exits"][-1]
    exits, budgets = read_table(path, "exits"), read_table(path, "budgets")
    assert [float(row["accuracy"]) for row in exits] == last["diagnostics"]["accuracy_K"]
    assert [float(row["only this exit correct"]) for row in exits] == last["diagnostics"]["unique_accuracy_K"]
    assert len(budgets) == 1 + len(last["points"]["points"] or [None])


@pytest.mark.usefixtures("without_figures")
def test_the_command_prints_the_page(make_run, capsys):
    run = make_run("run", (12, 18))
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report' / 'report.html'}\n"
