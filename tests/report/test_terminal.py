"""The terminal's tables, number by number."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path

import pytest

from clframe.errors import ClframeError
from clframe.exits.curves import wilson_interval
from clframe.exits.failure import LABELS
from clframe.metrics import Tally
from clframe.report.terminal import accuracy_text, exits_text, seeds_table, summary_text
from clframe.results import Result, summarize

EXITS = Path(__file__).parent / "data" / "version_1_exits" / "results.json"
NAN = float("nan")


def make(rows=3, columns=3, **changes):
    """100 samples an experience; after i: 100 - 7 (i - j) right on a seen experience j, none on others."""

    def diagonal(counts):
        return [[counts[j] * (c == j) for c in range(columns)] for j in range(columns)]

    total = diagonal([100] * columns)
    tallies = []
    for i in range(rows):
        right = [max(0, 100 - 7 * (i - j)) if j <= i else 0 for j in range(columns)]
        tallies.append(Tally(total, diagonal(right), total))
    facts = {
        "name": "quickstart", "strategy": "er + lwf", "benchmark": "digits", "backbone": "small_cnn",
        "seed": 0, "class_order": range(columns), "experiences": [(j,) for j in range(columns)],
        "parameters": 1234567, "macs": 7654321, "train_seconds": 12.34, "steps": 1200,
        "state_bytes": {"er": 12800, "lwf": 3 * 2**20}, "versions": {}, "run_folder": "runs/quickstart/1",
    }  # fmt: skip
    return summarize(tallies, **{**facts, **changes})


def rows_of(text):
    """Heading and rows of a table as words."""
    lines = text.splitlines()
    rule = next(n for n, line in enumerate(lines) if set(line) == {"-"})
    return lines[rule - 1].split(), [line.split() for line in lines[rule + 1 :]]


def test_the_matrix_with_its_averages():
    assert accuracy_text(make()).splitlines() == [
        "Accuracy in %, task-agnostic",
        "Rows: after experience i; columns: on test experience j.",
        "after     0     1     2 so far",
        "------------------------------",
        "0     100.0   0.0   0.0  100.0",
        "1      93.0 100.0   0.0   96.5",
        "2      86.0  93.0 100.0   93.0",
    ]


def test_the_task_aware_matrix():
    text = accuracy_text(make(), task_aware=True)
    assert "task-aware" in text
    assert text.splitlines()[-1].split() == ["2", "100.0", "100.0", "100.0", "100.0"]


def test_one_experience():
    assert accuracy_text(make(1, 1)).splitlines()[-1].split() == ["0", "100.0", "100.0"]


def test_a_dash_only_where_not_evaluated():
    holed = dataclasses.replace(make(2, 2), accuracy_matrix=((0.5, NAN), (NAN, 0.25)))
    assert [line.split() for line in accuracy_text(holed).splitlines()[-2:]] == [
        ["0", "50.0", "-", "50.0"],
        ["1", "-", "25.0", "-"],
    ]


def test_decimals_are_dropped_when_columns_are_many():
    heading, rows = rows_of(accuracy_text(make(20, 20)))
    assert heading[1:21] == [str(j) for j in range(20)]
    assert len(rows) == 20
    assert rows[-1][-4:-1] == ["86", "93", "100"]


@pytest.mark.parametrize(("rows", "columns"), [(23, 23), (50, 50), (101, 101), (3, 60), (60, 3)])
def test_many_experiences_show_every_nth_and_the_last_with_averages_over_all(rows, columns):
    result = make(rows, columns)
    heading, lines = rows_of(accuracy_text(result))
    shown = [int(j) for j in heading[1:-2]]  # after ... so far
    assert shown[0] == 0
    assert shown[-1] == columns - 1
    assert len({b - a for a, b in itertools.pairwise(shown[:-1])}) <= 1
    last = lines[-1]
    assert int(last[0]) == rows - 1
    row = result.accuracy_matrix[-1]
    assert [float(cell) for cell in last[1:-1]] == pytest.approx([100 * row[j] for j in shown], abs=0.51)
    seen = row[: min(rows, columns)]
    assert float(last[-1]) == pytest.approx(100 * sum(seen) / len(seen), abs=0.051)


@pytest.mark.parametrize("count", [1, 2, 5, 14, 15, 16, 21, 22, 23, 40, pytest.param(99, marks=pytest.mark.slow), 101])
def test_no_line_is_wider_than_a_hundred_columns(count):
    widths = {len(line) for line in accuracy_text(make(count, count)).splitlines()}
    assert max(widths) <= 100
    assert "One in" not in accuracy_text(make(count, count)) or count > 20


def test_the_summary_has_every_metric_in_percent():
    lines = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in summary_text(make(macs=None)).splitlines())
    assert lines == {
        "run": "quickstart, seed 0",
        "strategy": "er + lwf on digits, small_cnn",
        "final average accuracy": "93.0 %",
        "final average accuracy, task-aware": "100.0 %",
        "final accuracy over all samples": "93.0 %",
        "average incremental accuracy": "96.5 %",
        "learning accuracy": "100.0 %",
        "forgetting": "10.5 %",
        "backward transfer": "-10.5 %",
        "forward transfer": "undefined: accuracy at random initialization was not evaluated",
        "parameters": "1,234,567",
        "MACs per prediction": "not counted",
        "training": "12.3 s, 1,200 optimizer steps",
        "state": "er 12.5 KiB, lwf 3.0 MiB",
        "run folder": "runs/quickstart/1",
    }


def test_the_summary_counts_macs_and_has_no_negative_zero():
    text = summary_text(with_metric(make(state_bytes={}), "backward_transfer", -1e-9))
    assert re.search(r"MACs per prediction +7,654,321\n", text)
    assert re.search(r"backward transfer +0\.0 %\n", text)
    assert re.search(r"state +none\n", text)


def test_the_summary_shows_what_a_prediction_costs_where_exits_decide(tmp_path):
    (tmp_path / "ledger.json").write_text('{"totals": {"prediction": {"mean": 1913580.25, "whole": 7654321}}}')
    text = summary_text(make(run_folder=str(tmp_path)))
    assert re.search(r"MACs per prediction +1,913,580 on average, 25\.0 % of the whole network\n", text)
    assert re.search(r"MACs of the whole network +7,654,321\n", text)
    (tmp_path / "ledger.json").write_text('{"totals": {"prediction": {"mean": 7654321.0, "whole": 7654321}}}')
    assert re.search(r"MACs per prediction +7,654,321\n", summary_text(make(run_folder=str(tmp_path))))


def test_the_summary_compares_experts_with_the_dense_network(tmp_path):
    """102,912 MACs are all of a network whose router takes 18,432 of them: 121.8 % of the dense network."""
    roles = {"linear": 4000.0, "head": 480.0, "router": 0.0, "experts": 80000.0}
    costs = {"mean": 102912.0, "whole": 102912, "dense_by_role": roles, "expert_samples": 64}

    def text(mean):
        (tmp_path / "ledger.json").write_text(json.dumps({"totals": {"prediction": {**costs, "mean": mean}}}))
        return " ".join(summary_text(make(run_folder=str(tmp_path), macs=102912)).split())

    found = text(102912.0)
    assert "MACs per prediction 102,912 on average (experts counted on 64 test samples), 121.8 % of the dense network" in found
    assert "MACs of the dense network 84,480" in found
    assert "hint the routers cost more than the experts save, predictions take 121.8 % of the dense network; use narrower" in found
    saved = text(63360.4)
    assert "63,360 on average (experts counted on 64 test samples), 75.0 % of the dense network" in saved
    assert "hint" not in saved and "whole network" not in saved


def test_long_texts_wrap_but_a_path_stays_whole():
    path = "/" + "long/" * 40
    text = summary_text(make(strategy=" + ".join(f"component{k}(option={k})" for k in range(9)), run_folder=path))
    *lines, last = text.splitlines()
    assert max(len(line) for line in lines) <= 100
    assert last.endswith(path)
    assert "component8(option=8)" in text


def test_exits_have_every_metric_and_every_budget():
    result = Result.from_json(EXITS)
    text = exits_text(result)
    assert max(map(len, text.splitlines())) <= 100
    exits, budgets = (rows_of(block)[1] for block in text.split("\n\n"))
    record = result.exits[-1]
    for k, row in enumerate(exits[:3]):
        found = [record.metrics[name][k] for name in ("accuracy", "unique_accuracy", "fixed_final_errors")]
        assert row[:2] == [result.exit_names[k], f"{record.macs_K[k]:,}"]
        assert [float(cell) for cell in row[3:6]] == pytest.approx([100 * share for share in found], abs=0.051)
    assert [float(row[2]) for row in budgets[:2]] == pytest.approx(  # "25 %" is two words
        [100 * point.cost for point in record.points.points[:2]], abs=0.051
    )
    assert ["never", "stops", "early"] in [row[:3] for row in budgets]
    overthinking = 100 * (record.static["oracle"] - record.accuracy_K[-1])
    assert f"overthinking (oracle minus last exit) {overthinking:.1f} %" in " ".join(text.split())


def with_failure(metrics):
    """The result of an older run with two exits, with the given metrics per exit in its last record."""
    result = Result.from_json(EXITS)
    last = dataclasses.replace(result.exits[-1], metrics={**result.exits[-1].metrics, **metrics})
    return dataclasses.replace(result, exits=(*result.exits[:-1], last))


def test_exits_of_a_language_model_are_those_of_the_first_tokens_of_each_domain():
    result = Result.from_json(EXITS)
    count = len(result.test_samples)
    samples = (10000, *[100] * (count - 1))
    nll_matrix = tuple((1.0,) * count for _ in range(count))
    text = exits_text(dataclasses.replace(result, test_samples=samples, nll_matrix=nll_matrix))
    assert " ".join(text.split()).count("those of the first 4,096 test tokens of each domain, not of all tokens.") == 2
    right, total = round(result.exits[-1].accuracy_K[-1] * (4096 + 100 * (count - 1))), 4096 + 100 * (count - 1)
    low, high = wilson_interval(right, total)
    assert f"{100 * low:.1f} to {100 * high:.1f}" in text
    assert "tokens" not in exits_text(result)


def test_the_summary_has_mean_eefp_and_aurc_of_a_run_with_exits():
    exits = len(Result.from_json(EXITS).exit_names)
    eefp, aurc = [0.5 + 0.125 * k for k in range(exits - 1)], [0.25 * (k + 1) for k in range(exits)]
    text = summary_text(with_failure({"eefp": (*eefp, NAN), "aurc": tuple(aurc)}))
    lines = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in text.splitlines())
    # EEFP is undefined at the last exit, which is left out of the mean.
    assert lines["mean EEFP of the exits"] == f"{100 * sum(eefp) / len(eefp):.1f} %"
    assert lines["mean AURC of the exits"] == f"{100 * sum(aurc) / len(aurc):.1f} %"


def test_means_over_exits_are_undefined_with_a_reason_and_absent_where_not_recorded():
    exits = len(Result.from_json(EXITS).exit_names)
    text = " ".join(summary_text(with_failure({"eefp": (NAN,) * exits, "aurc": (NAN,) * exits})).split())
    assert "mean EEFP of the exits undefined: confidences are not finite" in text
    assert "mean AURC of the exits undefined: confidences are not finite" in text
    text = " ".join(summary_text(with_failure({"eefp": (NAN,) * exits, "aurc": (0.0,) * exits})).split())
    assert "mean EEFP of the exits undefined: no sample can gain from a later exit, or every sample can" in text
    for older in (Result.from_json(EXITS), make()):
        assert "EEFP" not in summary_text(older) and "AURC" not in summary_text(older)


def test_exits_of_the_terminal_leave_failure_prediction_to_the_report():
    exits = len(Result.from_json(EXITS).exit_names)
    text = exits_text(with_failure({name: (0.5,) * exits for name in LABELS}))
    assert text == exits_text(Result.from_json(EXITS))


def test_a_network_with_one_exit_has_no_table_of_exits():
    assert exits_text(make()) == ""


def with_metric(result, name, value):
    return dataclasses.replace(result, metrics={**result.metrics, name: value})


def seeds(strategy, finals, **changes):
    return [
        with_metric(make(strategy=strategy, seed=s, **changes), "final_average_accuracy", final)
        for s, final in enumerate(finals)
    ]


def test_seeds_table_has_a_row_for_each_strategy():
    text = seeds_table([*seeds("er + lwf", [0.9, 0.96, 0.96]), *seeds("naive", [0.2])])
    assert text.splitlines()[1:] == [
        "          seeds       final   task-aware  incremental  forgetting     backward",
        "-" * 78,
        "er + lwf      3  94.0 ± 3.5  100.0 ± 0.0   96.5 ± 0.0  10.5 ± 0.0  -10.5 ± 0.0",
        "naive         1        20.0        100.0         96.5        10.5        -10.5",
    ]


def test_seeds_table_marks_what_is_undefined():
    row = seeds_table([make(1, 1)]).splitlines()[-1]
    assert row.split() == ["er", "+", "lwf", "1", "100.0", "100.0", "100.0", "-", "-"]


def test_seeds_table_names_the_benchmark_where_it_differs():
    text = seeds_table([*seeds("er", [0.5]), *seeds("er", [0.5], benchmark="mnist")])
    assert [line.split("  ")[0] for line in text.splitlines()[3:]] == ["er, digits", "er, mnist"]


def test_seeds_table_with_a_long_strategy_stays_within_a_hundred_columns():
    text = seeds_table(seeds(" + ".join(f"component{k}(option={k})" for k in range(9)), [0.123, 0.99, 0.5]))
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "component8(option=8)" in text


def test_seeds_table_refuses_nothing_and_a_seed_twice():
    with pytest.raises(ClframeError, match="no results"):
        seeds_table([])
    with pytest.raises(ClframeError, match="a seed is there twice"):
        seeds_table([make(), make()])
