"""Cells of the tables: each is run once, in a process to itself or one after the other, and failures are told at the end."""

from __future__ import annotations

import os

import pytest
from cell_jobs import Job, done, run
from cells import run_cells


@pytest.mark.parametrize("shared", [False, True])
def test_every_cell_has_a_process_to_itself_unless_they_are_shared(tmp_path, shared):
    (tmp_path / "first").write_text("1")
    jobs = [Job("second"), Job("first"), Job("third")]
    found = list(run_cells(jobs, tmp_path, workers=1, run=run, done=done, share_processes=shared))
    assert found[0] == (jobs[1], tmp_path / "first"), "finished ones first"
    assert {job.label: path for job, path in found} == {job.label: tmp_path / job.label for job in jobs}
    assert (tmp_path / "first").read_text() == "1", "not run again"
    second, third = (int((tmp_path / label).read_text()) for label in ("second", "third"))
    assert os.getpid() not in (second, third)
    assert (second == third) == shared


def test_cells_that_fail_leave_the_others_and_are_named_at_the_end(tmp_path, capsys):
    jobs = [Job("killed"), Job("good", seed=1), Job("wrong", seed=2)]
    found = []
    with pytest.raises(SystemExit) as error:
        found.extend(run_cells(jobs, tmp_path, workers=1, run=run, done=done))
    assert found == [(jobs[1], tmp_path / "good")]
    first, *failed = str(error.value).splitlines()
    assert first == "cells failed, call again to go on:"
    assert sorted(line.split(":")[0] for line in failed) == ["killed, seed 0", "wrong, seed 2"]
    assert "wrong, seed 2: no such data" in failed
    assert capsys.readouterr().err.count("failed: ") == 2
