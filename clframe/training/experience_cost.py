"""Count the cost of training on each experience, on one step of each epoch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from clframe.data.benchmark import Benchmark
from clframe.data.samples import EpochLoader
from clframe.training.budget import ExperienceCost
from clframe.training.checkpoint import nbytes
from clframe.training.cost_recorder import CostRecorder
from clframe.training.learner import Learner
from clframe.training.strategy import LightningStrategy


def count_costs(
    strategy: LightningStrategy, benchmark: Benchmark, costs: CostRecorder, *, start: Callable[[], None]
) -> tuple[ExperienceCost, ...]:
    """Train one step of each epoch on every experience and return what each costs.

    Components prepare and consolidate on all samples, so their buffers, teachers and importances are those of a run in
    size. Epochs are counted separately because some components change their cost from epoch to epoch.

    Args:
        strategy: Trains; its network and components are changed.
        benchmark: The stream.
        costs: Counts the steps of the strategy.
        start: Called before the first experience.
    """
    profiler, stream = costs.profiler, benchmark.avalanche.streams["train"]
    assert strategy.learner is not None
    learner = strategy.learner
    before: list[int] = []
    batches = 0.0

    def note(_: Any) -> None:
        nonlocal batches
        loader = strategy.dataloader
        batches = float(len(loader))
        if isinstance(loader, EpochLoader) and not strategy.drop_last:  # MACs are proportional to samples
            batches = len(loader.samples) / min(len(loader.samples), loader.batch_size)
        if not before:
            before.append(sum(macs for _, _, macs in profiler.between))

    strategy.on_step = note
    strategy.limit_batches = 1
    strategy.stages = None  # compiling them would take longer than these steps
    start()
    found = []
    for index, experience in enumerate(stream):
        before.clear()
        costs.begin(index)
        strategy.train([experience])
        steps, between = profiler.steps, sum(macs for _, _, macs in profiler.between)
        step = max(sum(profiler.charges().values()) // max(steps, 1), 1)
        first = before[0] if before else between
        found.append(ExperienceCost(before=first, step=step, epoch=max(round(step * batches), 1), after=between - first,
                                    batches=math.ceil(batches) if steps else 0, **_kept(learner)))  # fmt: skip
    return tuple(found)


def _kept(learner: Learner) -> dict[str, int]:
    """Sizes of what the components keep."""
    kept = {"stored": 0, "buffer": 0, "others": 0, "classes": len(learner.past)}
    for component in learner.composition:
        state = learner.state[component.name]
        if component.keeps_memory:
            kept["stored"] = 0 if state["y"] is None else len(state["y"])
        kept["buffer" if component.keeps_memory else "others"] += nbytes(state)
    return kept
