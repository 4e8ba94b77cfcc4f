"""Router and gate in one Triton kernel, which is compared with plain operations at its first call.

Shape suffixes: N tokens, D inputs, E experts, W width of a router's hidden layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clframe.moe.kernel_check import TOLERANCE, tokens_to_compare
from clframe.moe.router import DynamicK, Gate, NormRouter, Router, TopK
from clframe.moe.triton_launch import precision
from clframe.nn.kernels import device_of, is_traced, kernel_agrees, power_of_2, triton_installed

MOST_EXPERTS, MOST_WIDTH = 128, 256
"""Sizes up to which the scores of a tile of tokens stay in registers."""

ROWS, WARPS = 64, 4
"""Tokens of one program, and its warps."""


def can_route(router: Router, gate: Gate, x_ND: Tensor) -> bool:
    """Whether the kernel computes these: norm routers with dynamic-k or top-k gates on CUDA, without autocast."""
    if not x_ND.is_cuda or not x_ND.numel() or torch.is_autocast_enabled("cuda"):
        return False
    if is_traced(x_ND) or type(router) is not NormRouter or not isinstance(gate, (DynamicK, TopK)):
        return False
    known = x_ND.dtype in (torch.float32, torch.bfloat16, torch.float16) and x_ND.dtype == router.hidden.dtype
    experts, width = router.score.shape
    return known and experts <= MOST_EXPERTS and width <= MOST_WIDTH and triton_installed()


def routes_agree(router: NormRouter, gate: DynamicK | TopK, x_ND: Tensor) -> bool:
    """Whether :func:`route_tokens` keeps the experts with the scores that the gate asks for.

    Waits for the device at the first call for a kind of gate, shapes, type and device; returns True without comparing
    while a CUDA graph is recorded, which follows eager calls.
    """
    kind = type(gate), router.hidden.shape, router.score.shape, x_ND.dtype, x_ND.device, precision()

    def sample() -> Tensor:
        return x_ND[tokens_to_compare(x_ND)]

    def find_fault(keep_NE: Tensor) -> str:
        wrong = count_wrong(keep_NE, router(sample()), gate)
        return f"chooses other experts than the router for {wrong} of {len(keep_NE)} tokens" if wrong else ""

    return kernel_agrees(
        "experts: the kernel route", kind, x_ND, run=lambda: route_tokens(router, gate, sample()),
        find_fault=find_fault, fallback="plain operations are used",
    )  # fmt: skip


def count_wrong(keep_NE: Tensor, scores_NE: Tensor, gate: DynamicK | TopK) -> int:
    """Number of tokens whose experts do not follow from their scores.

    Experts with a score next to the lowest that is kept may be kept or not, for rounding: their distance to it is at
    most ``TOLERANCE`` of the token's highest score. Tokens with scores that are not finite are left out.

    >>> scores = torch.tensor([[1.0, 0.5, 0.2], [1.0, 0.999, 0.0]])
    >>> count_wrong(torch.tensor([[True, False, False], [False, True, False]]), scores, TopK(k=1))
    0
    >>> count_wrong(torch.tensor([[True, True, False], [False, True, False]]), scores, TopK(k=1))
    1
    """
    rounding, scores_NE = TOLERANCE[scores_NE.dtype], scores_NE.float()
    count, top_N1 = keep_NE.sum(1), scores_NE.amax(1, keepdim=True)
    if isinstance(gate, TopK):
        k = min(gate.k, scores_NE.shape[1])
        least_N1, miscounted_N = scores_NE.topk(k).values[:, -1:], count != k
    else:
        least_N1, miscounted_N = (1 - gate.tau) * top_N1, count == 0
    too_low_NE = keep_NE & (scores_NE < least_N1 - rounding * top_N1)
    left_out_NE = ~keep_NE & (scores_NE > least_N1 + rounding * top_N1)
    wrong_N = (too_low_NE | left_out_NE).any(1) | miscounted_N
    return int((wrong_N & scores_NE.isfinite().all(1)).sum())


def route_tokens(router: NormRouter, gate: DynamicK | TopK, x_ND: Tensor) -> Tensor:
    """Mask keep_NE of the experts that the gate chooses.

    Differs from ``gate(router(x_ND))`` in that scores are not rounded to half precision before they are compared, and
    that of equal scores top-k takes the first.
    """
    from clframe.moe.triton_routing import route

    (experts, neurons), width = router.score.shape, x_ND.shape[1]
    keep_NE = torch.empty(len(x_ND), experts, dtype=torch.bool, device=x_ND.device)
    top = isinstance(gate, TopK)
    least, k = (0.0, gate.k) if isinstance(gate, TopK) else (1 - gate.tau, 0)
    inner = 32 if x_ND.dtype is torch.float32 else 64
    with device_of(x_ND):
        route[(-(-len(x_ND) // ROWS),)](
            x_ND.contiguous(), router.hidden.contiguous(), router.score.contiguous(), keep_NE.view(torch.int8),
            len(x_ND), float(least), k, experts, width, neurons, top=top, precision=precision(), ROWS=ROWS, INNER=inner,
            HIDDEN=power_of_2(neurons), EXPERTS=power_of_2(experts), num_warps=WARPS, num_stages=3,
        )  # fmt: skip
    return keep_NE
