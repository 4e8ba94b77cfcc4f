"""Count the cost of training on each experience, on one step of each epoch, and on those in which a buffer fills."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

from clframe.data.benchmark import Benchmark
from clframe.data.epoch_loader import EpochLoader
from clframe.training.budget import ExperienceCost
from clframe.training.checkpoint import nbytes
from clframe.training.cost_recorder import CostRecorder
from clframe.training.learner import Learner
from clframe.training.step_cost import buffer_size, growing_buffers, stored_samples
from clframe.training.strategy import LightningStrategy


def count_costs(
    strategy: LightningStrategy, benchmark: Benchmark, costs: CostRecorder, *, start: Callable[[], None]
) -> tuple[ExperienceCost, ...]:
    """Train one step of each epoch on every experience and return what each costs.

    Components prepare and consolidate on all samples, so their buffers, teachers and importances are those of a run in
    size. A buffer that admits samples after every step is filled in the first epoch in which it is empty, as far as the
    epoch has samples. Epochs are counted separately because some components change their cost from epoch to epoch.

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
    totals: list[int] = []  # after each step
    batches = 0.0

    def note(_: Any) -> None:
        nonlocal batches
        loader = strategy.dataloader
        batches = float(len(loader))
        if isinstance(loader, EpochLoader) and not strategy.drop_last:  # MACs are proportional to samples
            batches = len(loader.samples) / min(len(loader.samples), loader.batch_size)
        if not before:
            before.append(sum(macs for _, _, macs in profiler.between))
        totals.append(sum(profiler.charges().values()))
        if len(totals) == strategy.limit_batches:
            strategy.limit_batches = 1  # of all epochs but the first

    strategy.on_step = note
    strategy.stages = None  # compiling them would take longer than these steps
    start()
    found = []
    for index, experience in enumerate(stream):
        before.clear()
        totals.clear()
        costs.begin(index)
        filling = _filling_steps(strategy, experience)
        strategy.limit_batches = filling + 1
        strategy.train([experience])
        between, steps = sum(macs for _, _, macs in profiler.between), _differences(totals)
        full = steps[filling:]
        step = max(sum(full) // max(len(full), 1), 1)
        first = before[0] if before else between
        found.append(ExperienceCost(before=first, step=step, epoch=max(round(step * batches), 1), after=between - first,
                                    batches=math.ceil(batches) if steps else 0, filling=tuple(steps[:filling]),
                                    **_kept(learner)))  # fmt: skip
    return tuple(found)


def _differences(totals: list[int]) -> list[int]:
    return [after - before for before, after in itertools.pairwise([0, *totals])]


def _filling_steps(strategy: LightningStrategy, experience: Any) -> int:
    """Return the steps on full batches in which an empty buffer that admits samples after every step fills.

    At most those of an epoch but two. A buffer that other experiences have begun to fill is taken as it is.
    """
    learner = strategy.learner
    assert learner is not None
    empty = [c for c in growing_buffers(learner) if not stored_samples(learner.state[c.name])]
    if not empty:
        return 0
    # With replay=half, half of a batch is new; under accumulation, only the last batch of an update is offered.
    updates = max(math.ceil(2 * getattr(c, "memory", 0) / strategy.train_mb_size) for c in empty)
    strategy.limit_batches = None
    batches = strategy.count_steps(experience) // int(strategy.train_epochs)
    return max(min(updates * strategy.accumulate, batches - 2), 0)  # the last batch may be smaller


def _kept(learner: Learner) -> dict[str, int]:
    """Sizes of what the components keep."""
    kept = {"stored": 0, "buffer": 0, "others": 0, "classes": len(learner.past)}
    for component in learner.composition:
        state = learner.state[component.name]
        if component.keeps_memory:
            kept["stored"], kept["buffer"] = buffer_size(state)
        kept["others"] += nbytes(state)
    kept["others"] -= kept["buffer"]
    return kept
