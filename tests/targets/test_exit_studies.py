"""Studies of the exits of real runs: agreement with the run's own results, caches, and what is left out."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from math import isnan
from pathlib import Path

import numpy as np
import pytest
import torch
from blank_figures import leave_figures_blank

import clframe
from clframe.data.target import DataSplits
from clframe.errors import DataError, RunFolderError, UnsupportedError
from clframe.exits.curves import NO_VALIDATION
from clframe.exits.failure import LABELS
from clframe.exits.proxy import CALIBRATIONS, MEASURES
from clframe.exits.study import collect_scores, study_exits
from clframe.nn.frozen import evaluating
from clframe.report.writing import write_report
from clframe.targets import exit_studies, open_target
from clframe.targets.exit_points import solve_run
from clframe.targets.exit_studies import (
    proxy_pictures,
    proxy_tables,
    study_proxies,
    study_run,
    write_exit_study,
    write_proxy_study,
)

# Wide enough for the first exit to cost less than 75 % of the backbone.
WORDS = ["benchmark.experiences=2", "backbone=mlp", "backbone.width=40", "trainer.epochs=1", "trainer.progress=false",
         "trainer.loggers=[]"]  # fmt: skip
VARIANTS = len(CALIBRATIONS) * len(MEASURES) + 1  # and one after the first experience


def train(folder, strategy="er(memory=30) + exits", *, seed=0, validation=0.1):
    words = [*WORDS, f"strategy={strategy}", f"seed={seed}", f"benchmark.validation={validation}"]
    return clframe.run("quickstart", words, output=folder)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two runs with exits and validation data."""
    folder = tmp_path_factory.mktemp("runs")
    return [train(folder, seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def unusable(tmp_path_factory):
    """A run with one exit, and one without validation data."""
    folder = tmp_path_factory.mktemp("unusable")
    return [train(folder, "naive").run_folder, train(folder, validation=0).run_folder]


@pytest.fixture
def copies(results, tmp_path):
    """Copies of the two runs, without the studies that other tests have written there."""
    folders = []
    for result in results:
        shutil.copytree(result.run_folder, tmp_path / f"seed{result.seed}", ignore=shutil.ignore_patterns("exits"))
        folders.append(str(tmp_path / f"seed{result.seed}"))
    return folders


@pytest.fixture
def passes(monkeypatch):
    """The number of times that the network has been evaluated."""
    counted = []

    def counting(model):
        counted.append(model)
        return evaluating(model)

    monkeypatch.setattr("clframe.exits.study.evaluating", counting)
    return counted


def assert_equal(found, expected):
    assert list(found) == list(expected)
    for name, values in found.items():
        assert values == pytest.approx(expected[name], nan_ok=True), name


def test_a_study_agrees_with_the_results_of_the_run(results, copies):
    study, record = study_run(copies[0]), results[0].exits[-1]
    assert study.exit_names == results[0].exit_names and study.samples == sum(results[0].test_samples)
    assert study.cost_K == pytest.approx([cost / record.backbone_macs for cost in record.macs_K])
    for name in ("accuracy", *LABELS):
        assert study.metrics[name] == pytest.approx(record.metrics[name], abs=1e-5, nan_ok=True), name
    for e, accuracy_K in enumerate(study.by_experience["accuracy"]):
        assert accuracy_K == pytest.approx([record.accuracy_KE[k][e] for k in range(len(study.exit_names))])
    ours, theirs = ({point.name: point for point in points.points} for points in (study.points, record.points))
    for name in ("25%", "50%", "75%", "100%", "max"):
        assert ours[name].undefined == theirs[name].undefined
        assert (ours[name].cost, ours[name].accuracy) == pytest.approx(
            (theirs[name].cost, theirs[name].accuracy), nan_ok=True, abs=1e-6
        )
    assert not isnan(ours["75%"].accuracy) and isnan(ours["25%"].accuracy)
    assert study.validation_samples == record.points.validation_samples > 0


def test_scores_are_computed_once_per_checkpoint_and_limit(copies, passes):
    first = study_run(copies[0])
    assert len(passes) == 2  # validation and test
    again = study_run(copies[0])
    assert len(passes) == 2
    assert_equal(again.metrics, first.metrics)
    assert again.intervals == first.intervals
    assert study_run(copies[0], limit=40).samples == 40 and len(passes) == 4
    newest = max(Path(copies[0]).glob("checkpoints/*.ckpt"))
    os.utime(newest, ns=(1, 1))
    study_run(copies[0], limit=40)
    assert len(passes) == 6


def test_a_cache_of_another_checkpoint_is_not_used(copies):
    """The first run's cache in the second run's folder: the scores are those of the second network."""
    study_run(copies[0])
    shutil.copytree(Path(copies[0]) / "exits", Path(copies[1]) / "exits")
    target = open_target(copies[1])
    found = collect_scores(target, "test")
    output = target.run.learner.adjust_logits(target.model(next(iter(target.experiences[0].batches(size=64))).inputs))
    expected = torch.stack([scores_NC.detach() for scores_NC in output.logits]).numpy()
    np.testing.assert_allclose(found.scores_KNC[:, : expected.shape[1]], expected, atol=1e-5)


def test_an_incomplete_cache_is_computed_again(copies, passes):
    first = study_run(copies[0])
    cache = Path(copies[0]) / "exits" / "cache"
    (cache / "test_scores.npy").write_bytes(b"broken")
    (cache / "validation.key").unlink()
    assert_equal(study_run(copies[0]).metrics, first.metrics)
    assert len(passes) == 4


def test_what_is_written(copies, tmp_path, monkeypatch):
    leave_figures_blank(monkeypatch, exit_studies, but=("confidences",))
    path = write_exit_study(study_run(copies[0]), tmp_path / "out", command=["clframe", "analyze"])
    content = json.loads(path.read_text())
    assert content["metrics"]["eefp"][-1] is None and 0 <= content["metrics"]["eefp"][0] <= 1
    written = {file.name for file in path.parent.iterdir()}
    tables = ("exit_metrics", "exit_intervals", "exit_metrics_undecided", "exit_budgets", "exit_metrics_by_experience")
    figures = ("reliability", "risk_coverage", "confidences")
    assert written == {
        "exits.json", "tensorboard", *(f"{name}.{ending}" for name in tables for ending in ("csv", "md", "tex")),
        *(f"{name}.{ending}" for name in figures for ending in ("svg", "png")),
    }  # fmt: skip


@pytest.mark.slow
def test_event_files_have_the_numbers_of_the_last_study(copies, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    study = study_run(copies[0])
    for _ in range(2):  # the second replaces the first
        write_exit_study(study, tmp_path / "out", command=["clframe"])
    assert len(list((tmp_path / "out" / "tensorboard").iterdir())) == 1
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    assert [e.value for e in events.Scalars("study/aurc")] == pytest.approx(study.metrics["aurc"])
    by_experience = [values[0] for values in study.by_experience["accuracy"]]
    found = events.Scalars(f"study_by_experience/accuracy/{study.exit_names[0]}")
    assert [(e.step, e.value) for e in found] == [(n, pytest.approx(value)) for n, value in enumerate(by_experience)]
    accuracy = {round(100 * p.budget_share): p.accuracy for p in study.points.points if p.accuracy > 0 and p.name != "max"}
    assert {e.step: e.value for e in events.Scalars("study_budgets/accuracy")} == pytest.approx(accuracy)
    assert {"study/reliability", "study/risk_coverage", "study/confidences"} == set(events.Tags()["images"])
    assert "study/exit_metrics/text_summary" in events.Tags()["tensors"]


def test_the_report_of_a_run_shows_its_study(copies, monkeypatch):
    leave_figures_blank(monkeypatch)  # those of the report itself
    leave_figures_blank(monkeypatch, exit_studies)
    before = write_report([copies[0]]).read_text()
    path = write_exit_study(study_run(copies[0]), Path(copies[0]) / "exits", command=["clframe"])
    (path.parent / "reliability.svg").write_text("<svg><script>alert(1)</script></svg>")
    after = write_report([copies[0]])
    assert "Study of exits" not in before and "Study of exits" in after.read_text()
    assert "alert(1)" not in after.read_text()
    for folder, name in (("tables", "study_exit_metrics.csv"), ("tables", "study_exit_budgets.tex"), ("figures", "study_reliability.svg")):
        assert (after.parent / folder / name).is_file()
    assert (after.parent / "tables" / "study_exit_metrics.csv").read_text() == (path.parent / "exit_metrics.csv").read_text()
    path.write_text("{")
    with pytest.raises(RunFolderError, match="cannot be read as JSON of a study; run clframe analyze exits again"):
        write_report([copies[0]])


def test_targets_that_cannot_be_studied(finished, unusable, encoder, texts, copies):
    for run in (finished.run_folder, unusable[0]):
        with pytest.raises(UnsupportedError, match=r"has one exit only; train with strategy='\.\.\. \+ exits'"):
            study_run(run)
    model = open_target(str(encoder), data="clinc150", overrides=[f"benchmark.data_dir={texts}"], per_class=2)
    with pytest.raises(UnsupportedError, match="not a run; give the folder of a run with exits"):
        study_exits(model)


def test_no_validation_samples_and_empty_validation_leave_budgets_undefined(unusable, copies):
    assert study_run(unusable[1]).points.undefined == NO_VALIDATION
    with pytest.raises(UnsupportedError) as refused:
        solve_run(unusable[1], budgets=[0.5])
    assert str(refused.value) == f"{unusable[1]}: {NO_VALIDATION}; train with benchmark.validation=0.1"
    target = open_target(copies[0])

    class Empty:
        def __len__(self):
            return 0

    splits = DataSplits(target.splits.fit, Empty(), target.splits.test)
    study = study_exits(dataclasses.replace(target, splits=splits))
    assert study.points.undefined == NO_VALIDATION and study.metrics["accuracy"][0] > 0
    with pytest.raises(UnsupportedError, match="has no test samples; use a benchmark with a test set"):
        study_exits(dataclasses.replace(target, splits=DataSplits(target.splits.fit, None, Empty())))


def test_variants_of_all_runs_and_reasons_for_the_others(copies, unusable, tmp_path, monkeypatch):
    leave_figures_blank(monkeypatch, exit_studies, but=("proxy_eefp",))
    study = study_proxies([*copies, *unusable], resamples=20)
    assert [v.run for v in study.variants] == [run for run in copies for _ in range(VARIANTS)]
    assert list(study.skipped) == unusable
    assert "has one exit only" in study.skipped[unusable[0]]
    assert "has no validation data; train with benchmark.validation=0.1" in study.skipped[unusable[1]]
    content = json.loads(write_proxy_study(study, tmp_path / "out", command=["clframe"]).read_text())
    assert len(content["variants"]) == 2 * VARIANTS and content["skipped"] == dict(study.skipped)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {f"proxy_variants.{ending}" for ending in ("csv", "md", "tex")} <= names
    rows = (tmp_path / "out" / "proxy_variants.csv").read_text().splitlines()
    assert rows[0].startswith("run,variant,EEFP,ECE,AUROC,AURC,accuracy,") and len(rows) == 1 + 2 * VARIANTS
    assert float(rows[1].split(",")[-9]) == pytest.approx(study.variants[0].metrics["ece"])
    assert {"proxy_correlations.csv", "proxy_differences.tex", "proxy_eefp.svg", "proxy_ece.png"} <= names
    # The first exit costs more than half of the backbone: the scatter plots show the area, which is always defined.
    assert proxy_pictures(study)[0].caption.startswith("EEFP against area under")
    correlations, differences = proxy_tables(study)
    assert correlations.note.startswith(f"{2 * VARIANTS} variants of 2 runs; ")
    assert [row[0] for row in differences.rows] == [
        "|EEFP| - |ECE|", "|AUROC| - |ECE|", "|AURC| - |ECE|", "|EEFP| - |accuracy|"
    ]


def test_an_interrupted_study_resumes_with_new_runs_only(copies, monkeypatch):
    computed, real = [], exit_studies.variants_of_scores

    def counting(run, *rest, **options):
        computed.append(run)
        return real(run, *rest, **options)

    def interrupted(run, *rest, **options):
        if run == copies[1]:
            raise KeyboardInterrupt
        return counting(run, *rest, **options)

    monkeypatch.setattr(exit_studies, "variants_of_scores", interrupted)
    with pytest.raises(KeyboardInterrupt):
        study_proxies(copies, resamples=20)
    monkeypatch.setattr(exit_studies, "variants_of_scores", counting)
    first = study_proxies(copies, resamples=20)
    assert computed == copies  # the first run once, before the interruption; the second after it
    again = study_proxies(copies, resamples=20)
    assert computed == copies
    for one, other in zip(first.variants, again.variants, strict=True):
        assert (one.run, one.label) == (other.run, other.label)
        assert one.metrics == pytest.approx(other.metrics, nan_ok=True)
        assert one.gains == pytest.approx(other.gains, nan_ok=True)


def test_too_few_runs_name_the_first_reason(unusable):
    with pytest.raises(DataError, match=r"proxy: found 0 variants in 2 runs \(.*has one exit only.*\); give runs"):
        study_proxies(unusable)
