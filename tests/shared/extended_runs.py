"""Short runs on some classes of the digits, their extensions, and whether two runs are the same."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import clframe
from clframe.data import SOURCES, Source, TensorSamples, digits
from clframe.errors import DataError
from clframe.results import Result

FAST = (
    "backbone=mlp", "backbone.width=32", "trainer.epochs=1", "trainer.threads=1", "trainer.accelerator=cpu",
    "trainer.loggers=[]", "trainer.progress=false", "benchmark.class_order=sorted",
)  # fmt: skip
CHANGED = ("train_seconds", "run_folder", "versions")
"""Fields of results.json that differ between two runs of one config."""


def part_of_digits(*, only: tuple[int, ...] = (), names: tuple[str, ...] = (), available: str = "") -> Source:
    """Some classes of the digits; with ``available``, only while that file exists."""
    if available and not Path(available).exists():
        raise DataError(f"{available}: no such folder; restore it")
    whole = digits()
    wanted = torch.tensor(only)

    def pick(samples: TensorSamples) -> TensorSamples:
        chosen = samples.subset(torch.isin(samples.y, wanted).nonzero().flatten())
        return replace(chosen, y=torch.searchsorted(wanted, chosen.y))

    named = names or tuple(whole.class_names[c] for c in only)
    return replace(whole, train=pick(whole.train), test=pick(whole.test), classes=len(only), class_names=named)  # type: ignore[arg-type]


@contextlib.contextmanager
def digits_part_registered() -> Iterator[None]:
    """A data set ``digits_part`` of some classes, while no run draws figures, which takes longer than training."""
    SOURCES.register("digits_part")(part_of_digits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clframe.execution.write_figures", lambda *_: None)
        yield
    del SOURCES._entries["digits_part"]


def more(*only: int) -> list[str]:
    return ["benchmark=digits_part", f"benchmark.only={list(only)}"]


def same(one: Any, other: Any) -> bool:
    """Whether two nested states have the same bits."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if hasattr(one, "state_dict"):
        return same(dict(one.state_dict()), dict(other.state_dict()))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def fields(result: Result) -> dict[str, Any]:
    return {key: value for key, value in json.loads(result.to_json()).items() if key not in CHANGED}


def assert_same_run(chain: Result, whole: Result) -> None:
    """Weights, states of components and every number of results.json."""
    assert fields(chain) == fields(whole)
    ours, theirs = clframe.load(chain.run_folder), clframe.load(whole.run_folder)
    assert same(ours.network, theirs.network)
    assert same(ours.learner.state, theirs.learner.state)


def train(folder: Path, *overrides: str) -> Result:
    return clframe.run("quickstart", [*FAST, *overrides], output=folder)


def train_parent(folder: Path) -> Result:
    """A run of two experiences with two digits each."""
    return train(folder, "strategy=er", "benchmark.classes=4", "benchmark.experiences=2")
