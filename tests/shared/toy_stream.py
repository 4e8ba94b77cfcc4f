"""A toy world for the engine's tests: six classes, three experiences, a small network with dropout."""

from __future__ import annotations

import functools
import random
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from clframe.data.avalanche import import_avalanche
from clframe.nn import BACKBONES, Network
from clframe.training.module import ContinualModule

CLASSES, FEATURES = 6, 8


def blobs(per_class: int, *, seed: int) -> TensorDataset:
    """One Gaussian blob a class; an odd number of samples each, so that last batches are partial."""
    centers_CF = 2 * torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(0))
    y_N = torch.arange(CLASSES).repeat_interleave(per_class)
    noise_NF = torch.randn(len(y_N), FEATURES, generator=torch.Generator().manual_seed(seed))
    data = TensorDataset(centers_CF[y_N] + noise_NF, y_N)
    data.targets = y_N.tolist()  # where Avalanche looks for labels
    return data


@functools.cache
def benchmark(kind: str) -> Any:
    """``new``: its experiences have no task labels; ``classic``: all the same; ``tasks``: one each."""
    from avalanche.benchmarks import class_incremental_benchmark, nc_benchmark

    train, test = blobs(13, seed=1), blobs(5, seed=2)
    if kind == "new":
        return class_incremental_benchmark(
            {"train": train, "test": test}, num_experiences=3, class_order=list(range(CLASSES))
        )
    return nc_benchmark(train, test, 3, task_labels=kind == "tasks", shuffle=False)


def mlp() -> Any:
    """Avalanche's own MLP: it has the features that LFL asks for."""
    from avalanche.models import SimpleMLP

    return SimpleMLP(num_classes=CLASSES, input_size=FEATURES, hidden_size=16, drop_rate=0.3)


def sgd(model: Any, lr: float = 0.05) -> torch.optim.SGD:
    """Momentum, so that an optimizer's state matters."""
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def module(
    expression: str = "naive", *, seed: int | None = None, clip: float | None = None, grown: bool = False
) -> ContinualModule:
    """Ours: a small network and its strategy; ``grown`` gives it all six outputs from the start."""
    network = Network(BACKBONES.get("mlp")((FEATURES,), width=16))
    if grown:
        network.grow(range(CLASSES))
    optimizer = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9)
    return ContinualModule(network, expression, optimizer=optimizer, seed=seed, clip=clip)


def evaluator(*metrics: Any, loggers: Any = None) -> Any:
    """An evaluation plugin that may have no loggers, of which Avalanche would warn."""
    from avalanche.training.plugins import EvaluationPlugin

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No loggers specified")
        return EvaluationPlugin(*metrics, loggers=loggers)


def seed_all(value: int = 7) -> None:
    """Seed every generator that Avalanche draws from."""
    torch.manual_seed(value)
    np.random.seed(value)
    random.seed(value)


def random_states() -> tuple[Any, ...]:
    """Where every generator stands: equal only if both sides drew the same."""
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def weights(model: Any) -> dict[str, torch.Tensor]:
    """A copy of all weights."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(autouse=True)
def warning_filters_stay_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Avalanche's deprecation notices reset the filters of the whole process; here they only warn."""
    import_avalanche()
    quiet = SimpleNamespace(warn=warnings.warn, simplefilter=lambda *action: None)
    monkeypatch.setattr("avalanche._annotations.warnings", quiet)


@pytest.fixture(scope="session")
def toy() -> SimpleNamespace:
    """Everything above, under one name."""
    import_avalanche()
    return SimpleNamespace(
        classes=CLASSES,
        features=FEATURES,
        benchmark=benchmark,
        mlp=mlp,
        sgd=sgd,
        module=module,
        evaluator=evaluator,
        seed_all=seed_all,
        random_states=random_states,
        weights=weights,
        same=same,
        options={"train_mb_size": 10, "train_epochs": 2, "eval_mb_size": 16},
    )
