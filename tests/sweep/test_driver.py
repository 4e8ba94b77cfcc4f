"""A sweep continues where it stopped."""

from __future__ import annotations

import pytest

from clframe.errors import ConfigError, DivergenceError
from clframe.sweep import driver
from clframe.sweep.driver import run_cells
from clframe.sweep.locks import claim
from clframe.sweep.plan import plan_cells


def grid(*strategies, **more):
    return {"strategy": strategies, **more}


def test_finished_cells_are_not_trained_again_and_new_values_are(small, recorder, tmp_path):
    launcher = recorder()
    cells = plan_cells(tmp_path, small(grid=grid("naive", "er"), seeds=(0, 1)))
    assert run_cells(cells, launcher) == {} and len(launcher.launched) == 4
    assert run_cells(cells, launcher) == {} and len(launcher.launched) == 4
    more = plan_cells(tmp_path, small(grid=grid("naive", "er", "lwf"), seeds=(0, 1, 2)))
    assert len(more) == 9 and run_cells(more, launcher) == {}
    assert {(c.config.strategy, c.seed) for c in launcher.launched[4:]} == {
        ("naive", 2), ("er", 2), ("lwf", 0), ("lwf", 1), ("lwf", 2),
    }  # fmt: skip


def test_a_failed_cell_is_listed_and_tried_again_on_request(small, recorder, tmp_path):
    def accuracy(cell):
        if cell.seed == 1:
            raise DivergenceError("loss: is NaN; lower it")
        return 0.5

    launcher = recorder(accuracy)
    cells = plan_cells(tmp_path, small(seeds=(0, 1, 2)))
    failed = run_cells(cells, launcher)
    assert failed == {cells[1].key: "loss: is NaN; lower it"} and len(launcher.launched) == 3
    assert run_cells(cells, launcher) == failed and len(launcher.launched) == 3
    assert run_cells(cells, launcher, retry=True) == failed and len(launcher.launched) == 4
    launcher.accuracy = lambda cell: 0.5
    assert run_cells(cells, launcher, retry=True) == {} and len(launcher.launched) == 5


def test_cells_of_another_process_are_left_to_it(small, recorder, tmp_path, monkeypatch):
    cells = plan_cells(tmp_path, small(seeds=(0, 1)))
    launcher, waited, names = recorder(), [], []
    with claim(tmp_path, cells[0].key) as mine:
        assert mine

        def sleep(seconds):  # the other process finishes while this one waits
            waited.append(seconds)
            recorder().launch([cells[0]])

        monkeypatch.setattr(driver.time, "sleep", sleep)
        assert run_cells(cells, launcher, on_waiting=names.append) == {}
    assert launcher.launched == [cells[1]] and len(waited) == 1 and names == [[cells[0]]]


def test_cells_of_another_process_that_dies_are_taken_over(small, recorder, tmp_path, monkeypatch):
    (cell,) = plan_cells(tmp_path, small())
    launcher = recorder()
    other = claim(tmp_path, cell.key)
    assert other.__enter__()
    monkeypatch.setattr(driver.time, "sleep", lambda seconds: other.__exit__(None, None, None))
    assert run_cells([cell], launcher) == {} and launcher.launched == [cell]


def test_a_cell_that_never_ends_is_given_up(small, tmp_path):
    class Nothing:
        count = 0

        def launch(self, cells):
            self.count += 1

    (cell,) = plan_cells(tmp_path, small())
    launcher = Nothing()
    assert run_cells([cell], launcher) == {cell.key: "it ended without results or a reason"}
    assert launcher.count == 3


def test_work_in_this_process(small, tmp_path):
    """One cell trained, finished and refused, without a launcher."""
    from clframe.sweep.work import run_cell

    fast = {"trainer.figures": ("none",), "trainer.loggers": ("[]",), "benchmark.classes": ("4",)}
    (cell,) = plan_cells(tmp_path, small(grid=fast))
    with claim(tmp_path, cell.key):
        assert run_cell(tmp_path, cell.key).state == "locked"
    assert run_cell(tmp_path, cell.key) == ("done", "", str(cell.folder)) and cell.finished()
    stamp = cell.results.stat().st_mtime_ns
    assert run_cell(tmp_path, cell.key).state == "done" and cell.results.stat().st_mtime_ns == stamp
    (bad,) = plan_cells(tmp_path, small(grid={**fast, "benchmark.experiences": ("3",), "benchmark.counts": ("[9, 9]",)}))
    outcome = run_cell(tmp_path, bad.key)
    assert outcome.state == "failed" and outcome.reason and "\n" not in outcome.reason
    assert run_cells([bad], None) == {bad.key: outcome.reason}  # nothing is launched


def test_nothing_is_planned_for_an_unknown_config(small, tmp_path):
    with pytest.raises(ConfigError, match="unknown key"):
        plan_cells(tmp_path / "s", small(grid={"trainer.epoch": ("3",)}))
