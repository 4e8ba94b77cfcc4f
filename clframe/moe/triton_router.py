"""Router and gate in one Triton kernel.

Shape suffixes: N tokens, D inputs, E experts, W width of a router's hidden layer.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from clframe.moe.router import DynamicK, Gate, NormRouter, Router, TopK
from clframe.moe.triton_experts import triton_installed
from clframe.moe.triton_launch import device_of, power_of_2, precision

MOST_EXPERTS, MOST_WIDTH = 128, 256
"""Sizes up to which the scores of a tile of tokens stay in registers."""

ROWS, WARPS = 64, 4


def can_route(router: Router, gate: Gate, x_ND: Tensor) -> bool:
    """Whether the kernel computes these: norm routers with dynamic-k or top-k gates on CUDA, without autocast."""
    if not x_ND.is_cuda or not x_ND.numel() or torch.is_autocast_enabled("cuda"):
        return False
    if is_functorch_wrapped_tensor(x_ND) or torch.compiler.is_compiling():  # neither traces these launches
        return False
    if type(router) is not NormRouter or not isinstance(gate, (DynamicK, TopK)):
        return False
    known = x_ND.dtype in (torch.float32, torch.bfloat16, torch.float16) and x_ND.dtype == router.hidden.dtype
    experts, width = router.score.shape
    return known and experts <= MOST_EXPERTS and width <= MOST_WIDTH and triton_installed()


def route_tokens(router: NormRouter, gate: DynamicK | TopK, x_ND: Tensor) -> Tensor:
    """Mask keep_NE of the experts that the gate chooses.

    Differs from ``gate(router(x_ND))`` in that scores are not rounded to half precision before they are compared, and
    that of equal scores top-k takes the first.
    """
    from clframe.moe.triton_routing import route

    (experts, width), inputs = router.score.shape, x_ND.shape[1]
    keep_NE = torch.empty(len(x_ND), experts, dtype=torch.bool, device=x_ND.device)
    top = isinstance(gate, TopK)
    least, k = (0.0, gate.k) if isinstance(gate, TopK) else (1 - gate.tau, 0)
    inner = 32 if x_ND.dtype is torch.float32 else 64
    with device_of(x_ND):
        route[(-(-len(x_ND) // ROWS),)](
            x_ND.contiguous(), router.hidden.contiguous(), router.score.contiguous(), keep_NE.view(torch.int8),
            len(x_ND), float(least), k, experts, inputs, width, top=top, precision=precision(), ROWS=ROWS, INNER=inner,
            HIDDEN=power_of_2(width), EXPERTS=power_of_2(experts), num_warps=WARPS, num_stages=3,
        )  # fmt: skip
    return keep_NE
