"""``clframe analyze sparsity``: the table it prints, the files it writes, the lines it refuses with."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch

from clframe import run
from clframe.cli import main
from clframe.progress import progress_bars
from clframe.sparsity.study import study_sparsity
from clframe.targets import open_target


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    words = ["benchmark.experiences=2", "backbone=mlp", "backbone.width=6", "strategy=naive", "trainer.epochs=1",
             "trainer.progress=false", "trainer.loggers=[]"]
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
