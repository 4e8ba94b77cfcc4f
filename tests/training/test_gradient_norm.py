"""The norm of the gradient that log entries have: that of the last update, before it was clipped."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning import Fabric
from lightning.fabric.plugins.precision import MixedPrecision as FabricPrecision
from lightning.pytorch.plugins.precision import MixedPrecision as TrainerPrecision
from power_cuts import TINY, assert_same_run, cut_run, scalars, without_pictures

import clframe
from clframe.core import Component, compose, parse
from clframe.data import Source, TensorSamples, class_incremental
from clframe.data.avalanche import import_avalanche
from clframe.nn import BACKBONES, Network

import_avalanche()

from avalanche.core import SupervisedPlugin

from clframe.training.divergence import gradient_norm
from clframe.training.module import ContinualModule
from clframe.training.monitor import Monitor
from clframe.training.strategy import LightningStrategy
from clframe.training.tensorboard import GRADIENT_NORM

ENGINES = ["fabric", "trainer"]
STEPS = 12
"""Two epochs of six batches."""


@dataclass(frozen=True, kw_only=True)
class Overwriter(Component):
    """Leaves other gradients behind at the end of an experience, as consolidation may."""

    name: ClassVar[str] = "overwriter"

    def after_experience(self, network: Any, context: Any, state: Any) -> Any:
        for parameter in network.parameters():
            parameter.grad = torch.full_like(parameter, 100.0)
        return state


class Watch(SupervisedPlugin):
    """Computes the norm of the gradients before every update, longhand."""

    def __init__(self) -> None:
        super().__init__()
        self.norms: list[float] = []

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        gradients = [p.grad.double() for p in strategy.learner.network.parameters() if p.grad is not None]
        self.norms.append(math.sqrt(sum(float((g * g).sum()) for g in gradients)))


def logged(folder: Path, **options: Any) -> tuple[dict[int, float], list[float], LightningStrategy]:
    """The logged norms by step, and the norm before each (possible) update."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    y = torch.arange(4).repeat_interleave(11)
    x = torch.randn(len(y), 1, 4, 4) + y.reshape(-1, 1, 1, 1)
    data = TensorSamples(x, y)
    benchmark = class_incremental(Source("blobs", data, data, classes=4), experiences=2, order="sorted")
    module = ContinualModule(
        Network(BACKBONES.get("mlp")((1, 4, 4), width=8)), compose(parse("lwf"), Overwriter()), seed=3,
        clip=options.pop("clip", None), optimizer=partial(torch.optim.SGD, lr=0.05),
    )  # fmt: skip
    watch = Watch()
    strategy = LightningStrategy(
        model=module, benchmark=benchmark, train_mb_size=4, train_epochs=2, evaluator=None, plugins=[watch], **options
    )
    monitor = Monitor(folder, experiences=2, tensorboard=False, log_every=5, progress=False)
    monitor.open(finished=0, steps=0)
    strategy.on_step = monitor.on_step
    for index, experience in enumerate(benchmark.avalanche.train_stream):
        monitor.begin_experience(index, steps=STEPS)
        strategy.train(experience)
        monitor.flush(strategy)
        monitor.end_experience()
    monitor.close()
    with open(folder / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["name"] == GRADIENT_NORM]
    return {int(row["step"]): float(row["value"]) for row in rows}, watch.norms, strategy


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_it_is_that_of_the_last_update_before_clipping(tmp_path, engine, clip, accumulate):
    found, norms, _ = logged(tmp_path, engine=engine, clip=clip, accumulate=accumulate)
    assert list(found) == [5, 10, 12, 17, 22, 24]
    for step, value in found.items():
        assert value == pytest.approx(norms[step - step % accumulate - 1], rel=1e-5), step
        assert value > 0.1  # above the limit, and not that of consolidation
        assert value < 50


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_in_mixed_precision_it_is_that_of_the_unscaled_gradient(tmp_path, engine, clip):
    plain, _, _ = logged(tmp_path / "a", clip=clip)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    own = {"trainer": {"plugins": [TrainerPrecision("16-mixed", "cpu", scaler=scaler)]}} if engine == "trainer" else {}
    fabric = Fabric(accelerator="cpu", plugins=[FabricPrecision("16-mixed", "cpu", scaler=scaler)])
    found, _, _ = logged(tmp_path / "b", fabric=fabric, engine=engine, clip=clip, **own)
    assert found == pytest.approx(plain, rel=0.02)


def test_there_is_none_before_the_first_update(tmp_path):
    found, norms, _ = logged(tmp_path, accumulate=6)
    assert list(found) == [10, 12, 22, 24]  # an update has been made by step 6
    assert found[10] == pytest.approx(norms[5], rel=1e-5) and found[12] == pytest.approx(norms[11], rel=1e-5)


def test_the_formula():
    weights = [
        torch.nn.Parameter(torch.zeros(2)),
        torch.nn.Parameter(torch.zeros(2, 2)),
        torch.nn.Parameter(torch.zeros(1)),
    ]
    optimizer = torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:]}], lr=1.0)
    assert gradient_norm(optimizer) is None
    weights[0].grad, weights[1].grad = torch.tensor([1.0, -2.0]), torch.tensor([[2.0, 4.0], [0.0, 0.0]])
    assert float(gradient_norm(optimizer)) == 5.0  # sqrt(1 + 4 + 4 + 16)
    assert float(gradient_norm(optimizer, math.inf)) == 4.0


def test_it_is_in_tensorboard_and_the_same_after_a_resumption(tmp_path):
    """Log entries lie between two updates, so that the norm is that of a gradient which a checkpoint does not hold."""
    patch = without_pictures()
    try:
        options = [*TINY, "strategy=ewc(samples=40)", "trainer.accumulate=4", "trainer.log_every=5",
                   "trainer.loggers=[csv, tensorboard]"]  # fmt: skip
        whole, copies = cut_run(options, tmp_path, cuts=2, seed=1)
        steps = [step for tag, step in scalars(whole) if tag == GRADIENT_NORM]
        assert steps[:3] == [5, 10, 15] and len(steps) >= 8
        for _, folder in copies:
            clframe.run(resume=folder)
            assert_same_run(whole, folder)
    finally:
        patch.undo()
