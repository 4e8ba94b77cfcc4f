"""``clframe analyze``: the tables it prints, the files it writes, the lines it refuses with."""

from __future__ import annotations

import csv
import json
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from blank_figures import leave_figures_blank
from earlier_versions import remove_digests

from clframe import run
from clframe.cli import main
from clframe.exits import ExitEvaluation
from clframe.exits.calibration_error import brier_N, nll_N
from clframe.exits.diagnostics import compute_exit_metrics
from clframe.exits.smooth_calibration import smooth_ece
from clframe.progress import progress_bars
from clframe.sparsity.study import study_sparsity
from clframe.targets import exit_studies, open_target


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    words = ["benchmark.experiences=2", "backbone=mlp", "backbone.width=6", "strategy=naive", "trainer.epochs=1",
             "trainer.progress=false", "trainer.loggers=[]"]
    return run("quickstart", words, output=tmp_path_factory.mktemp("runs")).run_folder


@pytest.fixture(scope="module")
def with_exits(tmp_path_factory):
    """A run with exits and validation data, whose first exit costs less than 75 % of the backbone."""
    words = ["benchmark.experiences=2", "benchmark.validation=0.1", "backbone=mlp", "backbone.width=40",
             "strategy=er(memory=30) + exits", "trainer.epochs=1", "trainer.progress=false", "trainer.loggers=[]"]
    return run("quickstart", words, output=tmp_path_factory.mktemp("runs")).run_folder


def test_the_table_and_the_file_say_what_python_says(folder, capsys, tmp_path):
    out = tmp_path / "out"
    assert main(["analyze", "sparsity", folder, "--rule", "top_k,threshold", "--limit", "40", "--output", str(out)]) == 0
    printed = capsys.readouterr().out
    study = study_sparsity(open_target(folder), rules=["top_k", "threshold"], limit=40)
    content = json.loads((out / "sparsity.json").read_text())
    assert content["command"] == ["clframe", "analyze", "sparsity", folder, "--rule", "top_k,threshold", "--limit", "40"]
    assert [curve["critical"] for curve in content["curves"]] == [curve.critical for curve in study.report.curves]
    assert (content["part"], content["samples"], content["score"]) == ("test", 40, "accuracy")
    assert f"{100 * study.report.dense:.2f} % on 40 test samples" in printed
    for curve in study.report.curves:
        row = next(line.split() for line in printed.splitlines() if line.startswith(curve.kind))
        assert row[1] == "intermediate" and row[3:] == [
            f"{100 * curve.critical:.1f}", f"{100 * curve.critical_gaussian:.1f}", f"{round(100 * curve.excess, 1) + 0.0:+.1f}"
        ]
    assert "Active neurons by experience" in printed and str(out / "sparsity.json") in printed


def test_the_power_of_top_p_is_that_of_python(folder, capsys, tmp_path):
    assert main(["analyze", "sparsity", folder, "--power", "2", "--limit", "40", "--output", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    content = json.loads((tmp_path / "out" / "sparsity.json").read_text())
    squares, plain = (study_sparsity(open_target(folder), power=power, limit=40) for power in (2.0, 1.0))
    assert content["command"][-4:] == ["--power", "2", "--limit", "40"]
    (curve,), (found,) = content["curves"], squares.report.curves
    assert curve["achieved"] == list(found.achieved) and curve["critical_gaussian"] == found.critical_gaussian
    assert found.achieved[1] > plain.report.curves[0].achieved[1]
    assert squares.union.value == found.critical_value


def test_a_run_keeps_its_study(folder, capsys):
    assert main(["analyze", "sparsity", folder, "--limit", "9", "--score", "agreement"]) == 0
    path = open_target(folder).folder / "sparsity" / "sparsity.json"
    content = json.loads(path.read_text())
    assert content["dense"] == 1 and content["score"] == "agreement" and content["curves"][0]["scores"][0] == 1
    assert capsys.readouterr().err == ""  # no bar where nobody looks


@pytest.mark.parametrize(
    "words, said",
    [
        ([], "analyze: found nothing to analyze"),
        (["sparsty", "x"], "unknown analysis 'sparsty'; did you mean 'sparsity'"),
        (["sparsity"], "analyze: found no target"),
        (["sparsity", "no/such/folder"], "no/such/folder: no such folder"),
        (["sparsity", "RUN", "--limit", "0"], "--limit: found '0'; give a whole number of at least 1"),
        (["sparsity", "RUN", "--share", "a"], "--share: found 'a'"),
        (["sparsity", "RUN", "--power", "a"], "--power: found 'a'; give a number"),
        (["sparsity", "RUN", "--power", "0"], "--power: found 0.0; give a number above 0"),
        (["sparsity", "RUN", "--power", "2", "--rule", "max_p"], "--power: found 2.0 for max_p; use it with top_p"),
        (["sparsity", "RUN", "--rule", ""], "--rule: found none"),
        (["sparsity", "RUN", "--rule", "topp"], "--rule: unknown rule 'topp'; did you mean 'top_p'"),
        (["sparsity", "RUN", "--score", "f1"], "--score: unknown score 'f1'"),
        (["sparsity", "RUN", "--roles", "gate"], "--roles: found gate, which"),
        (["sparsity", "RUN", "--device", "tpu9"], "--device: found tpu9"),
        (["sparsity", "RUN", "--data", "digits"], "--data: found digits for a run"),
        (["sparsity", "RUN", "--limits", "3"], "unknown option '--limits'; did you mean '--limit'"),
    ],
)
def test_one_line_for_what_is_wrong(folder, here, capsys, words, said):
    code = main(["analyze", *(folder if word == "RUN" else word for word in words), *(["--output", "out"] if "RUN" in words else [])])
    error = capsys.readouterr().err
    assert code == 2 and said in error and error.startswith("clframe: error: ") and error.count("\n") == 1
    assert not list(here.iterdir())


def test_a_slip_in_a_path_is_no_name_on_a_hub(here, capsys):
    (here / "runs").mkdir()
    assert main(["analyze", "sparsity", "runs/slip"]) == 2
    assert "runs/slip: no such folder" in capsys.readouterr().err


def test_the_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress_bars(unit="pass") as show:
        show("sweep", 1, 4)
        time.sleep(0.15)  # tqdm redraws at most every 0.1 s
        show("sweep", 4, 4)
    error = capsys.readouterr().err
    assert "sweep" in error and "4/4" in error and error.endswith("\r")  # the line is cleared at the end


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["analyze", "--help"])
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("Gaussian", "top_p", "intermediate", "--data clinc150", "docs/analysis.md"))
    assert torch.is_grad_enabled()


def test_exits_prints_and_writes_the_metrics_of_the_scores(with_exits, capsys, tmp_path):
    out = tmp_path / "out"
    assert main(["analyze", "exits", with_exits, "--output", str(out)]) == 0
    printed, error = capsys.readouterr()
    assert error == "" and str(out / "exits.json") in printed
    content = json.loads((out / "exits.json").read_text())
    assert content["command"] == ["clframe", "analyze", "exits", with_exits]
    cache = Path(with_exits) / "exits" / "cache"
    scores = [torch.from_numpy(scores_NC) for scores_NC in np.load(cache / "test_scores.npy")]
    y_N = torch.from_numpy(np.load(cache / "test_y.npy"))
    expected = compute_exit_metrics(ExitEvaluation(
        confidence_KN=torch.stack([scores_NC.double().softmax(1).amax(1) for scores_NC in scores]),
        correct_KN=torch.stack([scores_NC.argmax(1) == y_N for scores_NC in scores]), cost_K=(1, 2),
        nll_KN=torch.stack([nll_N(scores_NC, y_N) for scores_NC in scores]),
        brier_KN=torch.stack([brier_N(scores_NC, y_N) for scores_NC in scores]),
    ))
    expected["smooth_ece"] = tuple(
        smooth_ece(scores_NC.double().softmax(1).amax(1), scores_NC.argmax(1) == y_N) for scores_NC in scores
    )
    with open(out / "exit_metrics.csv", newline="") as file:
        headings, *rows = list(csv.reader(file))
    assert [row[0] for row in rows] == ["layer1", "final", "mean"]
    for column, (name, values) in enumerate(content["metrics"].items(), start=1):
        assert [np.nan if v is None else v for v in values] == pytest.approx(expected[name], abs=1e-12, nan_ok=True), name
        defined = [v for v in values if v is not None]
        cells = [float(row[column]) for row in rows if "undefined" not in row[column]]
        assert cells == pytest.approx([*defined, sum(defined) / len(defined)]), name
    assert headings[1] == "accuracy" and headings[-1] == "EEFP" and "there is no later exit" in rows[1][-1]
    row = next(line.split() for line in printed.splitlines() if line.startswith("layer1"))
    assert row[1] == f"{100 * expected['accuracy'][0]:.1f}" and row[2] == f"{100 * expected['ece'][0]:.1f}"
    assert {"reliability.svg", "risk_coverage.png", "confidences.svg", "exit_budgets.md", "exit_intervals.tex"} <= {
        file.name for file in out.iterdir()
    }


def test_a_second_study_reads_the_cache(with_exits, capsys, monkeypatch):
    """The files are in the run's folder; several runs are studied one after the other."""
    leave_figures_blank(monkeypatch, exit_studies)
    assert main(["analyze", "exits", with_exits, with_exits, "--limit", "60"]) == 0
    first = (Path(with_exits) / "exits" / "exits.json").read_text()

    def evaluated(model):
        pytest.fail("the network was evaluated although its scores are cached")

    monkeypatch.setattr("clframe.exits.study.evaluating", evaluated)
    assert main(["analyze", "exits", with_exits, "--limit", "60"]) == 0
    second = json.loads((Path(with_exits) / "exits" / "exits.json").read_text())
    assert second.pop("command") == ["clframe", "analyze", "exits", with_exits, "--limit", "60"]
    assert second == {name: value for name, value in json.loads(first).items() if name != "command"}
    assert second["samples"] == 60 and capsys.readouterr().err == ""


def test_a_run_without_validation_data_has_metrics_and_no_budgets(with_exits, tmp_path, capsys, monkeypatch):
    leave_figures_blank(monkeypatch, exit_studies)
    copy = tmp_path / "copy"
    shutil.copytree(with_exits, copy, ignore=shutil.ignore_patterns("exits"))
    # Held-out samples are part of the training data now; the checkpoint and the test data are the same.
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("validation: 0.1", "validation: 0.0"))
    assert config != (copy / "config.yaml").read_text()
    remove_digests(copy)  # by which other training data are refused
    assert main(["analyze", "exits", str(copy)]) == 0
    printed = capsys.readouterr().out
    assert "no validation samples; thresholds are never chosen on test data" in printed
    content = json.loads((copy / "exits" / "exits.json").read_text())
    assert content["budgets"]["points"] is None and content["validation_samples"] == 0
    assert content["metrics"]["aurc"][0] > 0


def test_proxy_names_runs_that_are_left_out(with_exits, folder, capsys, tmp_path, monkeypatch):
    leave_figures_blank(monkeypatch, exit_studies)
    monkeypatch.setattr(exit_studies, "study_proxies", partial(exit_studies.study_proxies, resamples=20))
    out = tmp_path / "out"
    assert main(["analyze", "proxy", with_exits, folder, "--output", str(out)]) == 0
    printed, error = capsys.readouterr()
    assert error == f"clframe: left out {folder} ({folder}: has one exit only; train with strategy='... + exits')\n"
    content = json.loads((out / "proxy.json").read_text())
    assert {variant["run"] for variant in content["variants"]} == {with_exits} and list(content["skipped"]) == [folder]
    assert "Spearman correlation" in printed and "|EEFP| - |ECE|" in printed and str(out / "proxy.json") in printed


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["exits"], "analyze: found no target"),
        (["exits", "no/such/folder"], "no/such/folder: no such folder; give a run folder"),
        (["exits", "ONE"], "has one exit only; train with strategy='... + exits'"),
        (["exits", "RUN", "--rule", "top_k"], "--rule: has no effect on analyze exits; leave it out"),
        (["exits", "RUN", "--data", "digits"], "--data: has no effect on analyze exits; leave it out"),
        (["exits", "RUN", "--share", "0.9"], "--share: has no effect on analyze exits; leave it out"),
        (["exits", "RUN", "--limit", "0"], "--limit: found '0'; give a whole number of at least 1"),
        (["exits", "RUN", "--device", "tpu9"], "--device: found tpu9"),
        (["exits", "RUN", "ONE"], "--output: found one folder for 2 runs; leave it out, or give one run"),
        (["proxy", "ONE"], "give runs with exits and validation data"),
        (["proxy", "RUN", "--limit", "5"], "--limit: has no effect on analyze proxy; leave it out"),
        (["proxy", "RUN", "--score", "agreement"], "--score: has no effect on analyze proxy; leave it out"),
    ],
)
def test_one_line_for_what_is_wrong_with_exits(with_exits, folder, here, capsys, words, found):
    named = {"RUN": with_exits, "ONE": folder}
    code = main(["analyze", *(named.get(word, word) for word in words), "--output", "out"])
    error = capsys.readouterr().err
    assert code == 2 and found in error and error.startswith("clframe: error: ") and error.count("\n") == 1
    assert not list(here.iterdir())


def test_an_output_that_is_a_file(with_exits, here, capsys):
    (here / "out").write_text("")
    assert main(["analyze", "exits", with_exits, "--output", "out"]) == 2
    assert "is not a folder; choose another" in capsys.readouterr().err
