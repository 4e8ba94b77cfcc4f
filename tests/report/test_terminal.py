"""The terminal's tables, number by number."""

from __future__ import annotations

import dataclasses
import itertools
import re

import pytest

from clframe.errors import ClframeError
from clframe.metrics import Tally
from clframe.report.terminal import accuracy_table, seeds_table, summary
from clframe.results import summarize

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


def test_the_matrix_with_its_averages():
    assert accuracy_table(make()).splitlines()[1:] == [
        "after |     0     1     2 |  seen",
        "---------------------------------",
        "0     | 100.0   0.0   0.0 | 100.0",
        "1     |  93.0 100.0   0.0 |  96.5",
        "2     |  86.0  93.0 100.0 |  93.0",
    ]


def test_the_task_aware_matrix():
    text = accuracy_table(make(), task_aware=True)
    assert "task-aware" in text
    assert text.splitlines()[-1] == "2     | 100.0 100.0 100.0 | 100.0"


def test_one_experience():
    assert accuracy_table(make(1, 1)).splitlines()[-1] == "0     | 100.0 | 100.0"


def test_a_dash_only_where_not_evaluated():
    holed = dataclasses.replace(make(2, 2), accuracy_matrix=((0.5, NAN), (NAN, 0.25)))
    assert accuracy_table(holed).splitlines()[-2:] == [
        "0     |  50.0     - |  50.0",
        "1     |     -  25.0 |     -",
    ]


def test_decimals_go_first_when_columns_are_many():
    lines = accuracy_table(make(20, 20)).splitlines()
    assert lines[1].split("|")[1].split() == [str(j) for j in range(20)]
    assert len(lines) == 3 + 20
    assert lines[-1].split("|")[1].split()[-3:] == ["86", "93", "100"]


@pytest.mark.parametrize(("rows", "columns"), [(23, 23), (50, 50), (101, 101), (3, 60), (60, 3)])
def test_many_experiences_show_every_nth_and_the_last_with_averages_over_all(rows, columns):
    result = make(rows, columns)
    lines = accuracy_table(result).splitlines()
    heading = next(line for line in lines if line.startswith("after"))
    shown = [int(j) for j in heading.split("|")[1].split()]
    assert shown[0] == 0
    assert shown[-1] == columns - 1
    assert len({b - a for a, b in itertools.pairwise(shown[:-1])}) <= 1
    last = lines[-1].split("|")
    assert int(last[0]) == rows - 1
    row = result.accuracy_matrix[-1]
    assert [float(cell) for cell in last[1].split()] == pytest.approx([100 * row[j] for j in shown], abs=0.51)
    seen = row[: min(rows, columns)]
    assert float(last[2]) == pytest.approx(100 * sum(seen) / len(seen), abs=0.051)


@pytest.mark.parametrize("count", [1, 2, 5, 14, 15, 16, 21, 22, 23, 40, 99, 101])
def test_no_line_is_wider_than_a_hundred_columns(count):
    widths = {len(line) for line in accuracy_table(make(count, count)).splitlines()}
    assert max(widths) <= 100
    assert "one in" not in accuracy_table(make(count, count)) or count > 20


def test_the_summary_has_every_metric_in_percent():
    lines = dict(re.split(r"  +", line.strip(), maxsplit=1) for line in summary(make(macs=None)).splitlines())
    assert lines == {
        "run": "quickstart, seed 0",
        "strategy": "er + lwf on digits, small_cnn",
        "final average accuracy": "93.0 %",
        "task-aware": "100.0 %",
        "weighted by samples": "93.0 %",
        "average incremental accuracy": "96.5 %",
        "learning accuracy": "100.0 %",
        "forgetting": "10.5 %",
        "backward transfer": "-10.5 %",
        "forward transfer": "undefined: accuracy at random initialization was not evaluated",
        "parameters": "1,234,567",
        "MACs per sample": "not counted",
        "training": "12.3 s, 1,200 steps",
        "state": "er 12.5 KiB, lwf 3.0 MiB",
        "run folder": "runs/quickstart/1",
    }


def test_the_summary_counts_macs_and_has_no_negative_zero():
    text = summary(dataclasses.replace(make(state_bytes={}), backward_transfer=-1e-9))
    assert re.search(r"MACs per sample +7,654,321\n", text)
    assert re.search(r"backward transfer +0\.0 %\n", text)
    assert re.search(r"state +none\n", text)


def test_long_texts_wrap_but_a_path_stays_whole():
    path = "/" + "long/" * 40
    text = summary(make(strategy=" + ".join(f"component{k}(option={k})" for k in range(9)), run_folder=path))
    *lines, last = text.splitlines()
    assert max(len(line) for line in lines) <= 100
    assert last.endswith(path)
    assert "component8(option=8)" in text


def seeds(strategy, finals, **changes):
    return [
        dataclasses.replace(make(strategy=strategy, **changes), seed=s, final_average_accuracy=final)
        for s, final in enumerate(finals)
    ]


def test_seeds_table_has_a_row_for_each_strategy():
    text = seeds_table([*seeds("er + lwf", [0.9, 0.96, 0.96]), *seeds("naive", [0.2])])
    assert text.splitlines()[1:] == [
        "          seeds       final   task-aware  incremental  forgetting     backward",
        "er + lwf      3  94.0 ± 3.5  100.0 ± 0.0   96.5 ± 0.0  10.5 ± 0.0  -10.5 ± 0.0",
        "naive         1        20.0        100.0         96.5        10.5        -10.5",
    ]


def test_seeds_table_marks_what_is_undefined():
    row = seeds_table([make(1, 1)]).splitlines()[-1]
    assert row.split() == ["er", "+", "lwf", "1", "100.0", "100.0", "100.0", "-", "-"]


def test_seeds_table_names_the_benchmark_where_it_differs():
    text = seeds_table([*seeds("er", [0.5]), *seeds("er", [0.5], benchmark="mnist")])
    assert [line.split("  ")[0] for line in text.splitlines()[2:]] == ["er, digits", "er, mnist"]


def test_seeds_table_with_a_long_strategy_stays_within_a_hundred_columns():
    text = seeds_table(seeds(" + ".join(f"component{k}(option={k})" for k in range(9)), [0.123, 0.99, 0.5]))
    assert max(len(line) for line in text.splitlines()) <= 100
    assert "component8(option=8)" in text


def test_seeds_table_refuses_nothing_and_a_seed_twice():
    with pytest.raises(ClframeError, match="no results"):
        seeds_table([])
    with pytest.raises(ClframeError, match="a seed is there twice"):
        seeds_table([make(), make()])
