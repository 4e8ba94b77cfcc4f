"""Every component runs where weights are stored in another type than 32 bit."""

from __future__ import annotations

import pytest

import clframe
from clframe.core import COMPONENTS

FAST = ["backbone=mlp", "backbone.width=12", "trainer.epochs=1", "benchmark.experiences=2", "benchmark.classes=4",
        "benchmark.validation=0.2", "trainer.progress=false", "trainer.loggers=[]", "trainer.accelerator=cpu",
        "trainer.fast_dev_run=true"]  # fmt: skip


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
@pytest.mark.parametrize("name", [name for name in COMPONENTS.names() if name != "l2p"])
def test_it_runs_in_that_precision(name, precision, tmp_path):
    strategy = f"{name} + er" if COMPONENTS.get(name).needs_memory else name
    if name == "early_exit":
        strategy = "exits + early_exit(budget=0.9)"
    result = clframe.run("quickstart", [*FAST, f"strategy={strategy}", f"trainer.precision={precision}"], output=tmp_path)
    assert len(result.accuracy_matrix) == 2
