"""Hyper-parameters are chosen on validation data, and only then test seeds run."""

from __future__ import annotations

import json
from functools import partial

import pytest

from clframe.errors import ClframeError, ConfigError, DivergenceError
from clframe.report.loading import find_runs
from clframe.sweep.driver import run_cells
from clframe.sweep.selection import select, test_cells
from clframe.sweep.space import Range, Selection

test_cells.__test__ = False  # its name, not a test
HELD = {"benchmark.validation": ("0.1",)}
LR = ("0.001", "0.01", "0.1")
"""Candidates; loading their configs takes most of the time of these tests."""


def selection(**changes):
    return Selection(**{"over": {"optimizer.lr": LR}, "seeds": (100, 101), **changes})


def train_with(launcher, **options):
    return partial(run_cells, launcher=launcher, **options)


def rate(cell):
    return float(cell.config.optimizer.lr)


def test_the_best_mean_over_selection_seeds_is_tested(small, recorder, tmp_path):
    best = {"naive": 0.01, "er": 0.1}

    def accuracy(cell):  # seed 101 alone prefers the other value
        assert cell.config.benchmark.evaluate == ("validation" if cell.stage == "selection" else "test")
        favorite = 0.5 if rate(cell) == best[cell.config.strategy] else 0.4
        return favorite + (0.15 if cell.seed == 101 and rate(cell) != best[cell.config.strategy] else 0.0)

    launcher = recorder(accuracy)
    space = small(grid={"strategy": ("naive", "er"), **HELD}, seeds=(0, 1), select=selection(over={"optimizer.lr": LR[1:]}))
    choices = select(tmp_path, space, train_with(launcher))
    assert len(launcher.launched) == 2 * 2 * 2 and {cell.seed for cell in launcher.launched} == {100, 101}
    assert [choice.best.chosen for choice in choices] == [{"optimizer.lr": "0.01"}, {"optimizer.lr": "0.1"}]
    assert [c.value for c in choices[0].candidates] == pytest.approx([0.5, 0.475])
    cells = test_cells(tmp_path, space, choices)
    assert [(c.config.strategy, c.seed, rate(c), c.stage) for c in cells] == [
        ("naive", 0, 0.01, "test"), ("naive", 1, 0.01, "test"), ("er", 0, 0.1, "test"), ("er", 1, 0.1, "test"),
    ]  # fmt: skip
    written = json.loads((tmp_path / "selection.json").read_text())
    assert written["data"] == "validation" and written["seeds"] == [100, 101]
    assert [c["chosen"] for c in written["choices"]] == [{"optimizer.lr": "0.01"}, {"optimizer.lr": "0.1"}]
    run_cells(cells, launcher)
    _, found = find_runs([tmp_path])  # a report of the sweep shows test runs only
    assert sorted(found) == sorted(cell.folder for cell in cells)
    assert len(find_runs([tmp_path / "selection"])[1]) == 8
    select(tmp_path, space, train_with(launcher))
    assert len(launcher.launched) == 8 + 4  # nothing is trained again


def test_of_a_metric_that_is_better_when_lower_the_lowest_is_chosen(small, recorder, tmp_path):
    space = small(grid=HELD, select=selection(seeds=(7,), metric="forgetting"))
    (choice,) = select(tmp_path, space, train_with(recorder(rate)))
    assert [c.value for c in choice.candidates] == [0.0, 0.0, 0.0] and choice.best is choice.candidates[0]


def test_values_that_diverge_are_not_chosen(small, recorder, tmp_path):
    def accuracy(cell):
        if rate(cell) > limit:
            raise DivergenceError("loss: is NaN; lower the rate")
        return rate(cell)

    limit = 0.05
    space = small(grid=HELD, select=selection(seeds=(7,)))
    (choice,) = select(tmp_path, space, train_with(recorder(accuracy)))
    assert choice.best.chosen == {"optimizer.lr": "0.01"}
    assert choice.candidates[2].reason == "seed 7 diverged"
    limit = 0.0
    with pytest.raises(ClframeError, match=r"^select: no candidate of .* has a number \(seed 8 diverged\); give other values$"):
        select(tmp_path, small(grid=HELD, select=selection(seeds=(8,))), train_with(recorder(accuracy)))


def test_another_failure_stops_before_test_seeds(small, recorder, tmp_path):
    def accuracy(cell):
        if rate(cell) == 0.01:
            raise ClframeError("memory: is full; free some")
        return 0.5

    launcher = recorder(accuracy)
    space = small(grid=HELD, select=selection(seeds=(7,)))
    with pytest.raises(ClframeError, match=r"^select: .*seed 7 failed \(memory: is full; free some\) and nothing was chosen"):
        select(tmp_path, space, train_with(launcher))
    assert not (tmp_path / "selection.json").exists()
    launcher.accuracy = lambda cell: 0.9
    (choice,) = select(tmp_path, space, train_with(launcher, retry=True))
    assert choice.best.chosen == {"optimizer.lr": "0.01"} and len(launcher.launched) == 4


def test_without_validation_data_it_is_refused(small, recorder, tmp_path):
    launcher = recorder()
    with pytest.raises(ConfigError, match=r"^select: found benchmark\.validation 0\.0, .*; hold data out"):
        select(tmp_path / "s", small(select=selection()), train_with(launcher))
    evaluate = {**HELD, "benchmark.evaluate": ("validation",)}
    with pytest.raises(ConfigError, match=r"^benchmark\.evaluate: found validation, which would never show test data"):
        select(tmp_path / "s", small(grid=evaluate, select=selection()), train_with(launcher))
    with pytest.raises(ConfigError, match=r"^components\.er\.memory: found options of er, which no cell's strategy has"):
        over = {"components.er.memory": ("1", "2")}
        select(tmp_path / "s", small(grid={"strategy": ("naive",), **HELD}, select=selection(over=over)), train_with(launcher))
    assert not (tmp_path / "s").exists() and not launcher.launched


def test_optuna_draws_candidates_and_continues(small, recorder, tmp_path):
    pytest.importorskip("optuna")

    def accuracy(cell):
        if len(launcher.launched) == stop_after:
            raise KeyboardInterrupt
        return 1 - abs(rate(cell) - 0.02)

    over = {"optimizer.lr": Range(low=0.001, high=0.1, log=True), "trainer.batch_size": Range(low=8, high=32, step=8)}
    space = small(grid=HELD, select=selection(over=over, seeds=(7,), sampler="optuna", trials=4))
    stop_after, launcher = 3, recorder(accuracy)
    with pytest.raises(KeyboardInterrupt):
        select(tmp_path, space, train_with(launcher), jobs=2)
    interrupted = launcher.launched[-1]
    stop_after = -1
    (choice,) = select(tmp_path, space, train_with(launcher), jobs=2)
    assert len(choice.candidates) == 4 and len({cell.key for cell in launcher.launched}) == 4
    assert [cell.key for cell in launcher.launched].count(interrupted.key) == 2  # drawn again, and trained
    assert choice.best.value == max(candidate.value for candidate in choice.candidates)
    for candidate in choice.candidates:
        assert 0.001 <= float(candidate.chosen["optimizer.lr"]) <= 0.1
        assert candidate.chosen["trainer.batch_size"] in ("8", "16", "24", "32")
    before = len(launcher.launched)
    (again,) = select(tmp_path, space, train_with(launcher), jobs=2)
    assert again.best == choice.best and len(launcher.launched) == before
