"""Recorded steps of language models are those that run otherwise, bit for bit; on a CPU with a stand-in for CUDA graphs."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import clframe
from clframe.accounting import Ledger
from clframe.build import build
from clframe.config.load import load_config
from clframe.training import capture
from clframe.training.cost_recorder import CostRecorder
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy

sys.path.insert(0, str(Path(__file__).parents[1] / "shared"))
try:
    import capture_runs as runs
finally:
    sys.path.pop(0)

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.5, fused=True)
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def early(monkeypatch):
    """Record in short experiences too; products of matrices must give equal bits on a GPU."""
    monkeypatch.setattr(capture, "WARM", 2)
    monkeypatch.setattr(capture, "FEWEST", 2)
    with clframe.seeding.torch_settings(deterministic=True, cuda=torch.cuda.is_available()):
        yield


def train(folder, strategy, *, device, recorded):
    config = load_config("language_model", [
        f"benchmark.path={folder}", "benchmark.experiences=2", "benchmark.context=8", "benchmark.vocabulary=280",
        "backbone.width=8", "backbone.depth=2", "backbone.heads=2", "seed=3", f'strategy="{strategy}"',
    ])  # fmt: skip
    setup = build(config)
    module = ContinualModule(setup.network, setup.composition, optimizer=SGD, seed=3, clip=1.0)
    costs = CostRecorder(module.learner, Ledger())
    loop = LightningStrategy(
        model=module, benchmark=setup.benchmark, train_mb_size=16, train_epochs=1, eval_mb_size=64, evaluator=None,
        device=device, plugins=[costs],
    )  # fmt: skip
    return runs.train(loop, costs, setup.benchmark, recorded=recorded)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize(
    "strategy",
    ["er(memory=20)", *(pytest.param(strategy, marks=pytest.mark.slow) for strategy in (
        "naive", "joint", "lwf", "derpp(memory=20)", "ewc(samples=8)", "lora(rank=2)",
        "er(memory=20) + exits(at=[block1])", "er(memory=20) + sparsity(strength=0.001, relu=true)",
        "lora(rank=2, merge=apart)", "lora(rank=2, merge=never)", "si", "er(memory=20, update=step, selection=reservoir)",
        "exits(at=[block1], weights=ramp) + early_exit + label_smoothing",
    ))],
)  # fmt: skip
def test_recorded_steps_are_those_that_run_otherwise(strategy, device, tmp_path):
    for name, words in {"prose": "the quick brown fox jumps over the lazy dog\n", "code": "def area(r):\n    return 3.14 * r\n"}.items():
        for part, times in (("train", 60), ("test", 5)):
            (tmp_path / f"{name}_{part}.txt").write_text(words * times, encoding="utf-8")
    (eager, _), (recorded, graphs) = (train(tmp_path, strategy, device=device, recorded=own) for own in (False, True))
    for part in eager:
        assert runs.equal(eager[part], recorded[part]), part
    assert graphs[0] >= 1
