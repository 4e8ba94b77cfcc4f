"""The same table three times: exact in CSV, readable in Markdown and LaTeX, nothing that breaks either."""

from __future__ import annotations

import csv
import io

from clframe.tables import Quantity, Table, over_seeds, to_csv, to_latex, to_markdown, to_text

NAN = float("nan")
TABLE = Table(
    name="t", title="A_b & <c>", note="50 %", columns=("group", "accuracy, %", "MACs"),
    rows=(
        ("er | lwf_2", Quantity(0.123456, deviation=0.01), Quantity(1234567, kind="whole")),
        ("x", Quantity(NAN, undefined="one, not two"), Quantity(2, kind="whole")),
    ),
)  # fmt: skip


def test_csv_keeps_every_digit():
    rows = list(csv.reader(io.StringIO(to_csv(TABLE))))
    assert rows == [
        ["group", "accuracy", "accuracy: deviation", "MACs"],
        ["er | lwf_2", "0.123456", "0.01", "1234567.0"],
        ["x", "undefined: one, not two", "", "2.0"],
    ]


def test_csv_labels_rows_without_the_unit_of_the_text():
    rows = ("accuracy, %", Quantity(0.5)), ("gain, points", Quantity(0.25)), ("steps", "b, %")
    table = Table(name="t", title="", columns=("metric", "value"), rows=rows)
    assert to_csv(table).splitlines() == ["metric,value", "accuracy,0.5", "gain,0.25", 'steps,"b, %"']


def test_markdown():
    lines = to_markdown(TABLE).splitlines()
    assert lines[0] == r"**A\_b &amp; &lt;c&gt;**"
    assert lines[4:] == [
        "| group | accuracy, % | MACs |",
        "|---|---:|---:|",
        r"| er \| lwf\_2 | 12.3 ± 1.0 | 1,234,567 |",
        "| x | undefined: one, not two | 2 |",
    ]


def test_latex():
    text = to_latex(TABLE)
    assert r"\caption{A\_b \& $<$c$>$. 50 \%.}" in text
    assert r"\begin{tabular}{lrr}" in text
    assert r"er | lwf\_2 & 12.3 $\pm$ 1.0 & 1,234,567 \\" in text


def test_text():
    assert to_text(TABLE).splitlines() == [
        "A_b & <c>",
        "50 %",
        "group       accuracy, %       MACs",
        "----------------------------------",
        "er | lwf_2   12.3 ± 1.0  1,234,567",
        "x                     -          2",
        "-: one, not two",
    ]


def test_text_wraps_headings_then_splits_columns_and_repeats_the_first():
    columns = ("exit", *(f"a rather long heading {n}, %" for n in range(12)))
    table = Table(name="t", title="T", columns=columns, rows=(("first", *(Quantity(n / 100) for n in range(12))),))
    lines = to_text(table, width=60).splitlines()
    assert max(map(len, lines)) <= 60
    rows = [line.split() for line in lines if line.startswith("first")]
    assert len(rows) > 1  # blocks
    assert [float(cell) for row in rows for cell in row[1:]] == [float(n) for n in range(12)]
    headings = " ".join(line for line in lines if not line.startswith("first"))
    assert all(f" {n}, %" in headings or f"{n}," in headings for n in range(12))


def test_text_wraps_a_long_first_column():
    table = Table(name="t", title="T", columns=("", "x, %"), rows=(("word " * 30, Quantity(0.5)),))
    first, *more = to_text(table, width=40).splitlines()[3:]
    assert first.endswith("50.0") and len(first) <= 40
    assert " ".join([first.removesuffix("50.0"), *more]).split() == ["word"] * 30


def test_how_numbers_are_shown():
    assert str(Quantity(-0.0004)) == "0.0"
    assert str(Quantity(0.011, kind="points")) == "+1.1" and str(Quantity(-0.011, kind="points")) == "-1.1"
    assert str(Quantity(12.34, kind="decimal", deviation=0.0)) == "12.3 ± 0.0"
    assert str(Quantity(5, kind="whole", deviation=0.0)) == "5"
    assert str(Quantity(float("inf"))) == "infinite"
    assert str(over_seeds({3: 0.25})) == "25.0"
    assert str(over_seeds({0: 0.5, 1: 0.75})) == "62.5 ± 17.7"  # 0.25 / sqrt(2)
