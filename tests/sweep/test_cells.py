"""Names of cells: one digest for one config, however it is written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from clframe.config.load import load_config
from clframe.errors import ConfigError, ConfigErrors, RunFolderError
from clframe.sweep.cells import cell_keys, digest, label_cells, make_cell, read_attempts, read_cell, record_attempt
from clframe.sweep.plan import plan_cells

BASE = ["backbone=mlp", "strategy=er + lwf", "components.er.memory=50"]


@pytest.mark.parametrize(
    "changes",
    [
        ["seed=4"], ["output=elsewhere"], ["trainer.figures=none"], ["trainer.loggers=[]"], ["benchmark.workers=0"],
        ["strategy=lwf + er"], ["strategy=er(memory=50)+lwf"], ["components.lwf.temperature=2.0"],
        ["trainer.gradient_clip=null"], ["optimizer.lr=2e-3"], ["components.ewc.lambda_=3"], ["optimizer.momentum=0"],
    ],
)  # fmt: skip
def test_what_changes_no_result_changes_no_digest(changes):
    assert digest(load_config("quickstart", [*BASE, *changes])) == digest(load_config("quickstart", BASE))


def test_everything_else_does():
    changes = ["optimizer.lr=0.1", "trainer.epochs=3", "components.er.memory=51", "strategy=er", "backbone.width=5",
               "benchmark.classes=5", "benchmark.evaluate=validation", "trainer.threads=2", "name=other",
               "components.avalanche.plugins=[LwFPlugin]", "strategy=er + lwf + exits"]  # fmt: skip
    configs = [load_config("quickstart", [*BASE, "benchmark.validation=0.1", change]) for change in changes]
    assert len({digest(config) for config in configs}) == len(changes)


def test_a_cell_is_recorded_once(tmp_path):
    config = load_config("quickstart", [*BASE, "seed=3"])
    cell = make_cell(tmp_path, config, values=["lr0.1", "at[1, 2]"])
    assert cell.name == f"er+lwf-lr0.1-at_1_2_-{digest(config)}-seed3" and cell.folder == tmp_path / cell.name
    again = make_cell(tmp_path, config, values=["other"])
    assert again == cell and cell_keys(tmp_path) == [cell.key]
    assert replace(cell.config, output="runs") == config
    other = make_cell(tmp_path, load_config("quickstart", BASE), stage="selection")
    assert other.folder.parent == tmp_path / "selection" and len(cell_keys(tmp_path)) == 2


def test_a_record_of_other_defaults_is_refused(tmp_path):
    config = load_config("quickstart", BASE)
    cell = make_cell(tmp_path, config)
    path = tmp_path / ".sweep" / "cells" / f"{cell.key}.json"
    record = json.loads(path.read_text())
    record["config"]["trainer"]["log_every"] = 7  # changes no result
    path.write_text(json.dumps(record))
    cell.folder.mkdir()
    assert make_cell(tmp_path, config).config.trainer.log_every == 7  # the run has begun with it
    cell.folder.rmdir()
    again = make_cell(tmp_path, config, values=["other"])
    assert again.config.trainer.log_every == 20 and again.name == cell.name
    record["config"]["trainer"]["drop_last"] = True
    path.write_text(json.dumps(record))
    with pytest.raises(RunFolderError, match="was recorded by a version of clframe with other defaults; give another"):
        make_cell(tmp_path, config)
    for damage in ("{", "[]", '{"name": "../x", "stage": "test", "config": {}}'):
        path.write_text(damage)
        with pytest.raises(RunFolderError, match=r"is not the record of a cell \(.*\); delete it and start again$"):
            read_cell(tmp_path, cell.key)


def test_attempts_add_up(tmp_path):
    record_attempt(tmp_path, "k", seconds=2.0, failed="a: b; c", diverged=True)
    found = read_attempts(tmp_path, "k")
    assert (found.count, found.seconds, found.failed, found.diverged) == (1, 2.0, "a: b; c", True)
    record_attempt(tmp_path, "k", seconds=3.0)
    found = read_attempts(tmp_path, "k")
    assert (found.count, found.seconds, found.failed, found.diverged) == (2, 5.0, "", False)


def test_labels_show_what_differs(tmp_path):
    overrides = [["strategy=er + exits", "optimizer.lr=0.1"], ["strategy=lwf"], ["strategy=lwf", "components.lwf.alpha=2"]]
    cells = [make_cell(tmp_path, load_config("quickstart", ["backbone=mlp", *each])) for each in overrides]
    labels = [cell.label for cell in label_cells(cells)]
    assert labels == ["er + exits, lr 0.1", "lwf, lr 0.002, alpha 1.0", "lwf, lr 0.002, alpha 2.0"]
    assert [cell.label for cell in label_cells(cells[:1])] == ["er + exits"]


def test_equal_combinations_are_one_cell(small, tmp_path):
    cells = plan_cells(tmp_path, small(grid={"strategy": ("naive", "er"), "components.er.memory": ("50", "60")}, seeds=(0, 1)))
    assert [(cell.label, cell.seed) for cell in cells] == [
        ("naive", 0), ("naive", 1), ("er, memory 50", 0), ("er, memory 50", 1), ("er, memory 60", 0), ("er, memory 60", 1),
    ]  # fmt: skip
    assert cells == plan_cells(tmp_path, small(grid={"strategy": ("naive", "er"), "components.er.memory": ("50", "60")}, seeds=(0, 1)))


def test_all_configs_are_checked_before_anything_is_written(small, tmp_path):
    folder = tmp_path / "sweep"
    with pytest.raises(ConfigErrors) as refused:
        plan_cells(folder, small(grid={"strategy": ("er", "er + joint"), "optimizer.lr": ("0.1", "fast")}))
    assert sorted(map(str, refused.value.problems)) == [
        "optimizer.lr: found 'fast' (text); give a number or a mapping",
        "strategy: 'er' and 'joint' both own the slot 'batch'; keep one of them",
    ]
    with pytest.raises(ConfigError, match=r"^trainer\.log_every: found 2 values that make no difference to any cell"):
        plan_cells(folder, small(grid={"strategy": ("naive", "lwf"), "trainer.log_every": ("1", "2")}))
    with pytest.raises(ConfigError, match=r"^components\.er\.memory: found options of er, which no cell's strategy has; add it"):
        plan_cells(folder, small(grid={"strategy": ("naive", "lwf"), "components.er.memory": ("1",)}))
    with pytest.raises(ConfigError, match=r"^output: found x, but cells are in the folder of the sweep; leave it out$"):
        plan_cells(folder, small(grid={"output": ("x",)}))
    with pytest.raises(ConfigError, match=r"^trainer\.fast_dev_run: found a development run"):
        plan_cells(folder, small(grid={"trainer.fast_dev_run": ("true",)}))
    assert not folder.exists()


def test_values_that_a_strategy_replaces_are_one_cell(small, tmp_path):
    """Other keys of such cells are not taken for keys without an effect."""
    grid = {"strategy": ("naive", "er"), "trainer.memory.bytes": ("16000", "32000"), "trainer.epochs": ("3",)}
    cells = plan_cells(tmp_path, small(grid=grid, strategies={"naive": {"trainer.memory.bytes": ("null",)}}))
    assert [cell.label for cell in cells] == ["naive, bytes null", "er, bytes 16000.0", "er, bytes 32000.0"]
