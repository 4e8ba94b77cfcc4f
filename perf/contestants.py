"""The loops that race in train_race.py, and what all of them train."""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from clframe.data import class_incremental
from clframe.data.samples import TensorSamples
from clframe.data.source import Source
from clframe.nn import BACKBONES, Network
from clframe.seeding import epoch_order, generator_for
from clframe.training.module import ContinualModule
from clframe.training.monitor import Monitor
from clframe.training.strategy import LightningStrategy

CLASSES, MEMORY, EPOCHS, SEED = 10, 200, 2, 0
OPTIMIZER = partial(torch.optim.SGD, lr=0.01, momentum=0.9)


@dataclass(frozen=True)
class Setting:
    """What everybody trains: a backbone, inputs, batches, and steps of each of the two epochs."""

    backbone: str
    input_shape: tuple[int, int, int]
    batch: int
    steps: int

    @property
    def samples(self) -> int:
        return self.batch * self.steps


class Course:
    """The data of every experience and the weights everybody starts from.

    Args:
        setting: Model and sizes.
        experiences: 1, or 2 for replay: classes split in half, ``setting.samples`` for each half.
        shuffle: False trains in the order of the samples.
    """

    def __init__(self, setting: Setting, *, experiences: int, shuffle: bool) -> None:
        from avalanche.benchmarks import nc_benchmark

        self.setting, self.shuffle = setting, shuffle
        generator = torch.Generator().manual_seed(SEED)
        share, n = CLASSES // experiences, setting.samples
        self.x = torch.randn(n * experiences, *setting.input_shape, generator=generator)
        self.y = torch.cat([torch.arange(n) % share + share * e for e in range(experiences)])
        # Avalanche sorts an experience by class; sorting here gives everybody the same order.
        order = self.y.argsort(stable=True)
        self.x, self.y = self.x[order].contiguous(), self.y[order].contiguous()
        train, data = TensorSamples(self.x, self.y), Images(self.x, self.y)
        source = Source("race", train, train, classes=CLASSES)
        self.ours = class_incremental(source, experiences=experiences, order="sorted")
        self.theirs = nc_benchmark(data, data, n_experiences=experiences, task_labels=False, shuffle=False)
        torch.manual_seed(SEED)
        self.network = Network(BACKBONES.get(setting.backbone)(setting.input_shape))
        self.network.grow(range(CLASSES))

    def plain(self, network: Network | None = None) -> nn.Module:
        """The layers and weights of a network as an ordinary torch module."""
        network = copy.deepcopy(network or self.network)
        linear = nn.Linear(network.final.features, CLASSES)
        linear.load_state_dict({"weight": network.final.weight, "bias": network.final.bias})
        return nn.Sequential(network.backbone, linear)

    def order(self, experience: int, epoch: int) -> Tensor:
        """The order in which clframe trains an experience's samples."""
        size = self.setting.samples
        if not self.shuffle:
            return torch.arange(size)
        return epoch_order(size, seed=SEED, experience=experience, epoch=epoch)

    def part(self, experience: int) -> tuple[Tensor, Tensor]:
        """The tensors of one experience."""
        here = slice(experience * self.setting.samples, (experience + 1) * self.setting.samples)
        return self.x[here], self.y[here]


class Images(Dataset[tuple[Tensor, int]]):
    """A map-style data set as people write it; Avalanche reads ``targets``."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.targets = x, y.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], self.targets[index]


@dataclass
class Start:
    """A contestant at the line: ``go`` is timed and returns its number of steps."""

    go: Callable[[], int]
    model: nn.Module
    strategy: Any = None

    def weights(self) -> list[Tensor]:
        """Everything learnt, in the order of the layers."""
        return [t.detach() for t in self.model.state_dict().values() if t.is_floating_point()]


def by_hand(course: Course) -> Start:
    """Tensors, a permutation, and the five lines everybody knows; the loss is read once, at the end."""
    model, batch = course.plain().train(), course.setting.batch
    optimizer = OPTIMIZER(model.parameters())
    x, y = course.part(0)

    def go() -> int:
        steps = 0
        for epoch in range(EPOCHS):
            for index in course.order(0, epoch).split(batch):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x[index]), y[index])
                loss.backward()
                optimizer.step()
                steps += 1
        loss.item()
        return steps

    return Start(go, model)


def by_hand_with_loader(course: Course) -> Start:
    """The same with a torch DataLoader."""
    model, batch = course.plain().train(), course.setting.batch
    optimizer = OPTIMIZER(model.parameters())
    data = TensorDataset(*course.part(0))

    def go() -> int:
        steps = 0
        for epoch in range(EPOCHS):
            for x, y in DataLoader(data, batch, sampler=course.order(0, epoch).tolist()):
                optimizer.zero_grad()
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                optimizer.step()
                steps += 1
        loss.item()
        return steps

    return Start(go, model)


def replay_by_hand(course: Course) -> Start:
    """Experience replay by hand, from the memory that clframe's ``er`` chose and as it draws from it."""
    learner = ours(course, "er", experience=1).strategy.learner
    model, batch = course.plain(learner.network).train(), course.setting.batch
    optimizer = OPTIMIZER(model.parameters())
    (x, y), (old_x, old_y) = course.part(1), (learner.state["er"]["x"], learner.state["er"]["y"])

    def go() -> int:
        steps = 0
        for epoch in range(EPOCHS):
            generator = generator_for(SEED, "epoch", 1, epoch, "er")
            for index in course.order(1, epoch).split(batch):
                old = torch.randint(len(old_y), (len(index),), generator=generator)
                optimizer.zero_grad()
                logits = model(torch.cat([x[index], old_x[old]]))
                loss = F.cross_entropy(logits, torch.cat([y[index], old_y[old]]))
                loss.backward()
                optimizer.step()
                steps += 1
        loss.item()
        return steps

    return Start(go, model)


def ours(
    course: Course,
    expression: str,
    *,
    experience: int = 0,
    engine: Any = "fabric",
    logs: bool = False,
    metrics: bool = False,
    fused: bool = False,
) -> Start:
    """clframe.

    Args:
        course: What to train.
        expression: The strategy.
        experience: The one that is timed; those before it are trained at the start.
        engine: ``fabric`` or ``trainer``.
        logs: Write losses and learning rate every 20 steps to CSV and TensorBoard, as ``clframe run`` does.
        metrics: Run Avalanche's evaluation plugin, as Avalanche's own strategies do.
        fused: Let torch update all parameters in one pass; other rounding, the same formula.
    """
    optimizer = partial(OPTIMIZER, fused=True) if fused else OPTIMIZER
    module = ContinualModule(copy.deepcopy(course.network), expression, optimizer=optimizer, seed=SEED)
    strategy = LightningStrategy(
        model=module,
        benchmark=course.ours,
        engine=engine,
        train_mb_size=course.setting.batch,
        train_epochs=EPOCHS,
        evaluator=_evaluator("epoch") if metrics else None,
    )
    stream = course.ours.avalanche.train_stream
    for before in range(experience):
        strategy.train(stream[before], shuffle=course.shuffle)
    monitor = Monitor(Path(tempfile.mkdtemp(prefix="race-")), experiences=1, progress=False)
    if logs:
        monitor.open(finished=0, steps=0)
        strategy.on_step = monitor.on_step

    def go() -> int:
        start = strategy.clock.train_iterations
        monitor.begin_experience(experience, steps=0)
        strategy.train(stream[experience], shuffle=course.shuffle)
        if logs:
            monitor.flush(strategy)
            monitor.end_experience()
        assert strategy.learner is not None
        strategy.learner.flush_terms()
        return int(strategy.clock.train_iterations - start)

    return Start(go, module.network, strategy)


def theirs(course: Course, kind: str, *, experience: int = 0, metrics: str = "epoch") -> Start:
    """Avalanche's own strategy, loop and loaders, untouched, on its classic benchmark.

    Args:
        course: What to train.
        kind: ``Naive`` or ``Replay``.
        experience: The one that is timed; those before it are trained at the start.
        metrics: ``none``, ``epoch`` (accuracy and loss) or ``minibatch`` (both, of every batch too).
    """
    from avalanche import training

    model = course.plain()
    strategy = getattr(training, kind)(
        model=model,
        optimizer=OPTIMIZER(model.parameters()),
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=course.setting.batch,
        train_epochs=EPOCHS,
        evaluator=_evaluator(metrics),
        **({"mem_size": MEMORY} if kind == "Replay" else {}),
    )
    stream = course.theirs.train_stream
    for before in range(experience):
        strategy.train(stream[before], shuffle=course.shuffle)

    def go() -> int:
        start = strategy.clock.train_iterations
        strategy.train(stream[experience], shuffle=course.shuffle)
        return int(strategy.clock.train_iterations - start)

    return Start(go, model)


def _evaluator(metrics: str) -> Any:
    from avalanche.evaluation.metrics import accuracy_metrics, loss_metrics
    from avalanche.logging import TextLogger
    from avalanche.training.plugins import EvaluationPlugin

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No loggers specified")
        if metrics == "none":
            return EvaluationPlugin()
    of = {"epoch": True, "minibatch": metrics == "minibatch"}
    nowhere = TextLogger(open(os.devnull, "w"))  # noqa: SIM115  (the logger keeps it open)
    return EvaluationPlugin(accuracy_metrics(**of), loss_metrics(**of), loggers=[nowhere])
