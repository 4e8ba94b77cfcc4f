"""Comparison of the GPU kernels of experts with PyTorch's own products at their first call, on a few of its tokens.

Shape suffixes: N tokens, E experts.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from clframe.moe.executors import Executor, Weights, dense
from clframe.moe.triton_experts import activation_code
from clframe.moe.triton_launch import precision
from clframe.nn.kernels import is_traced, kernel_agrees, relative_error

TOKENS: Final = 300
"""Tokens that are compared: two tiles of the largest kernel and a part of one, for an expert that all of them keep."""
TOLERANCE: Final = {torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest difference as a share of the largest value; products in single precision may use TensorFloat-32."""


def kernels_agree(
    executor: Executor, weights: Weights, x_ND: Tensor, keep_NE: Tensor, weight_NE: Tensor | None
) -> bool:
    """Whether an executor computes what :func:`~clframe.moe.executors.dense` does, with gradients where they are on.

    Waits for the device at the first call for an executor, kind of weights, type, device and use. Returns True without
    comparing without tokens, in a transformed or traced function, and while a CUDA graph is recorded, which follows
    eager steps.
    """
    if not x_ND.numel() or is_traced(x_ND):
        return True
    learns = torch.is_grad_enabled()
    shapes = tuple(None if part is None else part.shape for part in weights.tensors())
    code = activation_code(weights.activation)  # the activation itself may differ from layer to layer
    kind = executor, shapes, x_ND.dtype, x_ND.device, precision(), code, weight_NE is None, learns

    def compute(run: Executor) -> list[Tensor]:
        return _outputs_and_gradients(run, weights, x_ND, keep_NE, weight_NE, learns=learns)

    def find_fault(found: list[Tensor]) -> str:
        difference = max(relative_error(own, plain) for own, plain in zip(found, compute(dense), strict=True))
        agrees = difference <= TOLERANCE[x_ND.dtype]
        return "" if agrees else f"differs from plain products by {difference:.2g} of the largest value"

    return kernel_agrees(
        f"experts: the kernel {getattr(executor, '__name__', executor)}", kind, x_ND, run=lambda: compute(executor),
        find_fault=find_fault, fallback="plain products are used",
    )  # fmt: skip


def _outputs_and_gradients(
    run: Executor, weights: Weights, x_ND: Tensor, keep_NE: Tensor, weight_NE: Tensor | None, *, learns: bool
) -> list[Tensor]:
    """Outputs of an executor for some of the tokens and, if it learns, gradients."""
    token_N = tokens_to_compare(x_ND)
    keep_NE = keep_NE[token_N]
    keep_NE[:, 0] = True  # an expert with several tiles, whatever the gate chose
    x, scale = (None if part is None else part.detach()[token_N].requires_grad_(learns) for part in (x_ND, weight_NE))
    assert x is not None
    y_NO = run(weights, x, keep_NE, scale)
    if not learns:
        return [y_NO]
    leaves = [part for part in (x, scale, *weights.tensors()) if part is not None and part.requires_grad]
    # Differ in every row and column and have a mean above 0: sums over equal tokens must not cancel to rounding errors.
    factor_NO = (1 + torch.arange(y_NO.numel(), device=y_NO.device).view_as(y_NO).sin()) / TOKENS**0.5
    return [y_NO.detach(), *torch.autograd.grad((y_NO * factor_NO.to(y_NO.dtype)).sum(), leaves)]


def tokens_to_compare(x_ND: Tensor) -> Tensor:
    """Indices of :data:`TOKENS` tokens, again from the first one if there are fewer."""
    return torch.arange(TOKENS, device=x_ND.device) % len(x_ND)
