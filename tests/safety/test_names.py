"""Names with control characters, markup and formulas are shown as text, in every output."""

from __future__ import annotations

import csv
import io
import json
from html.parser import HTMLParser

import pytest
import torch
import yaml

from clframe.cli.run import print_tables
from clframe.plotting.style import RenderedPicture
from clframe.printable import PrintableStream, csv_cell, printable
from clframe.report import content, write_report
from clframe.results import Result
from clframe.tables import Quantity, Table, to_csv, to_latex, to_markdown, to_text
from clframe.training.run_log import RunLog

HOSTILE = '=1+1\x1b]0;title\x07\x1b[2J\x9b31m<script>alert(1)</script>"|$x_{y}\\end{table}\u202e`\n\r# '
UNSAFE = ("\x1b", "\x07", "\x9b", "\u202e", "\r")


@pytest.mark.parametrize(
    "text, shown",
    [
        ("cat", "cat"),
        ("\x1b[31mred\x1b[0m", "\\u001b[31mred\\u001b[0m"),
        ("a\tb\nc", "a\\u0009b\\u000ac"),
        ("\x7f\x85\x9b", "\\u007f\\u0085\\u009b"),
        ("abc\u202etxt.exe", "abc\\u202etxt.exe"),
        ("\ud800", "\\ud800"),
        ("Straße 犬\u3000👩\u200d🔬", "Straße 犬\u3000👩\u200d🔬"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize(
    "text, cell",
    [
        ("=A1", "'=A1"), ("+A1", "'+A1"), ("-A1", "'-A1"), ("@A1", "'@A1"), (" =A1", "' =A1"), ("\t=A1", "'\\u0009=A1"),
        ("\uff1dA1", "'\uff1dA1"), ("-1.5", "-1.5"), ("+2e-3", "+2e-3"), ("-inf", "-inf"), ("-1+1", "'-1+1"),
        ("cat", "cat"), ("-", "-"),
        ("a=b", "a=b"), ("", ""),
    ],
)  # fmt: skip
def test_csv_cell(text, cell):
    assert csv_cell(text) == cell


@pytest.mark.parametrize("render", [to_text, to_csv, to_markdown, to_latex])
def test_tables(render):
    table = Table(name="t", title=HOSTILE, note=HOSTILE, columns=(HOSTILE, "b"), rows=((HOSTILE, Quantity(0.5)),))
    text = render(table)
    assert not any(mark in text for mark in UNSAFE)
    if render is to_csv:
        rows = list(csv.reader(io.StringIO(text)))
        assert [len(row) for row in rows] == [2, 2] and all(row[0].startswith("'=1+1") for row in rows)
    if render is to_latex:
        assert "\\end{table}" in text and text.count("\\end{table}") == 1
    if render is to_markdown:
        assert "<script>" not in text and "\n#" not in text


def test_a_stream_writes_printable_text():
    target = io.StringIO()
    print("\x1b[2Jcat", "dog\n", file=PrintableStream(target))  # type: ignore[call-overload]
    assert target.getvalue() == "\\u001b[2Jcat dog\n\n"


def test_the_log_of_a_run(tmp_path):
    log = RunLog(tmp_path, experiences=1)
    log.note(f"{HOSTILE}\nnext")
    text = (tmp_path / "log.txt").read_text()
    assert text.count("\n") == 1 and not any(mark in text for mark in UNSAFE)


class Elements(HTMLParser):
    """Names of the elements of a page, and of their attributes."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}


@pytest.fixture
def hostile(run):
    """The run with hostile names wherever its files have names."""
    file = run / "results.json"
    found = json.loads(file.read_text())
    found |= {name: HOSTILE for name in ("name", "strategy", "benchmark", "backbone")}
    found["class_names"] = [f"{HOSTILE}{c}" for c in range(10)]
    found["exit_names"] = [f"{HOSTILE}{name}" for name in found["exit_names"]]
    found["loss_terms"] = [{HOSTILE: 0.5} for _ in found["loss_terms"]]
    found["state_bytes"] = {HOSTILE: 3}
    found["versions"] = {HOSTILE: HOSTILE}
    found["undefined"] = dict.fromkeys(found["metrics"], HOSTILE)
    found["metrics"][HOSTILE] = 0.5
    file.write_text(json.dumps(found))
    (run / "environment.json").write_text(
        json.dumps({"command": ["clframe", HOSTILE], "git_revision": HOSTILE, "machine": {HOSTILE: HOSTILE}})
    )
    ledger = json.loads((run / "ledger.json").read_text())
    ledger["inference_macs"] = {HOSTILE: 750}
    ledger["totals"]["by_phase"] = {HOSTILE: 750}
    ledger["totals"]["uncounted"] = {HOSTILE: 2}
    (run / "ledger.json").write_text(json.dumps(ledger))
    row = io.StringIO()
    csv.writer(row).writerow([0, 1, HOSTILE, 0.5])
    with open(run / "metrics.csv", "a") as metrics:
        metrics.write(row.getvalue())
    return run


@pytest.mark.parametrize("figures", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_report(figures, hostile, tmp_path, monkeypatch):
    if not figures:
        blank = "<svg></svg>"
        monkeypatch.setattr(content, "render_picture", lambda p: RenderedPicture(p.name, p.caption, blank, blank, b""))
    page = write_report([hostile], output=tmp_path / "out")
    files = [path for path in page.parent.rglob("*") if path.suffix in (".html", ".csv", ".md", ".tex", ".svg")]
    assert len(files) > 10
    for path in files:
        text = path.read_text()
        assert not any(mark in text for mark in UNSAFE), path
        if path.suffix == ".csv":
            rows = csv.reader(io.StringIO(text))
            assert not any(cell.startswith("=") for row in rows for cell in row), path
        if path.suffix in (".html", ".svg", ".md"):
            assert "<script" not in text, path
    elements = Elements()
    elements.feed(page.read_text())
    assert not elements.names & {"script", "iframe", "object", "img"}
    assert not [name for name in elements.attributes if name.startswith("on")]


def test_the_summary_of_a_run(hostile, capsys, call):
    from clframe.cli import main, report  # the stream of every verb

    result = Result.from_json(hostile / "results.json")

    def act(options):
        print_tables(result)
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "act", act)
        code, out, _ = call("report", "run")
    assert code == 0 and main is not None
    assert "\\u001b[2J" in out and not any(mark in out for mark in UNSAFE)


@pytest.mark.parametrize(
    "words", [["report"], ["predict"], ["run", "--resume"], ["evaluate"], ["card"], ["export"], ["extend"]]
)
def test_an_error_about_a_path(words, here, call):
    code, out, err = call(*words, "\x1b[2Jnowhere\x9b\u202e", *(["x"] if words[0] in ("predict", "extend") else []))
    assert code == 2 and out == ""
    assert err.count("\n") == 1 and "\\u001b[2Jnowhere\\u009b\\u202e" in err
    assert not any(mark in err for mark in UNSAFE)


def test_predictions(run, call):
    for path in run.glob("checkpoints/*.ckpt"):
        saved = torch.load(path, weights_only=True)
        saved["data"]["class_names"] = [f"{HOSTILE}{c}" for c in range(10)]
        torch.save(saved, path)
    code, out, err = call("predict", "run", "inputs.npz", "--csv", "found.csv", "--json", "found.json")
    assert code == 0, err
    assert "\\u001b[2J" in out and not any(mark in out + err for mark in UNSAFE)
    rows = list(csv.DictReader(io.StringIO((run.parent / "found.csv").read_text())))
    assert len(rows) == 2 and all(row["class"].startswith("'=1+1\\u001b") for row in rows)
    found = json.loads((run.parent / "found.json").read_text())
    assert found["predictions"][0]["class"].startswith(HOSTILE)  # data, for programs


def test_a_model_card(run, call):
    file = run / "results.json"
    found = json.loads(file.read_text()) | {"name": HOSTILE, "strategy": HOSTILE, "benchmark": HOSTILE}
    file.write_text(json.dumps(found))
    code, _, err = call("card", "run", "--output", "card")
    assert code == 0, err
    text = (run.parent / "card" / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    assert yaml.safe_load(header)["library_name"] == "clframe"
    assert "<script" not in body and "&lt;script" in body and not any(mark in text for mark in UNSAFE)


def test_a_page_keeps_the_lines_of_a_config(run, tmp_path, monkeypatch):
    monkeypatch.setattr(
        content, "render_picture", lambda p: RenderedPicture(p.name, p.caption, "<svg></svg>", "<svg></svg>", b"")
    )
    page = write_report([run], output=tmp_path / "out")
    assert "\nseed: 0\n" in page.read_text()
