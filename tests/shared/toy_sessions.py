"""Sessions on a toy stream of three experiences, whose MACs are a short sum."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch

from clframe.core import compose, parse
from clframe.data.avalanche import import_avalanche
from clframe.data.benchmark import Benchmark, class_incremental
from clframe.data.samples import TensorSamples
from clframe.data.source import Source
from clframe.nn import Network
from clframe.nn.backbones import mlp

import_avalanche()

from clframe.training.module import ContinualModule
from clframe.training.monitor import Monitor
from clframe.training.scores import Scores
from clframe.training.session import Session
from clframe.training.strategy import LightningStrategy

BATCH, EPOCHS, SAMPLES, TESTED = 4, 2, 18, 6
"""18 samples an experience: batches of 4, 4, 4, 4 and 2; six test samples in all."""


@functools.cache
def bench() -> Benchmark:
    y = torch.arange(6).repeat_interleave(9)
    x = torch.randint(256, (len(y), 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scale = {"std": (50.0,)}
    source = Source("toy", TensorSamples(x, y, **scale), TensorSamples(x[::9], y[::9], **scale), classes=6)
    return class_incremental(source, experiences=3, order="sorted")


def session(strategy: Any, folder: Path, *, plugins: Any = (), **options: Any) -> Session:
    torch.manual_seed(0)
    composition = parse(strategy) if isinstance(strategy, str) else compose(strategy)
    optimizer = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    module = ContinualModule(Network(mlp((1, 2, 2), width=5, depth=2)), composition, optimizer=optimizer, seed=1)
    scores = Scores(bench())
    sizes = {"train_mb_size": BATCH, "train_epochs": EPOCHS, "eval_mb_size": 5}
    made = LightningStrategy(
        model=module, benchmark=bench(), plugins=[scores, *plugins], evaluator=None, **sizes, **options
    )
    monitor = Monitor(folder, experiences=3, tensorboard=False, csv=False, log_every=100, progress=False)
    (folder / "checkpoints").mkdir(exist_ok=True)
    return Session(made, bench(), scores=scores, monitor=monitor, checkpoints=folder / "checkpoints")


def run(strategy: Any, folder: Path, **options: Any) -> Session:
    made = session(strategy, folder, **options)
    made.run()
    made.close()
    return made
