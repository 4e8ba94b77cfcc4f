"""Choice between executors by estimated cost.

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
    merged_groups,
    per_token,
    reference,
)
from clframe.moe.kernel_check import kernels_agree
from clframe.moe.split_products import FEW_ROWS, parts_of
from clframe.moe.triton_experts import run_masked, run_triton, triton_works
from clframe.moe.triton_launch import FUSED_NEURONS, precision

Name = Literal["reference", "dense", "per_token", "grouped", "grouped_mm", "triton"]


class Costs(NamedTuple):
    """Overheads of an executor in addition to its matrix products.

    Attributes:
        call: Per call, in MACs of one thread.
        start: Per expert with at least one token, in MACs of one thread.
        pair: Per (token, expert) pair, for gathering the token and adding back the result, in hidden neurons.
    """

    call: float
    start: float
    pair: float


GROUPED, PRODUCT = Costs(1e6, 1.1e6, 38.0), Costs(3e6, 2.1e5, 42.0)
"""Expert by expert, and as one grouped product."""
WIDE = 64
"""Number of neurons from which the product of an expert with few tokens is divided among threads."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Cost model of the executors on a CPU; the cheapest is chosen.

    The defaults approximate a least-squares fit to measurements on one thread of a server processor at 65e9 MACs/s
    (``perf/expert_costs.py``; median error 8 %); the cost of a pair is rounded up because it rises in large batches.
    With several threads gathering and adding back gain half of what products gain, and reading the weights of experts
    below :data:`WIDE` neurons gains nothing. The choice depends on shapes, routing and the number of threads only, so
    runs are reproducible; :func:`~clframe.moe.tuning.tune` measures instead.

    Args:
        few: Maximum number of tokens for execution token by token.
        token: Overhead per (token, expert) pair in execution token by token, in hidden neurons.
        shared: Speedup of the dense layer for one token with more than one thread; experts run one by one gain nothing.
        read: Number of tokens whose products take as long as reading an expert's weights from memory.
        read_all: The same for dense execution, which is slow per MAC for few tokens.
        side_by_side: Speedup of dense execution in parts, one for each thread, for a few tokens; it decreases to 1
            with their number (:func:`~clframe.moe.split_products.parts_of`).
        grouped: Costs of running expert by expert.
        product: Costs of one grouped product for all experts.
        margin: Fraction of the dense cost below which another executor is chosen, because costs are estimates.
        merge: Maximum number of neurons of neighboring experts that are executed as one expert, with masking, where
            that is cheaper. Makes the granularity of execution independent of the granularity of routing.
    """

    few: int = 1
    token: float = 18.0
    shared: float = 1.73
    read: float = 16.0
    read_all: float = 24.0
    side_by_side: float = 1.25
    grouped: Costs = GROUPED
    product: Costs = PRODUCT
    margin: float = 0.9
    merge: int = 128

    def dense_threshold(self, neurons: int, *, threads: int = 1) -> float:
        """Fraction of active experts above which one token is computed densely and masked.

        >>> plan = Plan()
        >>> [round(plan.dense_threshold(size), 2) for size in (128, 6)], round(plan.dense_threshold(128, threads=2), 2)
        ([0.88, 0.25], 0.51)
        """
        return neurons / (neurons + self.token) / (1.0 if threads == 1 else self.shared)


class Choice(NamedTuple):
    """An executor, and the number of neighboring experts executed as one."""

    name: Name
    merged: int = 1


DENSE = Choice("dense")
"""Compute all experts and mask the inactive ones."""


def choose(
    weights: Weights, x_ND: Tensor, keep_NE: Tensor, *, plan: Plan = Plan(), share: float | None = None
) -> Choice:
    """Choose the executor with the lowest estimated cost; on CUDA without synchronizing with the device.

    There ``share`` is used instead of a count, the expected fraction of pairs; None: unknown, the kernels are used.
    """
    if not x_ND.numel() or is_functorch_wrapped_tensor(x_ND):  # a transformed function cannot branch on its values
        return DENSE
    if x_ND.device.type == "cuda":  # counting pairs would synchronize
        return Choice(_on_cuda(weights, x_ND, share))
    tokens, experts, neurons = *keep_NE.shape, weights.up_EHD.shape[1]
    counts: list[int] = keep_NE.sum(0).tolist()
    pairs, active = sum(counts), sum(map(bool, counts))
    if not pairs:
        return DENSE
    if tokens <= plan.few:
        threshold = plan.dense_threshold(neurons, threads=torch.get_num_threads())
        return Choice("per_token") if pairs <= threshold * keep_NE.numel() else DENSE
    inputs, outputs, threads = weights.up_EHD.shape[2], weights.down_EHO.shape[2], torch.get_num_threads()
    macs = (inputs * (1 if weights.gate_EHD is None else 2) + outputs) / threads  # of a neuron

    def cost(of: Costs, active: int, pairs: int, size: int) -> float:
        read = active * plan.read * size * (threads if size < WIDE else 1)
        return of.call + of.start * active + (read + pairs * (size + of.pair * 2 * threads / (1 + threads))) * macs

    best, least = DENSE, (tokens + plan.read_all) * experts * neurons * macs * plan.margin
    if parts_of(x_ND, weights.up_EHD) > 1:
        least /= 1 + (plan.side_by_side - 1) * (1 - tokens * threads / FEW_ROWS)
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


def count_computed_pairs(choice: Choice, keep_NE: Tensor) -> int | Tensor:
    """Number of (token, expert) pairs that an executor computes; on CUDA a tensor, to avoid a synchronization."""
    if choice.name in ("dense", "reference"):
        return keep_NE.numel()
    if choice.merged > 1:
        keep_NE = keep_NE.unflatten(1, (-1, choice.merged)).any(2)
    return keep_NE.sum() * choice.merged


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Context that disables autocast: it would cast, that is copy, the weights of all experts for the few that run."""
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
    share: float | None = None,
) -> Tensor:
    """Compute y_NO with the named executor, or with the one chosen by ``plan``.

    Args:
        weights: Of the experts.
        x_ND: Tokens.
        keep_NE: Mask of experts to run for each token; None runs all.
        weight_NE: Factors of the experts' outputs; None is 1.
        plan: Cost model for the choice.
        executor: Overrides the choice.
        share: Expected fraction of pairs that ``keep_NE`` selects, for the choice on CUDA.
    """
    if keep_NE is None:
        if executor is None:
            return dense(weights, x_ND, None, weight_NE)
        keep_NE = x_ND.new_ones((), dtype=torch.bool).expand(x_ND.shape[0], len(weights.up_EHD))
    choice = choose(weights, x_ND, keep_NE, plan=plan, share=share) if executor is None else Choice(executor)
    if choice.merged > 1:
        return merged_groups(weights, x_ND, keep_NE, weight_NE, many=choice.merged)
    uses_kernels = choice.name in KERNELS and x_ND.is_cuda
    if uses_kernels and not kernels_agree(EXECUTORS[choice.name], weights, x_ND, keep_NE, weight_NE):
        return dense(weights, x_ND, keep_NE, weight_NE)
    return EXECUTORS[choice.name](weights, x_ND, keep_NE, weight_NE)


def run_dense(weights: Weights, x_ND: Tensor, keep_NE: Tensor, weight_NE: Tensor | None = None) -> Tensor:
    """Compute all experts and mask them; on CUDA without gradients in the kernel of the activation."""
    if x_ND.is_cuda and not torch.is_grad_enabled() and x_ND.numel() and triton_works(weights, x_ND):
        return run_masked(weights, x_ND, keep_NE, weight_NE)
    return dense(weights, x_ND, keep_NE, weight_NE)


EXECUTORS: Mapping[Name, Executor] = {
    "reference": reference,
    "dense": run_dense,
    "per_token": per_token,
    "grouped": grouped,
    "grouped_mm": grouped_mm,
    "triton": run_triton,
}


KERNELS: tuple[Name, ...] = ("dense", "triton")
"""Executors with own kernels on a GPU, which are compared with plain products at their first call, chosen or named."""
BREAK_EVEN, BREAK_EVEN_TF32 = 0.44, 0.2
"""Fraction of pairs up to which the kernels are faster on a GPU than all experts with masking; docs/performance.md.
PyTorch's products gain more by TensorFloat-32 than the kernels."""


def _on_cuda(weights: Weights, x_ND: Tensor, share: float | None) -> Name:
    """Choose by size, type and expected share; few tokens are faster densely. Measured on an H200."""
    # Factors of experts with several tiles get their gradient by atomics.
    exact = torch.are_deterministic_algorithms_enabled() and weights.up_EHD.shape[1] > FUSED_NEURONS
    if not triton_works(weights, x_ND) or exact:
        return "grouped_mm" if grouped_mm_works(weights, x_ND) else "grouped"
    tf32 = x_ND.dtype is torch.float32 and precision() == "tf32"
    if share is not None and share > (BREAK_EVEN_TF32 if tf32 else BREAK_EVEN):
        return "dense"
    return "triton" if len(x_ND) > (512 if x_ND.dtype is torch.float32 else 4096) else "dense"
