"""Accuracy against cost as the gate's setting moves, and measured time next to the dense model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch
from torch import Tensor, nn

from clframe.accounting.measurement import synchronize
from clframe.moe.conversion.measure import Pass
from clframe.moe.pipeline import GateKind, gate_of
from clframe.moe.router import Gate
from clframe.moe.usage import counting
from clframe.nn.frozen import answering
from clframe.nn.types import Inputs

Call = Callable[[nn.Module, Inputs], object]


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Seconds of calls, medians.

    Attributes:
        batch: Samples of a call.
        dense: Of the dense model.
        converted: Of the converted one.
        speedup: Median over pairs of dense over converted.
        pairs: How many there were.
        computed: Share of the networks' MACs that is computed, routers included: more than what the gate chose where
            computing all and masking is faster, or where small experts run together.
        threads: That torch computes with.
        device: Where.
    """

    batch: int
    dense: float
    converted: float
    speedup: float
    pairs: int
    computed: float
    threads: int
    device: str


def paired(
    dense: nn.Module,
    converted: nn.Module,
    inputs: Inputs,
    *,
    batch: int,
    call: Call,
    pairs: int = 20,
    least: int = 5,
    seconds: float = 5.0,
    warmup: int = 2,
) -> Paired:
    """Time both models on the same inputs, one call of each in turn, so that a slow moment meets both.

    Args:
        dense: The model as it was.
        converted: With the gate that is to be measured.
        inputs: Of one batch.
        batch: How many samples they hold.
        call: Runs a model.
        pairs: Of calls that count, at most.
        least: Pairs that count, at least.
        seconds: After which no more pairs begin, once there are the least.
        warmup: Pairs that do not.
    """
    device = next(converted.parameters()).device
    took: list[tuple[float, float]] = []
    with answering(dense), answering(converted):
        end = time.perf_counter() + seconds
        while len(took) < warmup + pairs and (time.perf_counter() < end or len(took) < warmup + least):
            took.append((_once(dense, inputs, call, device), _once(converted, inputs, call, device)))
        with counting(converted) as usage:
            call(converted, inputs)
    took, used = took[warmup:], usage().values()
    return Paired(
        batch=batch, dense=median(one for one, _ in took), converted=median(other for _, other in took),
        speedup=median(one / other for one, other in took), pairs=len(took),
        computed=sum(each.executed_macs for each in used) / max(1, sum(each.dense_macs for each in used)),
        threads=torch.get_num_threads(), device=str(device),
    )  # fmt: skip


def _once(model: nn.Module, inputs: Inputs, call: Call, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call(model, inputs)
    synchronize(device)
    return time.perf_counter() - start


BUDGETS = (0.25, 0.5, 0.75)
TAUS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 1.0)
THRESHOLDS = (*(step / 20 for step in range(20)), 0.975, 0.99, 0.999, 2.0)
"""Of an exit's largest probability; 2 stops nowhere."""
STEPS = 6
"""Halvings between two settings of the grid."""

Scope = Literal["ffn", "model"]
Run = Callable[[Gate], Pass]


@dataclass(frozen=True, eq=False)
class Sweep:
    """All settings that were tried, in order.

    Attributes:
        kind: Of gate.
        values: tau, or k.
        validation: A pass of each.
        test: Likewise.
    """

    kind: GateKind
    values: tuple[float, ...]
    validation: tuple[Pass, ...]
    test: tuple[Pass, ...]


@dataclass(frozen=True, kw_only=True)
class Point:
    """What a budget came to.

    Attributes:
        scope: Whose cost is bounded: that of the feed-forward networks or the model's.
        budget: Share of the dense cost.
        at: Number of the setting, chosen on validation data; None where none is cheap enough.
        cheapest: Share of the cheapest setting on validation data.
    """

    scope: Scope
    budget: float
    at: int | None
    cheapest: float


def share_of(one: Pass, scope: Scope) -> float:
    """Of the dense cost."""
    return one.ffn_share if scope == "ffn" else one.share


def sweep(
    kind: GateKind,
    *,
    most: int,
    validation: Run,
    test: Run,
    budgets: Sequence[float] = BUDGETS,
    also: Sequence[float] = (),
) -> Sweep:
    """Try a grid of settings, and the ones between that come nearest to the budgets on validation data.

    Args:
        kind: Of gate.
        most: Most experts of a layer.
        validation: A pass over validation data.
        test: A pass over test data.
        budgets: Shares of the networks' and of the model's dense cost.
        also: Settings besides.
    """
    found: dict[float, Pass] = {}

    def look(value: float) -> Pass:
        if value not in found:
            found[value] = validation(_gate(kind, value))
        return found[value]

    grid = _grid(kind, most) | set(also)
    for value in sorted(grid):
        look(value)
    scopes: tuple[Scope, ...] = ("ffn", "model")
    for scope in scopes:
        for budget in budgets:
            _approach(found, look, scope, budget, whole=kind == "top_k")
    values = tuple(sorted(found))
    return Sweep(
        kind, values, tuple(found[value] for value in values), tuple(test(_gate(kind, value)) for value in values)
    )


def points(swept: Sweep, *, budgets: Sequence[float] = BUDGETS) -> tuple[Point, ...]:
    """For each budget the setting with the largest cost within it, on validation data."""
    scopes: tuple[Scope, ...] = ("ffn", "model")
    return tuple(_point(swept, scope, budget) for scope in scopes for budget in budgets)


@dataclass(frozen=True, kw_only=True)
class Stop:
    """A setting of gate and exits.

    Attributes:
        at: Number of the gate's setting.
        threshold: Of the largest probability.
        accuracy: On test data.
        share: Of the dense model's cost, on test data.
        by_exit: Share of samples that each exit answers.
    """

    at: int
    threshold: float
    accuracy: float
    share: float
    by_exit: tuple[float, ...]


def stopped(one: Pass, threshold: float) -> tuple[float, float, Tensor]:
    """(accuracy, share of the dense cost, share of samples by exit) with the first exit that is sure enough."""
    sure_KN = one.confidence_KN >= threshold
    sure_KN = torch.cat([sure_KN[:-1], torch.ones_like(sure_KN[-1:])])
    exit_N = sure_KN.int().argmax(0)  # the first of the largest
    right_N = one.right_KN.gather(0, exit_N[None])[0]
    cost_N = one.cost_KN.gather(0, exit_N[None])[0]
    by_exit = torch.bincount(exit_N, minlength=len(sure_KN)).double() / max(1, len(exit_N))
    return float(right_N.sum() / one.asked_N.sum()), float(cost_N.sum() / one.dense_N.sum()), by_exit


def combined(
    swept: Sweep, *, gates: Sequence[int] | None = None, thresholds: Sequence[float] = THRESHOLDS
) -> list[Stop]:
    """The settings of gate and exits together that nothing cheaper beats on validation data, cheapest first.

    Args:
        swept: Of a model with exits.
        gates: Numbers of gate settings; None for all.
        thresholds: Of the exits.
    """
    tried = _tried(swept, gates, thresholds)
    best, front = -1.0, []
    for accuracy, _, at, threshold in sorted(tried, key=lambda one: (one[1], -one[0])):
        if accuracy > best:
            best = accuracy
            test_accuracy, share, by_exit = stopped(swept.test[at], threshold)
            front.append(
                Stop(at=at, threshold=threshold, accuracy=test_accuracy, share=share, by_exit=tuple(by_exit.tolist()))
            )
    return front


def best_within(
    swept: Sweep, budget: float, *, gates: Sequence[int] | None = None, thresholds: Sequence[float] = THRESHOLDS
) -> Stop | None:
    """The setting of gate and exits that is the most accurate within a budget, on validation data; None: none is.

    Of equals the cheapest. Accuracy and cost are those on test data.
    """
    tried = _tried(swept, gates, thresholds)
    within = [one for one in tried if one[1] <= budget]
    if not within:
        return None
    _, _, at, threshold = max(within, key=lambda one: (one[0], -one[1]))
    accuracy, share, by_exit = stopped(swept.test[at], threshold)
    return Stop(at=at, threshold=threshold, accuracy=accuracy, share=share, by_exit=tuple(by_exit.tolist()))


def _tried(
    swept: Sweep, gates: Sequence[int] | None, thresholds: Sequence[float]
) -> list[tuple[float, float, int, float]]:
    """(accuracy, share, number of the gate's setting, threshold) on validation data."""
    numbers = range(len(swept.values)) if gates is None else gates
    return [
        (*stopped(swept.validation[at], threshold)[:2], at, threshold) for at in numbers for threshold in thresholds
    ]


def _point(swept: Sweep, scope: Scope, budget: float) -> Point:
    shares = [share_of(one, scope) for one in swept.validation]
    within = [at for at, share in enumerate(shares) if share <= budget]
    at = max(within, key=lambda at: (shares[at], swept.values[at])) if within else None
    return Point(scope=scope, budget=budget, at=at, cheapest=min(shares))


def _approach(
    found: dict[float, Pass], look: Callable[[float], Pass], scope: Scope, budget: float, *, whole: bool
) -> None:
    """Halve the gap between the settings on either side of a budget."""
    for _ in range(STEPS):
        below = [value for value in found if share_of(found[value], scope) <= budget]
        if not below:
            return
        low = max(below)
        above = [value for value in found if value > low]
        if not above:
            return
        middle = (low + min(above)) / 2
        if whole and middle != int(middle):
            middle = float(int(middle))
        if middle in found:
            return
        look(middle)


def _grid(kind: GateKind, most: int) -> set[float]:
    if kind != "top_k":
        return set(TAUS)
    step = max(1, most // 16)
    return {float(k) for k in (1, *range(step, most + 1, step), most)}


def _gate(kind: GateKind, value: float) -> Gate:
    return gate_of(kind, k=int(value)) if kind == "top_k" else gate_of(kind, tau=value)
