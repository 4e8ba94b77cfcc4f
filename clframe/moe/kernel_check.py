"""Check of GPU kernels against plain products, once per process, before their results are used.

A kernel that this version of Triton, driver or device compiles wrongly would change results without an error. So its
first call for weights of some shape and type is compared, on a few of the tokens at hand, with PyTorch's own products.

Shape suffixes: N tokens, E experts.
"""

from __future__ import annotations

import logging
import math
from typing import Final

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.utils._python_dispatch import _disable_current_modes

from clframe.errors import reason_of
from clframe.moe.executors import Executor, Weights, dense
from clframe.moe.triton_experts import activation_code
from clframe.moe.triton_launch import precision

_log = logging.getLogger(__name__)

TOKENS: Final = 300
"""Tokens that are compared: two tiles of the largest kernel and a part of one, for an expert that all of them keep."""
TOLERANCE: Final = {torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest difference as a share of the largest value; products in single precision may use TensorFloat-32."""

_agrees: dict[tuple[object, ...], bool] = {}


def kernels_agree(
    executor: Executor, weights: Weights, x_ND: Tensor, keep_NE: Tensor, weight_NE: Tensor | None
) -> bool:
    """Whether an executor computes what :func:`~clframe.moe.executors.dense` does, with gradients where they are on.

    Waits for the device at the first call for an executor, kind of weights, type, device and use. Returns True without
    comparing without tokens, in a transformed or traced function, and while a CUDA graph is recorded, which follows
    eager steps.
    """
    if not x_ND.numel() or is_functorch_wrapped_tensor(x_ND) or torch.compiler.is_compiling():
        return True
    learns = torch.is_grad_enabled()
    shapes = tuple(None if part is None else part.shape for part in weights.tensors())
    code = activation_code(weights.activation)  # the activation itself may differ from layer to layer
    key = executor, shapes, x_ND.dtype, x_ND.device, precision(), code, weight_NE is None, learns
    if key not in _agrees:
        if x_ND.is_cuda and torch.cuda.is_current_stream_capturing():
            return True
        fault = _find_fault(executor, weights, x_ND, keep_NE, weight_NE, learns=learns)
        _agrees[key] = not fault
        if fault:
            _log.warning(
                "experts: the kernel %s %s on %s; plain products are used; please report this with the versions of "
                "torch and triton", getattr(executor, "__name__", executor), fault, x_ND.device,
            )  # fmt: skip
    return _agrees[key]


def _find_fault(
    executor: Executor, weights: Weights, x_ND: Tensor, keep_NE: Tensor, weight_NE: Tensor | None, *, learns: bool
) -> str:
    """Description of how an executor fails on some of the tokens; empty if it agrees."""

    def compute(run: Executor) -> list[Tensor]:
        """Outputs and gradients."""
        x, scale = (
            None if part is None else part.detach()[token_N].requires_grad_(learns) for part in (x_ND, weight_NE)
        )
        assert x is not None
        y_NO = run(weights, x, keep_NE, scale)
        if not learns:
            return [y_NO]
        leaves = [part for part in (x, scale, *weights.tensors()) if part is not None and part.requires_grad]
        factor_NO = torch.linspace(-1, 1, y_NO.numel(), device=y_NO.device, dtype=y_NO.dtype).view_as(y_NO)
        return [y_NO.detach(), *torch.autograd.grad((y_NO * factor_NO).sum(), leaves)]

    with _disable_current_modes():  # a mode that counts MACs must not see this
        token_N = tokens_to_compare(x_ND)
        keep_NE = keep_NE[token_N]
        keep_NE[:, 0] = True  # an expert with several tiles, whatever the gate chose
        expected = compute(dense)
        try:
            found = compute(executor)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # Triton compiles here: its own errors, and those of a missing compiler or driver
            return f"does not run ({reason_of(error, most=160)})"
    difference = max(relative_error(own, plain) for own, plain in zip(found, expected, strict=True))
    agrees = difference <= TOLERANCE[x_ND.dtype]
    return "" if agrees else f"differs from plain products by {difference:.2g} of the largest value"


def tokens_to_compare(x_ND: Tensor) -> Tensor:
    """Indices of :data:`TOKENS` tokens, again from the first one if there are fewer."""
    return torch.arange(TOKENS, device=x_ND.device) % len(x_ND)


def relative_error(own: Tensor, plain: Tensor) -> float:
    """Largest difference as a share of the largest value; infinite for NaN.

    >>> relative_error(torch.tensor([1.0, 5.0]), torch.tensor([2.0, 5.0]))
    0.2...
    """
    own, plain = own.float(), plain.float()
    error = float((own - plain).abs().max() / plain.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
    return math.inf if math.isnan(error) else error
