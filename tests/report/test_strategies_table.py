"""The table of all strategies: pairs with and without exits, gains over a base or a chosen reference, and names."""

from __future__ import annotations

import json
import math
import re

import pytest
from report_page import Page

from clframe.cli import main
from clframe.report import content, figures, loading, write_report
from clframe.report.comparison import group_runs
from clframe.report.families import BASE, CONTROL, EXITS, PROBES, kind_of
from clframe.report.labels import labels_of
from clframe.report.loading import as_written

pytestmark = pytest.mark.usefixtures("without_figures")

PROBE = "components.exits.gradient=detached"
SIZE = "components.exits.control=last"


@pytest.fixture
def family(make_run, exits, tmp_path):
    """Two seeds of ``er`` in four kinds; given in another order than that of the table."""
    for seed in range(2):
        def run(name, final, early, late, half, seed=seed, overrides=()):
            records = [exits(0.5, 0.9), exits(early, late, at_half=half)]
            make_run(f"runs/{name}{seed}", final, seed=seed, strategy="er + exits", records=records, macs=400,
                     overrides=overrides, change={"parameters": 9})  # fmt: skip

        run("a_control", (10, 14), 0.2, 0.6, (0.5, 0.5), overrides=[SIZE])
        run("b_probes", (10 + seed, 14), 0.2, 0.6, (0.5, 0.55), overrides=[PROBE])
        run("c_exits", (12 + 2 * seed, 16), 0.2, 0.8, (0.4, 0.7))
        make_run(f"runs/d_base{seed}", (10, 14), seed=seed, macs=400)
    return tmp_path / "runs"


def test_a_row_per_kind_with_gain_budgets_and_cost(family, read_table):
    path = write_report([family])
    base, exits, probes, control = read_table(path, "strategies")
    assert [row["kind"] for row in (base, exits, probes, control)] == [BASE, EXITS, PROBES, CONTROL]
    assert [row["strategy"] for row in (base, exits, probes, control)] == [
        "er", "er + exits", "er + exits(gradient=detached)", "er + exits(control=last)",
    ]  # fmt: skip
    assert (float(base["number of seeds"]), float(base["parameters"]), float(exits["parameters"])) == (2, 7, 9)
    assert float(base["final average accuracy"]) == pytest.approx(0.6)
    # exits: (12 + 16) / 40 = 0.7 and (14 + 16) / 40 = 0.75, so d = 0.1 and 0.15
    assert float(exits["final average accuracy: deviation"]) == pytest.approx(0.05 / math.sqrt(2))
    assert float(exits["gain"]) == pytest.approx(0.125)
    half_width = 12.70620 * (0.05 / math.sqrt(2)) / math.sqrt(2)  # t(0.975, 1) = 12.70620
    assert float(exits["95 % CI from"]) == pytest.approx(0.125 - half_width, rel=1e-5)
    assert float(exits["to"]) == pytest.approx(0.125 + half_width, rel=1e-5)
    assert float(probes["gain"]) == pytest.approx(0.0125) and float(control["gain"]) == pytest.approx(0, abs=1e-12)
    assert (base["gain"], base["cost at equal accuracy"], base["at 50 % of the cost"]) == ("-", "-", "-")
    assert float(base["at 100 % of the cost"]) == pytest.approx(0.6)
    assert (float(exits["at 50 % of the cost"]), exits["at 25 % of the cost"]) == (0.7, "undefined: not evaluated (seed 0, 1)")
    # 0.6 is below the first point, 0.7 at 0.4 x 400 MACs
    assert float(exits["cost at equal accuracy"]) == pytest.approx(160 / 400)
    # of probes: 0.6 only by the whole network of 400 MACs
    assert float(probes["cost at equal accuracy"]) == pytest.approx(1.0)
    # forgetting of the first experience: 20 right, then 12 and 14
    assert float(exits["forgetting"]) == pytest.approx((8 / 20 + 6 / 20) / 2)
    for ending, row in (("md", "| er + exits | with exits | 2 | 9 | 72.5 ± 3.5 | +12.5 |"), ("tex", "er + exits & with exits & 2 & 9 &")):
        assert row in (path.parent / "tables" / f"strategies.{ending}").read_text()


def test_decisions_unique_accuracy_and_similarity(family, read_table):
    path = write_report([family])
    rows = {row["strategy"]: row for row in read_table(path, "exits_compared")}
    assert list(rows) == ["er + exits", "er + exits(gradient=detached)", "er + exits(control=last)"]
    # the oracle is 1.0; unique accuracy of the only early exit is 0; taps are equal to themselves
    assert (float(rows["er + exits"]["last exit"]), float(rows["er + exits"]["oracle"])) == (0.8, 1.0)
    assert float(rows["er + exits"]["overthinking"]) == pytest.approx(0.2)
    assert float(rows["er + exits(gradient=detached)"]["overthinking"]) == pytest.approx(0.4)
    assert (float(rows["er + exits"]["unique accuracy"]), float(rows["er + exits"]["CKA"])) == (0.0, 1.0)
    assert rows["er + exits"]["ECE of the last exit"] == "undefined: not recorded"
    decisions = read_table(path, "group2_exit_decisions")
    assert [float(row["overthinking"]) for row in decisions] == pytest.approx([0.1, 0.2])
    assert [float(row["final"]) for row in read_table(path, "group2_unique_accuracy")] == [0.25, 0.25]
    assert [float(row["early"]) for row in read_table(path, "group2_cka")] == [1.0, 1.0]
    text = Page(path.read_text()).text
    for title in ("Overthinking and oracle: er + exits", "Unique accuracy: er + exits",
                  "Similarity of representations (CKA) over experiences: er + exits"):  # fmt: skip
        assert title in text


def test_a_strategy_without_its_base_has_no_gain(make_run, exits, tmp_path, read_table):
    make_run("runs/a", (12, 18), strategy="er + exits", records=[exits(0.5, 0.9), exits(0.2, 0.8)])
    make_run("runs/b", (12, 18), strategy="naive")
    exits_row, base = read_table(write_report([tmp_path / "runs"]), "strategies")
    assert (exits_row["strategy"], exits_row["gain"]) == ("er + exits", "undefined: no run of its base")
    assert (base["kind"], base["gain"]) == (BASE, "-")


def test_a_base_on_other_data_is_not_subtracted(make_run, exits, tmp_path, read_table):
    make_run("runs/a", (12, 18))
    make_run("runs/b", (12, 18), strategy="er + exits", records=[exits(0.5, 0.9), exits(0.2, 0.8)],
             overrides=["benchmark.validation=0.1"])  # fmt: skip
    _, row = read_table(write_report([tmp_path / "runs"]), "strategies")
    assert row["gain"] == row["cost at equal accuracy"] == "undefined: benchmark.validation differs"


@pytest.mark.parametrize("against", ["er + exits", "exits + er"])
def test_against_chooses_the_reference(against, family, read_table):
    path = write_report([family], against=against)
    base, exits, probes, _ = read_table(path, "strategies")
    assert exits["gain"] == "-" and float(base["gain"]) == pytest.approx(-0.125)
    assert float(probes["gain"]) == pytest.approx(0.0125 - 0.125)
    # the whole network of er + exits is right on 0.8; the base reaches 0.6
    assert base["cost at equal accuracy"] == "undefined: it reaches 60.0 % at most"
    assert {row["group"] for row in read_table(path, "differences")} == {
        "er", "er + exits(gradient=detached)", "er + exits(control=last)",
    }  # fmt: skip
    assert "minus that of 'er + exits'" in Page(path.read_text()).text


def test_against_names_groups_by_options(make_run, tmp_path, read_table):
    make_run("runs/a", (12, 18), overrides=["components.er.memory=50"])
    make_run("runs/b", (14, 18), overrides=["components.er.memory=100"])
    make_run("runs/c", (16, 18), strategy="naive")
    path = write_report([tmp_path / "runs"], against="er(memory=100)")
    assert [row["gain"] for row in read_table(path, "strategies")][1] == "-"
    assert [float(row["gain"]) for row in read_table(path, "strategies")[::2]] == pytest.approx([-0.05, 0.05])


@pytest.mark.parametrize(
    "against, message",
    [
        ("er", "found 'er', which fits several groups; give one of 'er, er.memory=50', 'er, er.memory=100'"),
        ("naiv", "found 'naiv', which is not a group; did you mean 'naive'?"),
        ("er(memory=70)", "found 'er(memory=70)', which is not a group"),
    ],
)
def test_a_reference_that_is_not_one_group_is_refused(against, message, make_run, tmp_path, capsys):
    make_run("runs/a", (12, 18), overrides=["components.er.memory=50"])
    make_run("runs/b", (14, 18), overrides=["components.er.memory=100"])
    make_run("runs/c", (16, 18), strategy="naive")
    assert main(["report", str(tmp_path / "runs"), "--against", against]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "runs" / "report").exists()


def test_a_reference_for_one_group_is_refused(make_run, capsys):
    assert main(["report", str(make_run("run", (12, 18))), "--against", "er"]) == 2
    assert "found 'er' with one group, 'er'; give runs of another group too" in capsys.readouterr().err


def test_names_are_in_the_order_that_the_user_wrote(make_run, exits, tmp_path, read_table):
    for name, strategy in (("a", "lwf(alpha=2) + exits + er"), ("b", "exits + lwf")):
        run = make_run(f"runs/{name}", (12, 18), strategy=strategy, records=[exits(0.5, 0.9), exits(0.2, 0.8)])
        results = json.loads((run / "results.json").read_text())
        sorted_names = " + ".join(sorted(re.sub(r"\(.*?\)", "", strategy).split(" + ")))
        (run / "results.json").write_text(json.dumps({**results, "strategy": sorted_names}))
    path = write_report([tmp_path / "runs"])
    assert [row["strategy"].partition(",")[0] for row in read_table(path, "strategies")] == ["lwf + exits + er", "exits + lwf"]
    path = write_report([tmp_path / "runs" / "a"])
    assert "lwf + exits + er on digits" in Page(path.read_text()).text


def test_names_without_a_command_have_additions_last():
    assert as_written("exits + lwf", None) == as_written("exits + lwf", ["python", "strategy=er"]) == "lwf + exits"
    assert as_written("early_exit + er + exits + moe", []) == "er + moe + exits + early_exit"
    assert as_written("exits + lwf", ["strategy=lwf + exits", "strategy=exits + lwf"]) == "exits + lwf"


def test_kinds_and_labels_follow_the_options_of_exits():
    probes = {"strategy": "er + exits", "exits.gradient": "detached", "exits.control": "none"}
    control = {**probes, "exits.gradient": "through", "exits.control": "last"}
    plain = {**control, "exits.control": "none"}
    assert [kind_of(flat) for flat in (probes, control, plain, {"strategy": "er"})] == [PROBES, CONTROL, EXITS, BASE]
    assert labels_of([plain, {**plain, "exits.gradient": "equilibrium"}]) == [
        "er + exits", "er + exits(gradient=equilibrium)",
    ]  # fmt: skip


def test_groups_share_a_number_of_figures(family, monkeypatch):
    path = write_report([family])
    assert Page(path.read_text()).seen.count("svg") > 2 + 30
    monkeypatch.setattr(content, "MOST_FIGURES", 10)
    page = Page(write_report([family]).read_text())
    # of all groups: accuracy and Pareto; of the base: accuracy, matrix, forgetting, losses, cost by stage
    assert page.seen.count("svg") == 2 + 5
    assert "Figures are drawn for the first 1 of 4 groups only; --all-figures draws those of all." in page.text
    assert Page(write_report([family], all_figures=True).read_text()).seen.count("svg") > 2 + 30


def test_figures_name_the_most_accurate_groups(family, monkeypatch):
    monkeypatch.setattr(figures, "MOST_GROUPS", 2)
    runs = [loading.load_run(path) for path in sorted(family.iterdir())]
    groups, _ = group_runs(runs)
    # final average accuracies: control 0.6, probes 0.6125, exits 0.725, base 0.6
    assert [group.label for group in figures.best_groups(groups)] == ["er + exits(gradient=detached)", "er + exits"]
    captions = [picture.caption for picture in figures.group_pictures(groups)]
    assert len(captions) == 2 and all("The 2 most accurate of 4 groups are named." in caption for caption in captions)


def test_many_groups_are_collapsed(family, make_run, tmp_path):
    def chapters(path):
        return re.findall(r'<details class="chapter" id="section-\d+"( open)?>', path.read_text())

    assert chapters(write_report([family])) == [""] * 4
    one, two = make_run("one", (12, 18)), make_run("two", (12, 18), strategy="naive")
    assert chapters(write_report([one, two])) == [" open"] * 2
    assert chapters(write_report([one])) == []


def test_configs_that_differ_in_their_seed_are_parsed_once(make_run, tmp_path, monkeypatch):
    for seed in range(3):
        make_run(f"runs/{seed}", (12 + seed, 18), seed=seed)
    read = []
    original = loading.config_of
    monkeypatch.setattr(loading, "config_of", lambda path: read.append(path) or original(path))
    known = {}
    runs = [loading.load_run(tmp_path / "runs" / str(seed), known) for seed in range(3)]
    assert len(read) == 1
    assert [run.seed for run in runs] == [0, 1, 2]
    assert runs[0].settings == runs[2].settings == loading.load_run(tmp_path / "runs" / "2").settings
