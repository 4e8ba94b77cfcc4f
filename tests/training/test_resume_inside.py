"""A run that was stopped at any instant resumes inside the experience and ends bit-identical."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conformance_runs import NEEDS_TOKENS
from power_cuts import TINY, assert_same_run, cut_resumption, cut_run, without_pictures

import clframe
from clframe.core import COMPONENTS

TRANSFORMER = [
    "backbone=vit_tiny", "backbone.width=8", "backbone.depth=1", "backbone.patch=4", "backbone.heads=2",
    "components.moe.samples=60",
]  # fmt: skip
CASES = {
    "replay, teacher, rates by group and experience": (
        ["strategy=er(memory=20) + lwf", "optimizer.name=nadam", "optimizer.lr={first: 0.01, later: 0.002}",
         "optimizer.groups.heads={lr: 0.02, weight_decay: 0.1}"], 4),
    "exits, sparsity": (["strategy=exits(weights=ramp) + sparsity", "trainer.gradient_clip=1"], 3),
    "experts": (["strategy=er(memory=20) + moe", *TRANSFORMER], 3),
    "average of the weights": (["strategy=er(memory=20) + exits + lwf", "trainer.ema=0.9", "backbone=small_cnn"], 3),
    "live weights in a Trainer, TensorBoard": (
        ["strategy=ewc(samples=40) + si", "trainer.engine=trainer", "optimizer.schedule=plateau", "optimizer.patience=0",
         "benchmark.validation=0.2", "trainer.callbacks={EarlyStopping: {monitor: train/loss, patience: 2}}",
         "trainer.loggers=[csv, tensorboard]"], 4),
    "reservoir, accumulation, augmentation": (
        ["strategy=der(memory=20, update=step)", "trainer.accumulate=2", "benchmark.augment=[crop]",
         "optimizer.schedule=cosine", "trainer.epochs=3", "optimizer.warmup=1", "trainer.eval_every=1"], 3),
    "online stream": (["strategy=er(memory=20)", "benchmark.online=100", "trainer.epochs=1"], 2),
    "online stream without boundaries": (
        ["strategy=er(memory=20, update=step, selection=reservoir)", "benchmark.online=100", "benchmark.boundaries=false",
         "trainer.epochs=1", "optimizer.name=adam"], 2),
}  # fmt: skip

ENGINES = ("fabric", "trainer")
CUTS = 3
"""Cuts of each component with each engine, in the slow suite."""


@pytest.fixture(scope="module", autouse=True)
def fast():
    patch = without_pictures()
    yield
    patch.undo()


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case == "average of the weights")) for case in CASES]
)
def test_it_ends_as_if_it_had_not_been_stopped(case: str, tmp_path: Path) -> None:
    options, cuts = CASES[case]
    whole, copies = cut_run([*TINY, *options], tmp_path, cuts=cuts, seed=case)
    assert len(copies) == cuts
    for _, folder in copies:
        clframe.run(resume=folder)
        assert_same_run(whole, folder)


def test_a_kill_during_the_resumption(tmp_path: Path) -> None:
    options = [*TINY, "strategy=er(memory=20) + exits"]
    whole, ((_, folder),) = cut_run(options, tmp_path, cuts=1, seed=2)
    for again in range(2):
        folder = cut_resumption(folder, tmp_path / f"again{again}", seed=again)
    clframe.run(resume=folder)
    assert_same_run(whole, folder)


def test_enough_cuts() -> None:
    """20 in the default suite and 200 in the slow one, all but those during a resumption."""
    assert sum(cuts for _, cuts in CASES.values()) >= 20
    assert CUTS * len(ENGINES) * len(COMPONENTS.names()) >= 200


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_with_deterministic_operations_it_does_on_a_gpu(case: str, tmp_path: Path) -> None:
    """Steps are recorded where the case allows it, and recorded again after the resumption."""
    options, cuts = CASES[case]
    cuda = ["trainer.accelerator=cuda", "trainer.deterministic=true"]
    whole, copies = cut_run([*TINY, *options, *cuda], tmp_path, cuts=cuts, seed=case)
    assert len(copies) == cuts
    for _, folder in copies:
        clframe.run(resume=folder)
        assert_same_run(whole, folder)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", COMPONENTS.names())
def test_every_component(name: str, engine: str, tmp_path: Path) -> None:
    component = COMPONENTS.get(name)
    strategy = name
    if component.needs_memory and not component.keeps_memory:
        strategy = f"{name} + er"
    options = [*TINY, *(TRANSFORMER if name in NEEDS_TOKENS else []), f"trainer.engine={engine}",
               f"strategy={strategy}"]  # fmt: skip
    whole, copies = cut_run(options, tmp_path, cuts=CUTS, seed=(name, engine))
    assert len(copies) == CUTS
    for _, folder in copies:
        clframe.run(resume=folder)
        assert_same_run(whole, folder)
