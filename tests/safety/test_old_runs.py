"""Runs of every format that clframe has written load, report, resume and extend; those of newer versions are refused.

``tests/fixtures/runs``: two experiences of digits, one epoch each, ``strategy=er(memory=10)``, written by the version of
each format of checkpoints (2 and 3) and each schema of results (1 and 2).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import clframe
from clframe.api import extend
from clframe.report import write_report
from clframe.results import Result

RUNS = Path(__file__).parents[1] / "fixtures" / "runs"
NAMES = sorted(path.name for path in RUNS.iterdir())
SLOW = [NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])]


@pytest.fixture
def old(here, request):
    """A copy of one of them."""
    return shutil.copytree(RUNS / request.param, here / request.param)


def accuracies(folder):
    return json.loads((folder / "results.json").read_text())["accuracy_matrix"]


def test_there_is_one_of_each_format():
    found = {
        (torch.load(path / "checkpoints" / "experience_002.ckpt", weights_only=True)["format"],
         json.loads((path / "results.json").read_text())["schema_version"])
        for path in RUNS.iterdir()
    }  # fmt: skip
    assert found == {(2, 1), (2, 2), (3, 2)}
    assert sum(path.stat().st_size for path in RUNS.rglob("*") if path.is_file()) < 250_000


@pytest.mark.parametrize("old", NAMES, indirect=True)
def test_it_loads_and_is_reported(old, tmp_path, monkeypatch):
    from clframe.plotting.style import RenderedPicture
    from clframe.report import content

    monkeypatch.setattr(
        content, "render_picture", lambda p: RenderedPicture(p.name, p.caption, "<svg></svg>", "<svg></svg>", b"")
    )
    model = clframe.load(old)
    samples = clframe.data.SOURCES.get("digits")().test
    accuracy = (model.classify(samples.x) == samples.y).float().mean().item()
    # Test experiences have nearly equal sizes: the accuracy over all samples is within those on each.
    assert min(accuracies(old)[1]) <= accuracy <= max(accuracies(old)[1])
    assert Result.from_json(old / "results.json").accuracy_matrix == tuple(map(tuple, accuracies(old)))
    page = write_report([old], output=tmp_path / "out").read_text()
    assert f"{100 * sum(accuracies(old)[1]) / 2:.1f}" in page


@pytest.mark.parametrize("old", SLOW, indirect=True)
def test_it_resumes(old):
    before = accuracies(old)
    (old / "results.json").unlink()
    (old / "checkpoints" / "experience_002.ckpt").unlink()
    result = clframe.run(resume=old)
    assert list(result.accuracy_matrix[0]) == before[0]  # from the checkpoint
    assert result.accuracy_matrix[1] == pytest.approx(before[1], abs=0.1)  # trained again, by another release of torch
    assert torch.load(old / "checkpoints" / "experience_002.ckpt", weights_only=True)["format"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("old", NAMES, indirect=True)
def test_it_is_extended(old, here):
    before = accuracies(old)
    result = extend(old, ["benchmark=digits", "benchmark.experiences=1"], output=here / "new")
    assert len(result.accuracy_matrix) == 3
    assert [list(row[:2]) for row in result.accuracy_matrix[:2]] == before
    assert accuracies(old) == before


@pytest.mark.parametrize("number", [1, 4, 99, "3", None])
@pytest.mark.parametrize("verb", [pytest.param("resume", marks=pytest.mark.slow), "predict"])
def test_another_format_of_checkpoints(number, verb, run, refused, readers):
    torch.save({"format": number}, run / "checkpoints" / "experience_002.ckpt")
    refused(
        readers[verb], f"experience_002.ckpt: has format {number}, this version reads 2 and 3; use the version that"
    )


@pytest.mark.parametrize("number", [0, 3, 99, "2", True, None])
def test_another_schema_of_results(number, run, refused, readers):
    file = run / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema_version": number}))
    refused(readers["report"], f"results.json: schema_version {number!r}, this clframe reads 1 to 2; read it with the")


def test_a_newer_schema_of_results_is_not_overwritten(run, refused, call):
    (run.parent / "runs").mkdir()
    run = run.rename(run.parent / "runs" / "run")
    file = run / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema_version": 3}))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused(["run", "--resume", run], "results.json: schema_version 3, this clframe writes 2 and would overwrite it; resume the")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    assert "damaged: results.json: schema_version 3, this clframe reads 1 to 2" in call("runs")[1]


def test_a_finished_run_keeps_the_devices_it_was_trained_on(run):
    text = (run / "config.yaml").read_text()
    assert "  devices: 1\n" in text
    (run / "config.yaml").write_text(text.replace("  devices: 1\n", "  devices: 2\n"))
    before, results = (run / "config.yaml").read_bytes(), accuracies(run)
    clframe.run(resume=run, overrides=["trainer.devices=1"])
    assert (run / "config.yaml").read_bytes() == before and accuracies(run) == results


def test_a_newer_ledger(run, refused, readers):
    file = run / "ledger.json"
    content = json.loads(file.read_text())
    content["ledger"]["schema_version"] = 99
    file.write_text(json.dumps(content))
    refused(readers["report"], "ledger.json: ")


def test_a_newer_config(run, refused, readers):
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "newer: 1\n")
    refused(readers["resume"], "run/config.yaml: config: unknown key 'newer'")
