"""Copies of a run folder as power cuts would leave them, and comparison of two run folders."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import clframe
from clframe.data.avalanche import import_avalanche

import_avalanche()

from clframe.training.learner import Learner
from clframe.training.monitor import Monitor
from clframe.training.scores import Scores
from clframe.training.tensorboard import THROUGHPUT

TINY = [
    "backbone=mlp", "backbone.width=12", "benchmark.classes=4", "benchmark.experiences=2", "trainer.epochs=2",
    "trainer.batch_size=32", "trainer.log_every=3", "trainer.progress=false", "trainer.loggers=[csv]",
    "trainer.checkpoint.every=4",
]  # fmt: skip
"""36 training steps on digits."""


def without_pictures() -> pytest.MonkeyPatch:
    """Leave out the figures at the end of a run, half of its time, and the peak of the process's memory.

    The peak is an integer whose length, and so the size of a checkpoint, depends on the tests before.
    """
    patch = pytest.MonkeyPatch()
    patch.setattr("clframe.execution.write_figures", lambda *_: None)
    patch.setattr("clframe.training.cost_recorder.process_peak_bytes", lambda: None)
    return patch


class Recorder:
    """Copies the folder of a run at instants drawn uniformly from all its steps, hooks, evaluations and writes.

    An instant is after a step or a batch of an evaluation, before a component consolidates, or before a file is synced
    or renamed.

    Args:
        source: Returns the run folder.
        target: Where copies go.
        count: Copies to keep at the end.
        seed: Of the draw.
    """

    def __init__(self, source: Callable[[], Path | None], target: Path, *, count: int, seed: Any) -> None:
        self._source, self._target, self._count = source, target, count
        self._draw = random.Random(repr(seed))
        self._seen = 0
        self.kept: dict[int, tuple[str, Path]] = {}

    def __enter__(self) -> Recorder:
        self._patch = pytest.MonkeyPatch()
        for owner, name in ((Monitor, "on_step"), (Scores, "after_eval_iteration")):
            self._patch.setattr(owner, name, self._observed(getattr(owner, name), name, after=True))
        self._patch.setattr(Learner, "_context", self._observed(Learner._context, "hook", after=False))
        for name in ("fsync", "replace"):
            self._patch.setattr(os, name, self._observed(getattr(os, name), name, after=False))
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def _observed(self, call: Callable[..., Any], name: str, *, after: bool) -> Callable[..., Any]:
        def observed(*args: Any, **kwargs: Any) -> Any:
            if not after:
                self._pass(name)
            result = call(*args, **kwargs)
            if after:
                self._pass(name)
            return result

        return observed

    def _pass(self, name: str) -> None:
        folder = self._source()
        if folder is None or not (folder / "config.yaml").is_file():
            return
        self._seen += 1
        place = len(self.kept) if len(self.kept) < self._count else self._draw.randrange(self._seen)
        if place < self._count:
            path = self._target / f"cut{place}" / folder.name
            shutil.rmtree(path.parent, ignore_errors=True)
            shutil.copytree(folder, path)
            self.kept[place] = f"{name} {self._seen}", path


def cut_run(
    options: Sequence[str], folder: Path, *, cuts: int, seed: Any = 0, config: str = "quickstart"
) -> tuple[Path, list[tuple[str, Path]]]:
    """Run to the end; returns the folder of the run and its copies at ``cuts`` instants, with their names."""

    def running() -> Path | None:
        return next(iter((folder / "whole").glob("*/*")), None)

    with Recorder(running, folder, count=cuts, seed=seed) as recorder:
        result = clframe.run(config, options, output=folder / "whole")
    copies = list(recorder.kept.values())
    print("cuts:", ", ".join(f"{path.parent.name} at {name}" for name, path in copies))  # shown if the test fails
    return Path(str(result.run_folder)), copies


def cut_resumption(folder: Path, target: Path, *, seed: Any) -> Path:
    """Resume a run to the end and return a copy of its folder at one instant of that."""
    with Recorder(lambda: folder, target, count=1, seed=seed) as recorder:
        clframe.run(resume=folder)
    return recorder.kept[0][1]


def assert_same_run(one: Path, other: Path, *, sizes: bool = True) -> None:
    """Compare two finished run folders in everything but times, measured memory and the folder's name.

    The names must have the same length: configs contain them, and the ledger has the size of checkpoints. Without
    ``sizes`` that is left out, since on a GPU it changes with the digits of the energies inside.
    """
    assert _results(one) == _results(other)
    assert _rows(one) == _rows(other)
    differences = _differences(*(_ledger(run, sizes=sizes) for run in (one, other)))
    assert differences == {}, differences
    assert scalars(one) == scalars(other)
    names = [sorted(path.name for path in (run / "checkpoints").iterdir()) for run in (one, other)]
    assert names[0] == names[1]
    contents = [dict(_leaves(_checkpoint(run / "checkpoints" / names[0][-1]))) for run in (one, other)]
    assert contents[0].keys() == contents[1].keys()
    for name, value in contents[0].items():
        assert _equal(value, contents[1][name]), name


def scalars(run: Path) -> dict[tuple[str, int], float]:
    """The scalars of a run's event files by tag and step, without those of time."""
    if not (run / "tensorboard").is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0})
    board.Reload()
    points = [((tag, e.step), e.value) for tag in board.Tags()["scalars"] for e in board.Scalars(tag)]
    found = dict(points)
    assert len(found) == len(points), "a point is there twice"
    return {place: value for place, value in found.items() if place[0] != THROUGHPUT}


def _results(run: Path) -> dict[str, Any]:
    found = json.loads((run / "results.json").read_text())
    return {key: repr(value) for key, value in found.items() if key not in ("train_seconds", "run_folder")}


def _rows(run: Path) -> list[list[str]]:
    rows = list(csv.reader((run / "metrics.csv").read_text().splitlines()))
    assert rows[0] == ["experience", "step", "name", "value"]
    return rows


def _ledger(run: Path, *, sizes: bool) -> dict[str, Any]:
    found = json.loads((run / "ledger.json").read_text())
    ledger, totals = found["ledger"], found["totals"]
    del found["training"]["seconds"], totals["seconds"], totals["energy"], ledger["energy"]
    left_out = ("process_peak", "device_peak") if sizes else ("process_peak", "device_peak", "checkpoint")
    for kind in left_out:
        totals["bytes"].pop(kind, None)
    # A resumed process records the steps of its experience again.
    ledger["times"] = [(row["phase"], row["experience"]) for row in ledger["times"] if row["phase"] not in ("capture", "compile")]
    ledger["bytes"] = [row for row in ledger["bytes"] if row["kind"] not in left_out]
    ledger["figures"] = [row for row in ledger["figures"] if row["name"] not in ("captured_graphs", "compiled_graphs")]
    return dict(found)


def _checkpoint(path: Path) -> dict[str, Any]:
    content = torch.load(path, weights_only=True, map_location="cpu")
    return {key: value for key, value in content.items() if key not in ("train_seconds", "ledger", "config")}


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{path}.{number}")
    else:
        yield path, value


def _differences(one: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    """Values that differ by path, which a failed test then shows in full."""
    before, now = dict(_leaves(one)), dict(_leaves(other))
    pairs = {path: (before.get(path), now.get(path)) for path in before | now}
    return {path: pair for path, pair in pairs.items() if repr(pair[0]) != repr(pair[1])}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        same = one.shape == other.shape and one.dtype == other.dtype
        return same and one.numpy().tobytes() == other.numpy().tobytes()
    return repr(one) == repr(other)
