"""Check of GPU kernels against plain products, once per process, before their results are used.

A kernel that this version of Triton, driver or device compiles wrongly would change results without an error. So its
first call for weights of some shape and type is compared, on a few of the tokens at hand, with PyTorch's own products.

Shape suffixes: N tokens, E experts.
"""

from __future__ import annotations

import logging
from typing import Final

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._python_dispatch import _disable_current_modes

from clframe.moe.executors import Executor, Weights, dense

_log = logging.getLogger(__name__)

TOKENS: Final = 64
"""Tokens that are compared."""
TOLERANCE: Final = {torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest difference as a share of the largest value; products in single precision may use TensorFloat-32."""

_agrees: dict[tuple[object, ...], bool] = {}


def kernels_agree(
    executor: Executor, weights: Weights, x_ND: Tensor, keep_NE: Tensor, weight_NE: Tensor | None
) -> bool:
    """Whether an executor computes what :func:`~clframe.moe.executors.dense` does, with gradients where they are on.

    Waits for the device at the first call for an executor, shape, type, device and use. Returns True without comparing
    without tokens, in a transformed or traced function, and while a CUDA graph is recorded, which follows
    eager steps.
    """
    if not x_ND.numel() or is_functorch_wrapped_tensor(x_ND) or torch.compiler.is_compiling():
        return True
    learns = torch.is_grad_enabled()
    shapes = tuple(None if part is None else part.shape for part in weights.tensors())
    key = executor, shapes, x_ND.dtype, x_ND.device, weights.activation, weight_NE is None, learns
    if key not in _agrees:
        if x_ND.is_cuda and torch.cuda.is_current_stream_capturing():
            return True
        error = _largest_error(executor, weights, x_ND, keep_NE, weight_NE, learns=learns)
        _agrees[key] = error <= TOLERANCE[x_ND.dtype]
        if not _agrees[key]:
            _log.warning(
                "experts: the kernel %s differs from plain products by %.2g of the largest value on %s; plain products "
                "are used; please report this with the versions of torch and triton",
                getattr(executor, "__name__", executor), error, x_ND.device,
            )  # fmt: skip
    return _agrees[key]


def _largest_error(
    executor: Executor, weights: Weights, x_ND: Tensor, keep_NE: Tensor, weight_NE: Tensor | None, *, learns: bool
) -> float:
    """Largest difference of outputs, and of gradients, as a share of their largest value; infinite for NaN."""
    keep_NE = keep_NE[:TOKENS]
    weight_NE = None if weight_NE is None else weight_NE[:TOKENS].detach()
    found = []
    with _disable_current_modes():  # a mode that counts MACs must not see this
        for run in (executor, dense):
            x = x_ND[:TOKENS].detach().clone().requires_grad_(learns)
            y_NO = run(weights, x, keep_NE, weight_NE)
            results = [y_NO.detach()]
            if learns:
                leaves = [x, *(part for part in weights.tensors() if part is not None and part.requires_grad)]
                factor_NO = torch.linspace(-1, 1, y_NO.numel(), device=y_NO.device, dtype=y_NO.dtype).view_as(y_NO)
                results += torch.autograd.grad((y_NO * factor_NO).sum(), leaves)
            found.append([result.float() for result in results])
    worst = 0.0
    for own, plain in zip(*found, strict=True):
        error = float((own - plain).abs().max() / plain.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
        worst = max(worst, error if error == error else float("inf"))
    return worst
