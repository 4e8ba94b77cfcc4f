"""A report that is written again while runs train."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack

import pytest
from report_page import Page

from clframe.report import write_report
from clframe.run_folder import RunFolder
from clframe.training.checkpoint import save_checkpoint


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
