"""The executors by name and the choice between them.

Shape suffixes: N tokens, E experts, H neurons of an expert, D inputs, O outputs, P (token, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from operator import itemgetter
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from clframe.moe.executors import (
    Executor,
    Weights,
    dense,
    grouped,
    grouped_mm,
    grouped_mm_works,
    merged,
    reference,
    views,
)
from clframe.moe.triton_experts import run_triton, triton_works

Name = Literal["reference", "dense", "views", "grouped", "grouped_mm", "triton"]


class Costs(NamedTuple):
    """What an executor costs beside its products.

    Attributes:
        call: Of being called, in MACs of one thread.
        start: Of each expert that any token keeps, likewise.
        pair: Of each (token, expert) pair, whose token is gathered and whose result is added back, in hidden neurons.
    """

    call: float
    start: float
    pair: float


GROUPED, PRODUCT = Costs(1e6, 1.1e6, 38.0), Costs(3e6, 2.1e5, 54.0)
"""Expert by expert, and as one grouped product."""

@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the executors cost on a CPU; the cheapest is taken.

    The defaults are near least squares through measurements on one thread of a server's processor, 65e9 MACs a second
    (``perf/expert_costs.py``; the median error is 8 %); a pair costs a little more than those say, because it does so
    in large batches. The choice is a function of shapes, routing and the number of threads, and never of the clock, so
    that a run can be repeated.

    Args:
        few: Up to how many tokens experts are run token by token.
        token: What a (token, expert) pair costs then, beside its products, in hidden neurons.
        shared: How much faster more threads make the dense layer for one token, and not experts run one by one.
        read: Tokens whose products take as long as reading an expert's weights from memory.
        read_all: The same where everything is computed, which is slow for its MACs where tokens are few.
        grouped: Of running expert by expert.
        product: Of one grouped product for all of them.
        margin: Share of the cost of computing everything that another way must stay below, since costs are estimates.
        merge: Neighboring experts run as one of at most so many neurons, those that a token does not keep masked,
            where that is cheaper: how finely tokens are routed is another thing than how much is run at once.
    """

    few: int = 1
    token: float = 18.0
    shared: float = 1.73
    read: float = 16.0
    read_all: float = 24.0
    grouped: Costs = GROUPED
    product: Costs = PRODUCT
    margin: float = 0.9
    merge: int = 128

    def worth(self, neurons: int, *, threads: int = 1) -> float:
        """The fraction of experts above which everything is computed for one token, and masked.

        >>> round(Plan().worth(128), 2), round(Plan().worth(6), 2), round(Plan().worth(128, threads=2), 2)
        (0.88, 0.25, 0.51)
        """
        return neurons / (neurons + self.token) / (1.0 if threads == 1 else self.shared)


class Choice(NamedTuple):
    """Which executor, and over how many experts at a time."""

    name: Name
    merged: int = 1


DENSE = Choice("dense")
"""Everything computed, and what a token does not keep masked."""


def choose(weights: Weights, x_ND: Tensor, keep_NE: Tensor, *, plan: Plan = Plan()) -> Choice:
    """The executor that should be fastest; on CUDA without waiting for the device."""
    if not x_ND.numel() or is_functorch_wrapped_tensor(x_ND):  # a transformed function cannot branch on its values
        return DENSE
    if x_ND.device.type == "cuda":  # counting pairs would wait for the device
        return Choice(_on_cuda(weights, x_ND))
    tokens, experts, neurons = *keep_NE.shape, weights.up_EHD.shape[1]
    counts: list[int] = keep_NE.sum(0).tolist()
    pairs, active = sum(counts), sum(map(bool, counts))
    if not pairs:
        return DENSE
    if tokens <= plan.few:
        worth = plan.worth(neurons, threads=torch.get_num_threads())
        return Choice("views") if pairs <= worth * keep_NE.numel() else DENSE
    inputs, outputs = weights.up_EHD.shape[2], weights.down_EHO.shape[2]
    macs = (inputs * (1 if weights.gate_EHD is None else 2) + outputs) / torch.get_num_threads()  # of a neuron

    def cost(of: Costs, active: int, pairs: int, size: int) -> float:
        return of.call + of.start * active + (active * plan.read * size + pairs * (size + of.pair)) * macs

    best, least = DENSE, (tokens + plan.read_all) * experts * neurons * macs * plan.margin
    costs = {Choice("grouped"): cost(plan.grouped, active, pairs, neurons)}
    if grouped_mm_works(weights, x_ND):
        costs[Choice("grouped_mm")] = cost(plan.product, active, pairs, neurons)
    best, least = min([(best, least), *costs.items()], key=itemgetter(1))
    for many in range(2, plan.merge // neurons + 1):
        # At best, tokens that keep one of the neighbors keep all of them.
        if experts % many or cost(plan.grouped, -(-active // many), -(-pairs // many), neurons * many) >= least:
            continue
        merged_counts: list[int] = keep_NE.unflatten(1, (-1, many)).any(2).sum(0).tolist()
        wider = cost(plan.grouped, sum(map(bool, merged_counts)), sum(merged_counts), neurons * many)
        if wider < least:
            best, least = Choice("grouped", many), wider
    return best


def computed_pairs(choice: Choice, keep_NE: Tensor) -> int | Tensor:
    """How many (token, expert) pairs an executor computes; on CUDA a tensor, so that nobody waits."""
    if choice.name in ("dense", "reference"):
        return keep_NE.numel()
    if choice.merged > 1:
        keep_NE = keep_NE.unflatten(1, (-1, choice.merged)).any(2)
    return keep_NE.sum() * choice.merged


def full_precision(device: str) -> AbstractContextManager[object]:
    """Autocast off, if it is on: it would cast, that is copy, all weights for the few that are needed."""
    if torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def run(
    weights: Weights,
    x_ND: Tensor,
    keep_NE: Tensor | None,
    weight_NE: Tensor | None = None,
    *,
    plan: Plan = Plan(),
    executor: Name | None = None,
) -> Tensor:
    """y_NO by the executor named, or by the one that should be fastest.

    Args:
        weights: Of the experts.
        x_ND: Tokens.
        keep_NE: Which experts run for which token; None is all of them.
        weight_NE: What each expert's output is multiplied by; None is 1.
        plan: Where the executors' ranges meet.
        executor: A choice of your own.
    """
    if keep_NE is None:
        if executor is None:
            return dense(weights, x_ND, None, weight_NE)
        keep_NE = x_ND.new_ones((), dtype=torch.bool).expand(len(x_ND), len(weights.up_EHD))
    choice = choose(weights, x_ND, keep_NE, plan=plan) if executor is None else Choice(executor)
    if choice.merged > 1:
        return merged(weights, x_ND, keep_NE, weight_NE, many=choice.merged)
    return EXECUTORS[choice.name](weights, x_ND, keep_NE, weight_NE)


EXECUTORS: Mapping[Name, Executor] = {
    "reference": reference,
    "dense": dense,
    "views": views,
    "grouped": grouped,
    "grouped_mm": grouped_mm,
    "triton": run_triton,
}


def _on_cuda(weights: Weights, x_ND: Tensor) -> Name:
    """By size and type alone, as measured on an H100 (docs/performance.md): below, everything computed is faster."""
    if not triton_works(weights, x_ND) or torch.are_deterministic_algorithms_enabled():
        return "grouped_mm" if grouped_mm_works(weights, x_ND) else "grouped"
    return "triton" if len(x_ND) > (512 if x_ND.dtype is torch.float32 else 4096) else "dense"
