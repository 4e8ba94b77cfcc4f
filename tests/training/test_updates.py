"""Optimizer steps and batches of a run are two numbers, and every output has the right one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from power_cuts import TINY, assert_same_run, cut_run, without_pictures
from torch.optim.optimizer import register_optimizer_step_post_hook

import clframe
from clframe.accounting import Ledger
from clframe.report.loading import load_run
from clframe.report.terminal import summary_text
from clframe.results import Result


@pytest.fixture
def updates():
    """The optimizers of the updates made so far."""
    made: list[object] = []
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: made.append(optimizer))
    patch = without_pictures()
    yield made
    patch.undo()
    handle.remove()


@pytest.mark.parametrize("engine", ["fabric", pytest.param("trainer", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")  # Lightning's own
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_steps_are_the_calls_of_the_optimizer(updates, engine, tmp_path):
    """9 batches an epoch: updates after 4 and 8 of them, and one from the last."""
    options = [*TINY, "strategy=er(memory=20)", "trainer.accumulate=4", f"trainer.engine={engine}"]
    result = clframe.run("quickstart", options, output=tmp_path)
    assert len(updates) == result.steps == 2 * 2 * 3 and result.batches == 2 * 2 * 9
    folder = Path(result.run_folder)
    costs = json.loads((folder / "ledger.json").read_text())
    assert (costs["training"]["steps"], costs["training"]["batches"]) == (12, 36)
    ledger = load_run(folder).ledger
    assert ledger is not None and [ledger.steps(experience=index) for index in (None, 0, 1)] == [12, 6, 6]
    assert " s, 12 optimizer steps on 36 batches\n" in summary_text(result)
    assert max(row.step for row in load_run(folder).logged) == 36
    assert "; 36 batches so far; " in (folder / "log.txt").read_text()


def test_skipped_updates_are_no_steps_and_a_resumed_run_counts_the_same(updates, tmp_path):
    options = [*TINY, "strategy=er(memory=20)", "optimizer={name: sgd, lr: 1e6}", "trainer.on_nonfinite=skip"]
    folder, copies = cut_run(options, tmp_path, cuts=1)
    result = Result.from_json(folder / "results.json")
    assert 0 < len(updates) == result.steps == 36 - sum(result.skipped_updates) < result.batches == 36
    assert Ledger.of(json.loads((folder / "ledger.json").read_text())["ledger"]).steps() == result.steps
    assert "; no finite loss; 36 batches so far; 18 of 18 updates skipped" in (folder / "log.txt").read_text()
    for _, copied in copies:
        clframe.run(resume=copied)
        assert_same_run(folder, copied)
