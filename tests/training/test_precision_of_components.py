"""Every component runs where weights are stored in another type than 32 bit."""

from __future__ import annotations

import pytest

import clframe
from clframe.core import COMPONENTS

FAST = ["backbone=mlp", "backbone.width=12", "trainer.epochs=1", "benchmark.experiences=2", "benchmark.classes=4",
        "benchmark.validation=0.2", "trainer.progress=false", "trainer.loggers=[]", "trainer.accelerator=cpu",
        "trainer.fast_dev_run=2"]  # fmt: skip


TRANSFORMER = ["backbone=vit_tiny", "backbone.width=8", "backbone.depth=1", "backbone.patch=4", "backbone.heads=2"]
NAMES = [name for name in COMPONENTS.names() if name != "l2p"]
IN_16_BITS = NAMES[::2]
ALSO_IN_64_BITS = ("naive", "er", "exits")
"""Of the default suite; the slow one runs all, and tests/golden trains steps of every component in float64."""


@pytest.mark.parametrize(
    "name, precision",
    [
        *(pytest.param(name, "bf16-true", marks=[pytest.mark.slow] * (name not in IN_16_BITS)) for name in NAMES),
        *(pytest.param(name, "64-true", marks=[pytest.mark.slow] * (name not in ALSO_IN_64_BITS)) for name in NAMES),
    ],
)
def test_it_runs_in_that_precision(name, precision, tmp_path):
    strategy = f"{name} + er" if COMPONENTS.get(name).needs_memory else name
    if name == "early_exit":
        strategy = "exits + early_exit(budget=0.9)"
    backbone = TRANSFORMER if name == "lora" else FAST[:2]
    options = [*backbone, *FAST[2:], f"strategy={strategy}", f"trainer.precision={precision}"]
    if name == "lora":
        options.append("components.lora.rank=2")
    result = clframe.run("quickstart", options, output=tmp_path)
    assert len(result.accuracy_matrix) == 2
