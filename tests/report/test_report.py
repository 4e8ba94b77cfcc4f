"""Reports of runs whose numbers are known: one, several, incomparable ones, and one in progress."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import math
import re
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
from blank_figures import leave_figures_blank

from clframe.cli import main
from clframe.errors import ClframeError, RunFolderError
from clframe.plotting.style import Picture, annotate_apart, render_picture, styled
from clframe.report import write_report
from clframe.run_folder import RunFolder
from clframe.training.checkpoint import save_checkpoint

DATA = Path(__file__).parent / "data"
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(html.parser.HTMLParser):
    """Reads a page, and sees that every element that is opened is closed."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.seen, self.attributes, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


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


def test_labels_of_budgets_do_not_overlap():
    """Two budgets with nearly equal cost and accuracy, as in runs whose thresholds are close to each other."""
    from matplotlib.figure import Figure

    with styled():
        figure = Figure(figsize=(4.7, 3.1), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1])
        annotate_apart(figure, axes, {(0.5, 0.5): "50 %", (0.51, 0.505): "75 %, 100 %, max"}, color="black")
        figure.draw_without_rendering()
        first, second = (text.get_window_extent() for text in axes.texts)
    assert not first.overlaps(second)


def test_labels_of_two_curves_cover_neither_each_other_nor_a_point():
    """Three close budgets of each of two curves, labeled one curve after the other."""
    from matplotlib.figure import Figure

    first = {(0.50, 0.500): "25 %", (0.51, 0.505): "50 %", (0.52, 0.510): "75 %, 100 %"}
    second = {(0.50, 0.503): "25 %", (0.515, 0.506): "50 %", (0.98, 0.990): "a long name of a point"}
    with styled():
        figure = Figure(figsize=(4.7, 3.1), layout="constrained")
        axes = figure.add_subplot()
        axes.set(xlim=(0, 1), ylim=(0, 1))
        for texts in (first, second):
            annotate_apart(figure, axes, texts, color="black")
        figure.draw_without_rendering()
        boxes = [text.get_window_extent() for text in axes.texts]
        points = [axes.transData.transform(point) for point in (*first, *second)]
    assert [text.get_text() for text in axes.texts] == [*first.values(), *second.values()]
    assert not [1 for n, box in enumerate(boxes) for other in boxes[:n] if box.overlaps(other)]
    for n, box in enumerate(boxes):
        own = points[:3] if n < 3 else points[3:]
        assert not [1 for point in own if box.contains(*point)]
        assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 and axes.bbox.y0 <= box.y0 and box.y1 <= axes.bbox.y1


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
def test_the_command_prints_the_page(make_run, capsys):
    run = make_run("run", (12, 18))
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report' / 'report.html'}\n"


@pytest.mark.usefixtures("without_figures")
def test_unfinished_runs_below_a_folder_are_left_out_and_named(make_run, tmp_path):
    make_run("runs/a", (12, 18))
    half = make_run("runs/b", (12, 18), seed=1)
    (half / "results.json").unlink()
    page = Page(write_report([tmp_path / "runs"]).read_text())
    assert f"{half} is not finished and was omitted." in page.text
    assert "1 run" in page.text


@pytest.mark.usefixtures("without_figures")
def test_watch_shows_a_running_run_until_it_is_finished(make_run, tally, exits):
    run = make_run("run", (12, 18))
    results = (run / "results.json").read_bytes()
    (run / "results.json").unlink()
    (run / "ledger.json").unlink()
    (run / "checkpoints").mkdir()
    seen = []

    def go_on(path):
        seen.append(Page(path.read_text()))
        if len(seen) == 1:
            record = exits(0.5, 0.9, at_half=(0.4, 0.7))
            content = {"tallies": [tally(16, 0).as_tree()], "exits": [dataclasses.asdict(record)]}
            save_checkpoint(run / "checkpoints", content, finished=1)
        elif len(seen) == 2:
            (run / "results.json").write_bytes(results)

    with RunFolder(run).lock():
        write_report([run], watch=True, every=0.01, on_written=go_on)
    first, second, last = seen
    assert "No experience is finished yet." in first.text and first.seen.count("svg") == 1
    assert "average accuracy so far 80.0 %" in second.text and "1 of 2" in second.text
    assert ("http-equiv", "refresh") in first.attributes and ("http-equiv", "refresh") in second.attributes
    assert ("http-equiv", "refresh") not in last.attributes and "Running" not in last.text


@pytest.mark.usefixtures("without_figures")
def test_watch_ends_when_no_process_trains_and_says_why(make_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [make_run(f"runs/{name}", (12, 18), seed=seed) for seed, name in enumerate(["killed", "failed", "done"])]
    for run in runs[:2]:
        (run / "results.json").unlink()
    (runs[1] / "log.txt").write_text("2026-11-29 17:15:00  started\n2026-11-29 17:16:00  failed: disk full\n")
    seen = []
    lock = ExitStack()
    lock.enter_context(RunFolder(runs[0]).lock())

    def kill(path):
        seen.append(Page(path.read_text()))
        lock.close()  # as when the process is killed: no file says so

    write_report(["runs"], watch=True, every=0.01, on_written=kill)
    first, last = seen
    failed = "runs/failed: failed: disk full; clframe run --resume runs/failed continues it."
    assert failed in first.text and "Running. runs/killed; this page" in first.text
    killed = "runs/killed: stopped before its first checkpoint; clframe run --resume runs/killed continues it."
    assert failed in last.text and killed in last.text and "Running" not in last.text
    assert "Stopped: " in last.text and "Failed: " in last.text
    assert ("http-equiv", "refresh") in first.attributes and ("http-equiv", "refresh") not in last.attributes


def test_a_figure_on_the_page_follows_the_scheme_and_its_file_does_not():
    def draw(figure):
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color="#0072b2")
        axes.set_title("http://x.org/<&>")

    found = render_picture(Picture("p", "", draw))
    assert "var(--s0)" in found.inline and "#0072b2" not in found.inline
    assert "#0072b2" in found.svg and "var(" not in found.svg
    assert found.png.startswith(b"\x89PNG")
    assert "&lt;&amp;&gt;" in found.inline
