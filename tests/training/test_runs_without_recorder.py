"""A run has the same weights and states with and without its cost recorder, and a resumed run the same ledger."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_sessions import run, session

from clframe.accounting import Ledger
from clframe.data.avalanche import import_avalanche

import_avalanche()

from lightning import Fabric

from clframe.training.observer import StepObserver

EXPRESSIONS = [
    "naive", "er(memory=12)", "er(memory=12) + lwf", "ewc", "si", "der(memory=12)", "agem(memory=12)", "ancl",
    "bic(memory=12)", "gdumb(memory=12)", "slda", "exits", "prd", "exits + early_exit(threshold=0.5)", "sparsity",
]  # fmt: skip


HALF: Any = {"precision": "bf16-mixed"}


@pytest.mark.parametrize(
    ("expression", "options"),
    [
        *(pytest.param(expression, {}, marks=[pytest.mark.slow] * (i % 2)) for i, expression in enumerate(EXPRESSIONS)),
        ("er(memory=12) + lwf", {"engine": "trainer"}),
        ("ewc", {"engine": "trainer"}),
        ("er(memory=12) + lwf", {"accumulate": 2}),
        ("er(memory=12) + lwf", {"accumulate": 2, "fabric": HALF}),
        ("exits + si", {"engine": "trainer", "fabric": HALF}),
    ],
)
def test_a_run_is_the_same_with_and_without_accounts(expression: str, options: Any, tmp_path: Path) -> None:
    """Weights and states bit for bit, so no random state, statistic or memory has been touched."""
    (tmp_path / "with").mkdir()
    (tmp_path / "without").mkdir()
    kept = run(expression, tmp_path / "with", **launched(options))
    bare = session(expression, tmp_path / "without", **launched(options))
    costs = bare._costs
    bare.strategy.plugins.remove(costs)
    costs.begin = costs.finish = lambda *_, **__: None  # type: ignore[method-assign]
    bare.learner.observer = StepObserver()
    bare.run()
    bare.close()
    one, other = (
        torch.load(tmp_path / name / "checkpoints" / "experience_003.ckpt", weights_only=True)
        for name in ("with", "without")
    )
    assert kept.ledger.macs > 0 and bare.ledger.macs == 0
    for key in ("network", "components", "tallies", "loss_terms", "steps", "taps"):
        assert_equal(one[key], other[key])


def launched(options: Any) -> Any:
    if "fabric" not in options:
        return options
    fabric = Fabric(accelerator="cpu", devices=1, **options["fabric"])
    fabric.launch()
    return {**options, "fabric": fabric}


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_equal(left, right)
    else:
        assert one == other


def test_a_resumed_run_keeps_its_books(tmp_path: Path) -> None:
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole = run("er(memory=12) + lwf", tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "broken", dirs_exist_ok=True)
    (tmp_path / "broken" / "checkpoints" / "experience_003.ckpt").unlink()
    again = session("er(memory=12) + lwf", tmp_path / "broken")
    assert again.resume() == 2 and again.ledger.macs < whole.ledger.macs
    again.run()
    again.close()
    assert again.ledger.entries == whole.ledger.entries
    assert Ledger.from_json(again.ledger.to_json()).entries == whole.ledger.entries
    assert comparable(again.ledger) == comparable(whole.ledger)
    sizes, resumed_sizes = (
        [row["bytes"] for row in ledger.as_tree()["bytes"] if row["kind"] == "checkpoint"]
        for ledger in (whole.ledger, again.ledger)
    )
    assert sizes[:2] == resumed_sizes[:2] and len(sizes) == len(resumed_sizes) == 3
    finished = session("er(memory=12) + lwf", tmp_path / "whole")
    assert finished.resume() == 3
    finished.run()
    finished.close()
    assert finished.ledger.to_json() == whole.ledger.to_json()


def comparable(ledger: Ledger) -> Any:
    """The ledger without wall times, energy and the peak of a process, which no two runs share."""
    tree = ledger.as_tree()
    tree["times"] = [{**row, "seconds": 0} for row in tree["times"]]
    # The size of a checkpoint depends on these as well: the ledger in it is written with them.
    tree["bytes"] = [
        {**row, "bytes": row["bytes"] if row["kind"] not in ("process_peak", "checkpoint") else 0} for row in tree["bytes"]
    ]
    tree["energy"] = [{**row, "joules": 0} for row in tree["energy"]]
    return tree
