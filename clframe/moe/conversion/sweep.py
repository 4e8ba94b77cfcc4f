"""Accuracy against cost over settings of the gate, and latency compared with the dense model.

Shape suffixes: K exits, N samples.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch
from torch import Tensor, nn

from clframe.accounting.measurement import synchronize
from clframe.moe.conversion.measure import Pass
from clframe.moe.pipeline import GateKind, make_gate
from clframe.moe.router import Gate
from clframe.moe.usage import count_usage
from clframe.nn.frozen import evaluating
from clframe.nn.types import Inputs

Call = Callable[[nn.Module, Inputs], object]
Phase = Literal["forward", "prefill", "decode"]


@dataclass(frozen=True, kw_only=True)
class PairedTiming:
    """Median latency of both models.

    Attributes:
        batch: Batch size.
        dense: Seconds per call of the dense model.
        converted: Seconds per call of the converted model.
        speedup: Median over pairs of the ratio dense / converted.
        pairs: Number of pairs.
        computed: Fraction of the networks' MACs that is computed, including routers. Larger than the fraction chosen by
            the gate where dense execution with masking is faster, or where small experts are executed in groups.
        threads: Number of threads of PyTorch.
        device: Device of the measurement.
        phase: ``forward``; of a language model ``prefill``, whole windows, or ``decode``, one token of each text with
            the KV cache of the tokens before it.
    """

    batch: int
    dense: float
    converted: float
    speedup: float
    pairs: int
    computed: float
    threads: int
    device: str
    phase: Phase = "forward"


def time_pair(
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
    phase: Phase = "forward",
) -> PairedTiming:
    """Time both models on the same inputs, in alternation, so that fluctuations of the machine affect both.

    Args:
        dense: The dense model.
        converted: The converted model with the gate to measure.
        inputs: Inputs of one batch.
        batch: Its number of samples.
        call: Runs a model.
        pairs: Maximum number of timed pairs of calls.
        least: Minimum number of timed pairs.
        seconds: Time budget after which no further pair starts, if the minimum is reached.
        warmup: Pairs that are not timed.
        phase: Recorded with the result.
    """
    device = next(converted.parameters()).device
    took: list[tuple[float, float]] = []
    with evaluating(dense), evaluating(converted):
        end = time.perf_counter() + seconds
        while len(took) < warmup + pairs and (time.perf_counter() < end or len(took) < warmup + least):
            took.append((_once(dense, inputs, call, device), _once(converted, inputs, call, device)))
        with count_usage(converted) as usage:
            call(converted, inputs)
    took, used = took[warmup:], usage().values()
    return PairedTiming(
        batch=batch, dense=median(one for one, _ in took), converted=median(other for _, other in took),
        speedup=median(one / other for one, other in took), pairs=len(took),
        computed=sum(each.executed_macs for each in used) / max(1, sum(each.dense_macs for each in used)),
        threads=torch.get_num_threads(), device=str(device), phase=phase,
    )  # fmt: skip


def time_decoding(
    dense: nn.Module, converted: nn.Module, inputs: Inputs, *, batch: int, pairs: int = 20
) -> PairedTiming:
    """Time the decoding of one token of each text by two language models of transformers, each with its KV cache.

    The caches begin with the texts and grow by a token with each call, those of both models alike.

    Args:
        dense: The dense model.
        converted: The converted model with the gate to measure.
        inputs: Texts of one batch; padding is read as text.
        batch: Its number of texts.
        pairs: Maximum number of timed pairs of calls.
    """
    assert isinstance(inputs, Mapping)
    ids_BT, calls = inputs["input_ids"], pairs + 5
    most = getattr(getattr(dense, "config", None), "max_position_embeddings", None)
    if most is not None:
        ids_BT = ids_BT[:, : max(1, most - calls)]
    # Renamed in transformers 5; the old name is deprecated.
    name = "cache" if "cache" in inspect.signature(dense.forward).parameters else "past_key_values"
    caches: dict[int, object] = {}
    for model in (dense, converted):
        with evaluating(model):
            caches[id(model)] = getattr(model(input_ids=ids_BT, use_cache=True), name)

    def decode(model: nn.Module, inputs: Inputs) -> object:
        assert isinstance(inputs, Mapping)
        return model(**inputs, **{name: caches[id(model)]}, use_cache=True)

    last = {"input_ids": ids_BT[:, -1:]}
    return time_pair(dense, converted, last, batch=batch, call=decode, pairs=pairs, phase="decode")


def _once(model: nn.Module, inputs: Inputs, call: Call, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    call(model, inputs)
    synchronize(device)
    return time.perf_counter() - start


BUDGETS = (0.25, 0.5, 0.75)
TAUS = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 1.0)
THRESHOLDS = (*(step / 20 for step in range(20)), 0.975, 0.99, 0.999, 2.0)
"""Confidence thresholds of an exit; 2 disables early exits."""
STEPS = 6
"""Bisection steps between two settings of the grid."""

Scope = Literal["ffn", "model"]
Run = Callable[[Gate], Pass]


@dataclass(frozen=True, eq=False)
class Sweep:
    """Passes of all evaluated settings, in increasing order.

    Attributes:
        kind: Kind of gate.
        values: tau or k.
        validation: The pass of each setting over validation data.
        test: The pass of each setting over test data.
    """

    kind: GateKind
    values: tuple[float, ...]
    validation: tuple[Pass, ...]
    test: tuple[Pass, ...]


@dataclass(frozen=True, kw_only=True)
class BudgetPoint:
    """Setting selected for a budget.

    Attributes:
        scope: Bounded cost: of the feed-forward networks or of the model.
        budget: Fraction of the dense cost.
        at: Index of the setting, selected on validation data; None if no setting is within the budget.
        cheapest: Relative cost of the cheapest setting on validation data.
    """

    scope: Scope
    budget: float
    at: int | None
    cheapest: float


def cost_share(one: Pass, scope: Scope) -> float:
    """Cost as a fraction of the dense cost."""
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
    """Evaluate a grid of settings, refined by bisection towards the budgets on validation data.

    Args:
        kind: Kind of gate.
        most: Maximum number of experts of a layer.
        validation: Evaluates a gate on validation data.
        test: Evaluates a gate on test data.
        budgets: Fractions of the networks' and of the model's dense cost.
        also: Additional settings.
    """
    found: dict[float, Pass] = {}

    def evaluate(value: float) -> Pass:
        if value not in found:
            found[value] = validation(gate_at(kind, value))
        return found[value]

    grid = setting_grid(kind, most) | set(also)
    for value in sorted(grid):
        evaluate(value)
    scopes: tuple[Scope, ...] = ("ffn", "model")
    for scope in scopes:
        for budget in budgets:
            _approach(found, evaluate, scope, budget, whole=kind == "top_k")
    values = tuple(sorted(found))
    return Sweep(
        kind, values, tuple(found[value] for value in values), tuple(test(gate_at(kind, value)) for value in values)
    )


def points(swept: Sweep, *, budgets: Sequence[float] = BUDGETS) -> tuple[BudgetPoint, ...]:
    """For each budget the setting with the largest cost within it, on validation data."""
    scopes: tuple[Scope, ...] = ("ffn", "model")
    return tuple(_point(swept, scope, budget) for scope in scopes for budget in budgets)


@dataclass(frozen=True, kw_only=True)
class ExitSetting:
    """A setting of gate and exit threshold.

    Attributes:
        at: Index of the gate's setting.
        threshold: Of the largest probability.
        accuracy: On test data.
        share: Fraction of the dense model's cost on test data.
        by_exit: Fraction of samples predicted by each exit.
    """

    at: int
    threshold: float
    accuracy: float
    share: float
    by_exit: tuple[float, ...]


def evaluate_threshold(one: Pass, threshold: float) -> tuple[float, float, Tensor]:
    """(accuracy, fraction of the dense cost, fraction of samples by exit) if the first confident exit predicts."""
    sure_KN = one.confidence_KN >= threshold
    sure_KN = torch.cat([sure_KN[:-1], torch.ones_like(sure_KN[-1:])])  # the last exit always predicts
    exit_N = sure_KN.int().argmax(0)  # argmax returns the first of equal values
    right_N = one.correct_KN.gather(0, exit_N[None])[0]
    cost_N = one.cost_KN.gather(0, exit_N[None])[0]
    by_exit = torch.bincount(exit_N, minlength=len(sure_KN)).double() / max(1, len(exit_N))
    return float(right_N.sum() / one.targets_N.sum()), float(cost_N.sum() / one.dense_N.sum()), by_exit


def pareto_front(
    swept: Sweep, *, gates: Sequence[int] | None = None, thresholds: Sequence[float] = THRESHOLDS
) -> list[ExitSetting]:
    """Settings of gate and exits on the Pareto front of validation data, cheapest first.

    Args:
        swept: Sweep of a model with exits.
        gates: Indices of gate settings; None for all.
        thresholds: Thresholds of the exits.
    """
    tried = _all_settings(swept, gates, thresholds)
    best, front = -1.0, []
    for accuracy, _, at, threshold in sorted(tried, key=lambda one: (one[1], -one[0])):
        if accuracy > best:
            best = accuracy
            front.append(_on_test(swept, at, threshold))
    return front


def best_within_budget(
    swept: Sweep, budget: float, *, gates: Sequence[int] | None = None, thresholds: Sequence[float] = THRESHOLDS
) -> ExitSetting | None:
    """Most accurate setting of gate and exits within a budget on validation data, or None.

    Ties go to the cheapest. Accuracy and cost are those on test data.
    """
    tried = _all_settings(swept, gates, thresholds)
    within = [one for one in tried if one[1] <= budget]
    if not within:
        return None
    _, _, at, threshold = max(within, key=lambda one: (one[0], -one[1]))
    return _on_test(swept, at, threshold)


def _on_test(swept: Sweep, at: int, threshold: float) -> ExitSetting:
    accuracy, share, by_exit = evaluate_threshold(swept.test[at], threshold)
    return ExitSetting(at=at, threshold=threshold, accuracy=accuracy, share=share, by_exit=tuple(by_exit.tolist()))


def _all_settings(
    swept: Sweep, gates: Sequence[int] | None, thresholds: Sequence[float]
) -> list[tuple[float, float, int, float]]:
    """(accuracy, relative cost, index of the gate's setting, threshold) on validation data."""
    numbers = range(len(swept.values)) if gates is None else gates
    return [
        (*evaluate_threshold(swept.validation[at], threshold)[:2], at, threshold)
        for at in numbers
        for threshold in thresholds
    ]


def _point(swept: Sweep, scope: Scope, budget: float) -> BudgetPoint:
    shares = [cost_share(one, scope) for one in swept.validation]
    within = [at for at, share in enumerate(shares) if share <= budget]
    at = max(within, key=lambda at: (shares[at], swept.values[at])) if within else None
    return BudgetPoint(scope=scope, budget=budget, at=at, cheapest=min(shares))


def _approach(
    found: dict[float, Pass], evaluate: Callable[[float], Pass], scope: Scope, budget: float, *, whole: bool
) -> None:
    """Bisect between the settings on either side of a budget."""
    for _ in range(STEPS):
        below = [value for value in found if cost_share(found[value], scope) <= budget]
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
        evaluate(middle)


def setting_grid(kind: GateKind, most: int) -> set[float]:
    """Settings that are always evaluated: k up to ``most`` experts, or tau."""
    if kind != "top_k":
        return set(TAUS)
    step = max(1, most // 16)
    return {float(k) for k in (1, *range(step, most + 1, step), most)}


def gate_at(kind: GateKind, value: float) -> Gate:
    """The gate at a setting: k, or tau."""
    return make_gate(kind, k=int(value)) if kind == "top_k" else make_gate(kind, tau=value)
