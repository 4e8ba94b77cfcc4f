"""What both sides of strategy_parity.py train: one seed's experiences and first weights, and Avalanche's strategies on them.

Both sides train the same perceptron from the same weights, on the same experiences, with SGD without momentum, and
memories of the same size. Avalanche's model has its ``IncrementalClassifier``, which grows with the classes as our head
does, or ten outputs from the start where a method of Avalanche's cannot grow.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from clframe.data import SOURCES, Benchmark, Source, class_incremental
from clframe.nn import BACKBONES, Network
from clframe.seeding import derive_seed

EXPERIENCES, PER_EXPERIENCE, WIDTH, LR = 5, 2, 128, 0.05


@dataclass(frozen=True)
class Setting:
    """What both sides train: a data set, how much of it, and how."""

    source: str
    per_class: int | None
    """Training samples of each class, the first ones; None takes all."""
    epochs: int
    batch: int
    memory: int


SETTINGS = {
    "split digits": Setting("digits", 128, epochs=5, batch=16, memory=192),
    "Split MNIST": Setting("mnist", 992, epochs=2, batch=32, memory=512),
}
"""Experiences and memories are multiples of a batch: Avalanche sets a whole replayed batch beside a rest of new samples."""


class Course:
    """Data and first weights of one seed, alike for both sides."""

    def __init__(
        self, setting: Setting, *, seed: int, source: Source | None = None, data_dir: str | None = None
    ) -> None:
        if source is None:
            options = {"data_dir": data_dir, "download": False} if data_dir and setting.source != "digits" else {}
            source = SOURCES.get(setting.source)(**options)
        if setting.per_class is not None:
            train = source.train
            order = [(train.y == c).nonzero().flatten()[: setting.per_class] for c in range(source.classes)]
            source = Source(source.name, train.subset(torch.cat(order)), source.test, source.classes)
        self.setting, self.seed = setting, seed
        self.benchmark: Benchmark = class_incremental(source, experiences=EXPERIENCES, seed=seed)
        self.classes = source.classes
        torch.manual_seed(derive_seed(seed, "network"))
        self.network = Network(BACKBONES.get("mlp")(self.benchmark.input_shape, width=WIDTH))

    def body(self) -> nn.Module:
        """Everything below the classifier, with the weights that ours begins with."""
        return copy.deepcopy(self.network.backbone)

    def model(self, *, growing: bool = True) -> nn.Module:
        """The body with Avalanche's growing classifier, or with an output for each class of the stream."""
        from avalanche.models import IncrementalClassifier

        head = IncrementalClassifier(WIDTH, PER_EXPERIENCE) if growing else nn.Linear(WIDTH, self.classes)
        return nn.Sequential(self.body(), head)

    def theirs(self, *, flat: bool = False) -> Any:
        """The experiences as a benchmark of Avalanche's; classes are numbered in learning order here as well."""
        from avalanche.benchmarks import nc_benchmark

        train, test = (joined(parts) for parts in (self.benchmark.train, self.benchmark.test))
        if flat:
            train.x, test.x = train.x.flatten(1), test.x.flatten(1)
        order = list(range(self.classes))
        return nc_benchmark(train, test, EXPERIENCES, task_labels=False, shuffle=False, fixed_class_order=order)


class Samples(Dataset[tuple[Tensor, int]]):
    """Tensors as a map-style data set; Avalanche reads ``targets``."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.targets = x, y.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], self.targets[index]


def joined(parts: Any) -> Samples:
    """All experiences' samples in one data set, as the model wants them."""
    x = torch.cat([part.prepare(part.raw(torch.arange(len(part)))) for part in parts])
    return Samples(x, torch.cat([part.y for part in parts]))


Maker = Callable[[Course, dict[str, Any]], Any]
"""Avalanche's strategy for a course, given the arguments that all of them take."""


def own(name: str, *, growing: bool = True, lr: float = LR, **options: Any) -> Maker:
    """A strategy class of ``avalanche.training``; an option may be a function of the setting."""

    def make(course: Course, shared: dict[str, Any]) -> Any:
        from avalanche import training

        model = course.model(growing=growing)
        given = {key: value(course.setting) if callable(value) else value for key, value in options.items()}
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        return getattr(training, name)(
            model=model, optimizer=optimizer, criterion=nn.CrossEntropyLoss(), **given, **shared
        )

    return make


def plugged(*plugins: Callable[[Setting], Any]) -> Maker:
    """``Naive`` with plugins."""

    def make(course: Course, shared: dict[str, Any]) -> Any:
        return own("Naive", plugins=lambda setting: [plugin(setting) for plugin in plugins])(course, shared)

    return make


def plugin(name: str, **options: Any) -> Callable[[Setting], Any]:
    """A plugin class of ``avalanche.training.plugins``; an option may be a function of the setting."""

    def make(setting: Setting) -> Any:
        from avalanche.training import plugins

        given = {key: value(setting) if callable(value) else value for key, value in options.items()}
        return getattr(plugins, name)(**given)

    return make
