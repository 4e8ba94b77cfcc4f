"""Training budgets: how many steps of a strategy cost a given number of MACs.

A budget covers all that training on an experience executes: forward and backward passes, replayed samples, teachers,
terms of components, and what components compute before and after it (importances, herding, routers). Evaluation is not
part of it, because no step depends on it: budgets are refused together with what evaluates inside training.

Costs are counted before the run, on a copy of it that takes one step per epoch (:func:`plan_steps` gets these counts).
They depend on shapes, so the plan is exact up to smaller last batches and costs that change during an experience. The
last epoch is therefore cut by what the run itself has counted so far. A buffer that admits samples after every step is
filled on the copy as well, because steps cost less while it is nearly empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from clframe.errors import ConfigError

TOLERANCE: Final = 0.01
"""Largest deviation from the budget of an experience, as a share of it, that is not reported."""


@dataclass(frozen=True, slots=True)
class ExperienceCost:
    """Counted cost of training on one experience, in MACs, and what the components keep after it."""

    before: int
    """Of components before the first step."""
    step: int
    """Mean of one step on a full batch."""
    epoch: int
    """Of an epoch; its last batch may be smaller."""
    after: int
    """Of components after the last step."""
    batches: int
    """Steps of an epoch; 0 where the strategy does not train on the experience."""
    filling: tuple[int, ...] = ()
    """Of each of the first steps, while a buffer that admits samples after every step fills."""
    stored: int = 0
    """Samples in the replay buffer after it."""
    buffer: int = 0
    """Bytes of these samples."""
    others: int = 0
    """Bytes of all other states: teachers, importances."""
    classes: int = 0
    """Classes seen so far."""

    @property
    def between(self) -> int:
        """Of components before the first step and after the last one."""
        return self.before + self.after

    def steps(self, macs: int, *, first: bool = False) -> int:
        """Return the steps that cost ``macs``, to the nearest step: whole epochs, then full batches.

        Args:
            macs: What may be spent.
            first: Whether they are the first of the experience.

        >>> cost = ExperienceCost(before=0, step=10, epoch=63, after=40, batches=7, filling=(4, 6))
        >>> cost.steps(62), cost.steps(63), cost.steps(63 + 24), cost.steps(63 + 25)
        (6, 7, 9, 10)
        >>> cost.steps(1, first=True), cost.steps(7, first=True), cost.steps(10 + 14, first=True)
        (0, 2, 3)
        """
        if first:
            for number, cost in enumerate(self.filling):
                if 2 * macs < cost:
                    return number
                macs -= cost
            macs += len(self.filling) * self.step
        epochs, rest = divmod(macs, self.epoch)
        return epochs * self.batches + min((rest + self.step // 2) // self.step, self.batches)


@dataclass(frozen=True, slots=True)
class PlannedExperience:
    """Training on one experience within a budget."""

    budget: int
    """MACs that may be spent."""
    cost: ExperienceCost
    epochs: int
    """Epochs; the last one is cut where the budget ends."""
    steps: int
    """Expected steps of all epochs."""

    def batches_of(self, epoch: int, *, whole: int, spent: int) -> int:
        """Return the batches of an epoch.

        Args:
            epoch: Its number, from 0.
            whole: Batches of a complete epoch.
            spent: MACs of the experience before the epoch.

        >>> cost = ExperienceCost(before=0, step=10, epoch=63, after=40, batches=7)
        >>> planned = plan_steps([cost], [190])[0]
        >>> planned.epochs, planned.steps
        (3, 16)
        >>> planned.batches_of(0, whole=7, spent=0), planned.batches_of(2, whole=7, spent=126)
        (7, 2)
        """
        if epoch + 1 < self.epochs:
            return whole
        left = max(self.budget - self.cost.after - spent, 0)
        return min(max(self.cost.steps(left, first=epoch == 0), 1), whole)


@dataclass(frozen=True)
class TrainingPlan:
    """Training of all experiences within their budgets.

    Args:
        experiences: The plan of each experience.
        schedule: Returns the learning-rate schedule over a number of epochs, as ``scheduler`` of a ``ContinualModule``.
    """

    experiences: tuple[PlannedExperience, ...]
    schedule: Callable[[int], Any]

    def table(self) -> str:
        """Return budget, cost of a step, fixed cost, epochs and steps of each experience, as text."""
        heading = f"{'experience':<12}{'budget':>12}{'per step':>12}{'in between':>12}{'epochs':>9}{'steps':>9}"
        rows = [
            f"{index:<12}{one.budget:>12.4g}{_step(one):>12}{one.cost.between:>12.4g}{_epochs(one):>9}{one.steps:>9,}"
            for index, one in enumerate(self.experiences)
        ]
        return "\n".join([f"{heading}   (MACs)", *rows])


def _step(planned: PlannedExperience) -> str:
    return f"{planned.cost.step:.4g}" if planned.cost.batches else "-"


def _epochs(planned: PlannedExperience) -> str:
    return f"{planned.steps / planned.cost.batches:.2f}" if planned.steps else "0"


def pool_budgets(
    costs: Sequence[ExperienceCost], budgets: Sequence[int], sources: Sequence[Sequence[int]]
) -> list[int]:
    """Return the budgets where one experience trains on the data of others that take no steps, as in joint training.

    It gets their budgets, less what components compute in them, so that the budget of the stream stays the same.

    Args:
        costs: Of each experience.
        budgets: Of each experience, in MACs.
        sources: The experiences on whose data each one trains.

    >>> cost = {"before": 0, "step": 1, "epoch": 1}
    >>> costs = [ExperienceCost(**cost, after=0, batches=1), ExperienceCost(**cost, after=5, batches=0)]
    >>> pool_budgets(costs, [30, 40], [(0, 1), ()]), pool_budgets(costs, [30, 40], [(0,), ()])
    ([65, 5], [30, 40])
    """
    pooled = list(budgets)
    for index, cost in enumerate(costs):
        trained_in = next((i for i, found in enumerate(sources) if index in found), None)
        if not cost.batches and trained_in is not None:
            pooled[trained_in] += budgets[index] - cost.between
            pooled[index] = cost.between
    return pooled


def plan_steps(costs: Sequence[ExperienceCost], budgets: Sequence[int]) -> tuple[PlannedExperience, ...]:
    """Return as many steps of each experience as its budget affords, in epochs of which the last one may be cut.

    Raises:
        ConfigError: A budget affords not a single step.
    """
    found = []
    for index, (cost, budget) in enumerate(zip(costs, budgets, strict=True)):
        if not cost.batches:  # joint training takes all steps in the first experience
            found.append(PlannedExperience(budget, cost, 1, 0))
            continue
        steps = cost.steps(max(budget - cost.between, 0), first=True)
        if steps < 1:
            least = cost.between + next(iter(cost.filling), cost.step)
            raise ConfigError(
                f"trainer.budget: found {budget:.4g} MACs for experience {index + 1}, but one step costs {least:.4g} "
                f"with what components compute before and after training ({cost.between:.4g}); give more, "
                f"or components that cost less"
            )
        found.append(PlannedExperience(budget, cost, math.ceil(steps / cost.batches), steps))
    return tuple(found)


def fit_buffer(costs: Sequence[ExperienceCost], limit: int, *, per_class: bool) -> int:
    """Return the largest buffer with which the components keep at most ``limit`` bytes after every experience.

    M = min over experiences of floor((limit - others) / bytes of a stored sample), divided by the classes so far where
    the buffer has its size for each class.

    Args:
        costs: Counted with any size of the buffer.
        limit: In bytes.
        per_class: Whether the size of the buffer is that of each class.

    >>> cost = {"before": 0, "step": 1, "epoch": 1, "after": 0, "batches": 1}
    >>> kept = ExperienceCost(**cost, stored=20, buffer=2000, others=500, classes=4)
    >>> fit_buffer([kept], 1750, per_class=False), fit_buffer([kept], 1750, per_class=True)
    (12, 3)
    """
    sizes = [
        (limit - cost.others) * cost.stored // (cost.buffer * (cost.classes if per_class else 1))
        for cost in costs
        if cost.stored
    ]
    return max(min(sizes), 0)
