"""The executors by name and the choice between them.

Shape suffixes: N tokens, E experts, H neurons of an expert, D inputs, O outputs, P (token, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clframe.nn.moe.executors import dense, grouped, reference, token_by_token, views
from clframe.nn.moe.grouped_product import grouped_mm, grouped_mm_works
from clframe.nn.moe.triton_experts import run_triton, triton_works
from clframe.nn.moe.weights import Executor, Weights

Name = Literal["reference", "dense", "views", "grouped", "grouped_mm", "triton"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """From when on which executor is the fastest.

    The defaults were measured on one and two cores for 768 x 3072 in float32 (``perf/expert_race.py``).

    Args:
        few: Up to how many tokens experts are run token by token.
        many: From how many tokens on grouped matrix products lose to one product per expert.
        overhead: What a (token, expert) pair costs beside its products, gathered and added back, in hidden neurons.
        overhead_few: The same where nothing is gathered.
    """

    few: int = 1
    many: int = 512
    overhead: float = 45.0
    overhead_few: float = 20.0

    def worth(self, tokens: int, neurons: int) -> float:
        """The fraction of (token, expert) pairs above which everything is computed and masked.

        >>> round(Plan().worth(197, 128), 2), round(Plan().worth(197, 32), 2)
        (0.74, 0.42)
        """
        return neurons / (neurons + (self.overhead_few if tokens <= self.few else self.overhead))


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
    everything = keep_NE is None
    if keep_NE is None:
        keep_NE = x_ND.new_ones((), dtype=torch.bool).expand(len(x_ND), len(weights.up_EHD))
    if executor is not None:
        return EXECUTORS[executor](weights, x_ND, keep_NE, weight_NE)
    if everything or not x_ND.numel():
        return dense(weights, x_ND, None if everything else keep_NE, weight_NE)
    if x_ND.device.type == "cuda":  # counting pairs would wait for the device
        return EXECUTORS[_on_cuda(weights, x_ND)](weights, x_ND, keep_NE, weight_NE)
    limit = plan.worth(len(x_ND), weights.up_EHD.shape[1]) * keep_NE.numel()
    if len(x_ND) <= plan.few:
        rows: list[list[bool]] = keep_NE.tolist()
        if not 0 < sum(map(sum, rows)) <= limit:
            return dense(weights, x_ND, keep_NE, weight_NE)
        return token_by_token(weights, x_ND, rows, weight_NE)
    if not 0 < int(keep_NE.sum()) <= limit:
        return dense(weights, x_ND, keep_NE, weight_NE)
    if len(x_ND) < plan.many and grouped_mm_works(weights, x_ND):
        return grouped_mm(weights, x_ND, keep_NE, weight_NE)
    return grouped(weights, x_ND, keep_NE, weight_NE)


EXECUTORS: Mapping[Name, Executor] = {
    "reference": reference,
    "dense": dense,
    "views": views,
    "grouped": grouped,
    "grouped_mm": grouped_mm,
    "triton": run_triton,
}


def _on_cuda(weights: Weights, x_ND: Tensor) -> Name:
    if triton_works(weights, x_ND) and not torch.are_deterministic_algorithms_enabled():
        return "triton"
    return "grouped_mm" if grouped_mm_works(weights, x_ND) else "grouped"


