"""Recorded steps of language models equal eager ones bit for bit; on a CPU with a stand-in for CUDA graphs."""

from __future__ import annotations

from functools import partial

import capture_runs as runs
import pytest
import torch
from language_runs import options_of, write_domains

import clframe
from clframe.accounting import Ledger
from clframe.build import build
from clframe.config.load import load_config
from clframe.training import capture
from clframe.training.cost_recorder import CostRecorder
from clframe.training.module import ContinualModule
from clframe.training.strategy import LightningStrategy

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.5, fused=True)
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def early(monkeypatch):
    """Record in short experiences too; products of matrices must give equal bits on a GPU."""
    monkeypatch.setattr(capture, "WARM", 2)
    monkeypatch.setattr(capture, "FEWEST", 2)
    with clframe.seeding.torch_settings(deterministic=True, cuda=torch.cuda.is_available()):
        yield


def train(texts, strategy, *, device, recorded):
    setup = build(load_config("language_model", options_of(texts, "seed=3", f'strategy="{strategy}"')))
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
def test_recorded_steps_equal_eager_ones(strategy, device, tmp_path):
    texts = write_domains(tmp_path)
    (eager, _), (recorded, graphs) = (train(texts, strategy, device=device, recorded=own) for own in (False, True))
    for part in eager:
        assert runs.equal(eager[part], recorded[part]), part
    assert graphs[0] >= 1
