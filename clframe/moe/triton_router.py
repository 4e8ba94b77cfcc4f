"""Router and gate in one Triton kernel, which is compared with plain operations at its first call.

Shape suffixes: N tokens, D inputs, E experts, W width of a router's hidden layer.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._python_dispatch import _disable_current_modes

from clframe.errors import reason_of
from clframe.moe.kernel_check import TOLERANCE, tokens_to_compare
from clframe.moe.router import DynamicK, Gate, NormRouter, Router, TopK
from clframe.moe.triton_launch import device_of, power_of_2, precision
from clframe.sparsity.top_p import triton_installed

_log = logging.getLogger(__name__)

MOST_EXPERTS, MOST_WIDTH = 128, 256
"""Sizes up to which the scores of a tile of tokens stay in registers."""

ROWS, WARPS = 64, 4
"""Tokens of one program, and its warps."""

_agrees: dict[tuple[object, ...], bool] = {}


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


def routes_agree(router: NormRouter, gate: DynamicK | TopK, x_ND: Tensor) -> bool:
    """Whether :func:`route_tokens` keeps the experts with the scores that the gate asks for.

    Waits for the device at the first call for a kind of gate, shapes, type and device; returns True without comparing
    while a CUDA graph is recorded, which follows eager calls.
    """
    key = type(gate), router.hidden.shape, router.score.shape, x_ND.dtype, x_ND.device, precision()
    if key not in _agrees:
        if x_ND.is_cuda and torch.cuda.is_current_stream_capturing():
            return True
        with _disable_current_modes():  # a mode that counts MACs must not see this
            fault = _find_fault(router, gate, x_ND[tokens_to_compare(x_ND)])
        _agrees[key] = not fault
        if fault:
            _log.warning(
                "experts: the kernel route %s on %s; plain operations are used; please report this with the versions "
                "of torch and triton", fault, x_ND.device,
            )  # fmt: skip
    return _agrees[key]


def _find_fault(router: NormRouter, gate: DynamicK | TopK, x_ND: Tensor) -> str:
    """Description of how the kernel fails on tokens; empty if it agrees."""
    try:
        keep_NE = route_tokens(router, gate, x_ND)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Triton compiles here: its own errors, and those of a missing compiler or driver
        return f"does not run ({reason_of(error, most=160)})"
    wrong = count_wrong(keep_NE, router(x_ND), gate)
    return f"chooses other experts than the router for {wrong} of {len(x_ND)} tokens" if wrong else ""


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
