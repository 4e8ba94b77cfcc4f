"""Reports of runs that lack something or cannot be compared: undefined numbers say why, damaged runs are one line."""

from __future__ import annotations

import shutil

import pytest
from report_page import Page

from clframe.cli import main
from clframe.errors import ClframeError, RunFolderError
from clframe.report import write_report


@pytest.mark.usefixtures("without_figures")
def test_what_cannot_be_reached_says_so(make_run, tmp_path, read_table):
    make_run("base", (18, 18))
    make_run("other", (10, 12), strategy="naive")
    (equal,) = read_table(write_report([tmp_path / "base", tmp_path / "other"]), "equal_accuracy")
    assert equal["MACs needed"] == "undefined: it reaches 55.0 % at most"
    assert float(equal["target accuracy"]) == 0.9


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize(
    "other, names, why",
    [
        ({"classes": (1, 0)}, ("er", "naive"), "class orders of seed 0 differ"),
        ({"overrides": ["benchmark.validation=0.1"]}, ("er, validation=0.0", "naive, validation=0.1"),
         "benchmark.validation differs"),
        ({"change": {"test_samples": [20, 21]}}, ("er", "naive"), "test splits of seed 0 differ"),
    ],
)  # fmt: skip
def test_another_stream_is_flagged_and_not_subtracted(other, names, why, make_run, tmp_path, read_table):
    make_run("a", (12, 18))
    make_run("b", (14, 18), strategy="naive", **other)
    path = write_report([tmp_path / "a", tmp_path / "b"])
    notice = f"No group is comparable with '{names[0]}': '{names[1]}' ({why}). No difference from it is shown."
    assert notice in Page(path.read_text()).text
    for row in read_table(path, "differences"):
        assert f"undefined: {why}" in row.values() and row["difference"] == "-"
    assert f"undefined: {why}" in read_table(path, "equal_accuracy")[0]["MACs needed"]
    assert "No front: the groups are not comparable." in Page(path.read_text()).text


@pytest.mark.usefixtures("without_figures")
def test_missing_seeds_are_flagged(make_run, tmp_path, read_table):
    make_run("a/0", (12, 18), seed=0)
    make_run("a/1", (12, 18), seed=1)
    make_run("b/0", (14, 18), seed=0, strategy="naive")
    path = write_report([tmp_path / "a", tmp_path / "b"])
    notice = "Groups have different seeds: 'naive' without seed 1. Differences are over common seeds only."
    assert notice in Page(path.read_text()).text
    row = read_table(path, "differences")[0]
    assert (row["common seeds"], row["95 % CI from"]) == ("0", "undefined: one seed in common")
    assert float(row["difference"]) == pytest.approx(0.05)


@pytest.mark.usefixtures("without_figures")
def test_no_common_seed_is_no_difference(make_run, tmp_path, read_table):
    make_run("a", (12, 18), seed=0)
    make_run("b", (14, 18), seed=1, strategy="naive")
    row = read_table(write_report([tmp_path / "a", tmp_path / "b"]), "differences")[0]
    assert row["common seeds"] == "none" and "undefined: no seed in common" in row.values()


@pytest.mark.usefixtures("without_figures")
def test_an_undefined_metric_says_why(make_run, tmp_path, read_table):
    change = {"metrics": {"forgetting": None}, "undefined": {"forgetting": "experience 0 was not evaluated"}}
    make_run("runs/0", (12, 18), seed=0)
    make_run("runs/1", (12, 18), seed=1, change=change)
    path = write_report([tmp_path / "runs"])
    row = next(row for row in read_table(path, "summary") if row["metric"].startswith("forgetting"))
    assert row["value"] == "undefined: experience 0 was not evaluated (seed 1)"


@pytest.mark.usefixtures("without_figures")
def test_losses_that_are_no_numbers_are_flagged(make_run):
    run = make_run("run", (12, 18))
    log = run / "metrics.csv"
    log.write_text(log.read_text() + "1,60,loss/task/ce,nan\n1,80,loss/task/ce,inf\n")
    assert "loss/task/ce is not finite from step 60 on" in Page(write_report([run]).read_text()).text


@pytest.mark.usefixtures("without_figures")
def test_without_validation_samples_budgets_are_undefined(make_run, exits, read_table):
    run = make_run("run", (12, 18), records=[exits(0.5, 0.9), exits(0.25, 0.75)])
    row, whole = read_table(write_report([run]), "budgets")
    assert float(whole["accuracy"]) == 0.75
    assert row["accuracy"] == "undefined: no validation samples; set benchmark.validation=0.1"


@pytest.mark.usefixtures("without_figures")
def test_a_repeated_run_counts_once_and_a_contradiction_is_refused(make_run, tmp_path, read_table):
    first = make_run("runs/a", (12, 18))
    shutil.copytree(first, tmp_path / "runs" / "b")
    path = write_report([tmp_path / "runs"])
    assert "exactly; it is counted once" in Page(path.read_text()).text
    make_run("runs/c", (13, 18))
    with pytest.raises(ClframeError, match="one config and one seed, 0, but different numbers"):
        write_report([tmp_path / "runs"])


def _drop(name):
    return lambda run: (run / name).unlink()


def _swap(name, old, new):
    def swap(run):
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new))

    return swap


@pytest.mark.parametrize(
    "damage, message",
    [
        (_drop("results.json"), "not finished, results.json is missing"),
        (_drop("config.yaml"), "no config.yaml"),
        (_swap("results.json", '"schema_version": 2', '"schema_version": 3'), "schema_version 3, this clframe reads 1"),
        (_swap("results.json", "}", ""), "not JSON"),
        (_swap("results.json", '"seed": 0', '"seed": 5'), "seed 5, but config.yaml has 0"),
        (_swap("results.json", "[[1.0, 0.0]", "[[1.0]"), "do not fit test_samples"),
        (_swap("results.json", "[[1.0, 0.0]", "[[1.5, 0.0]"), "outside 0 to 1"),
        (_swap("results.json", "[0.6, 0.9]", "[0.7, 0.9]"), "final_average_accuracy is 0.75, but 0.8 by accuracy_matrix"),
        (_swap("config.yaml", "strategy: er", "strateg: er"), "unknown key 'strateg'"),
        (_swap("metrics.csv", "0.25", "much"), "metrics.csv: is damaged"),
        (_swap("ledger.json", "}", ""), "ledger.json: is damaged"),
    ],
)
def test_a_bad_run_is_one_line(damage, message, make_run, capsys):
    run = make_run("run", (12, 18))
    damage(run)
    assert main(["report", str(run)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("clframe: error: ") and ";" in err
    assert message in err
    assert not (run / "report").exists()


@pytest.mark.usefixtures("without_figures")
def test_bad_calls_are_one_line(make_run, tmp_path, capsys):
    run = make_run("run", (12, 18))
    other = make_run("other", (12, 18), overrides=["benchmark.name=mnist"])
    (tmp_path / "empty").mkdir()
    for words, message in (
        ([], "no run given"),
        ([tmp_path / "nowhere"], "no such folder"),
        ([tmp_path / "empty"], "not a run, and no run below it"),
        ([run / "results.json"], "is a file"),
        ([run, other], "different benchmarks, digits, mnist"),
        ([run, "--output", run / "results.json"], "results.json is not a folder; choose another"),
        ([run, "--wach"], "did you mean '--watch'?"),
    ):
        assert main(["report", *map(str, words)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and message in err


def test_a_folder_that_cannot_be_written_is_refused_before_drawing(make_run, monkeypatch):
    run = make_run("run", (12, 18))
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    monkeypatch.setattr("clframe.report.writing.make_page", None)
    with pytest.raises(RunFolderError, match=r"^--output: .* cannot be written; choose another folder$"):
        write_report([run])


@pytest.mark.usefixtures("without_figures")
def test_unfinished_runs_below_a_folder_are_left_out_and_named(make_run, tmp_path):
    make_run("runs/a", (12, 18))
    half = make_run("runs/b", (12, 18), seed=1)
    (half / "results.json").unlink()
    page = Page(write_report([tmp_path / "runs"]).read_text())
    assert f"{half} is not finished and was omitted." in page.text
    assert "1 run" in page.text
