"""Executor of experts with Triton kernels, forward and backward, without synchronization with the device.

The routing mask becomes a list of (token, expert) pairs on the device; kernels gather each pair's token, multiply it by
both layers of the expert, and add up the rows of each token in a fixed order. Atomics are not used, so that results are
deterministic (except the gradient of ``weight_NE`` where experts have more than 128 neurons).

Shape suffixes as in ``executors.py``; P is the largest possible number of pairs, N * E.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from clframe.moe.executors import TENSORS, Activation, Weights, input_tensors, reference
from clframe.moe.triton_launch import (
    FUSED_NEURONS,
    Layer,
    Pairs,
    Tiles,
    add_up,
    hidden_gradients,
    list_pairs,
    mask_rows,
    multiply_rows,
    run_fused,
    run_input_layer,
    weight_gradients,
)
from clframe.nn.kernels import triton_installed

LARGEST = 2**29
"""Entries of the rows of all pairs, from which on tokens are computed in several parts, to bound the memory."""


_codes: WeakKeyDictionary[Activation, int | None] = WeakKeyDictionary()
"""Codes found so far; keeps no module of a deleted network."""


def activation_code(activation: Activation) -> int | None:
    """0 for ReLU, 1 GELU, 2 GELU with tanh, 3 SiLU, None for others.

    Compares values on a grid, so that equivalent implementations (those of transformers) are recognized; once for each
    object.

    >>> activation_code(nn.GELU(approximate="tanh")), activation_code(torch.relu), activation_code(nn.Tanh())
    (2, 0, None)
    """
    try:
        return _codes[activation]
    except KeyError:
        return _codes.setdefault(activation, _find_code(activation))
    except TypeError:  # an object that cannot be weakly referenced, or has no hash
        return _find_code(activation)


def _find_code(activation: Activation) -> int | None:
    if isinstance(activation, nn.Module) and any(True for _ in activation.parameters()):
        return None
    points = torch.linspace(-6, 6, 49, dtype=torch.float64)
    known = (F.relu(points), F.gelu(points), F.gelu(points, approximate="tanh"), F.silu(points))
    with torch.no_grad():
        own = activation(points)
    return next((code for code, values in enumerate(known) if torch.allclose(own, values, atol=1e-9)), None)


def triton_works(weights: Weights, x_ND: Tensor) -> bool:
    """Whether the kernels support these dtypes and this activation, and Triton is installed."""
    fits = x_ND.dtype == weights.up_EHD.dtype and x_ND.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return fits and triton_installed() and activation_code(weights.activation) is not None


def run_triton(weights: Weights, x_ND: Tensor, keep_NE: Tensor, weight_NE: Tensor | None = None) -> Tensor:
    """Compute y_NO; see :data:`~clframe.moe.executors.Executor`."""
    if not x_ND.numel():
        return reference(weights, x_ND, keep_NE, weight_NE)
    experts, _, width = weights.up_EHD.shape
    most = max(1, LARGEST // (experts * max(width, weights.down_EHO.shape[2])))
    parts = -(-len(x_ND) // most)
    size = -(-len(x_ND) // parts)  # equal parts, instead of full ones and a small rest
    if size == len(x_ND):
        return _run(weights, x_ND, keep_NE, weight_NE)
    xs, keeps = x_ND.split(size), keep_NE.split(size)
    scales = (None,) * len(xs) if weight_NE is None else weight_NE.split(size)
    return torch.cat([_run(weights, *part) for part in zip(xs, keeps, scales, strict=True)])


def run_pairs(
    weights: Weights,
    x_ND: Tensor,
    keep_NE: Tensor,
    weight_NE: Tensor | None = None,
    *,
    fused: bool | None = None,
    tile: Tiles | None = None,
) -> Tensor:
    """Compute y_NO without gradients.

    Args:
        weights: Of the experts.
        x_ND: Tokens.
        keep_NE: Mask of experts to run.
        weight_NE: Factors of the experts' outputs.
        fused: Whether one kernel computes both layers; None: up to :data:`~clframe.moe.triton_launch.FUSED_NEURONS`.
        tile: Tile sizes; None: those for the dtype.
    """
    layer, pairs = _layer(weights, tile), list_pairs(keep_NE)
    x_ND, weight_NE = x_ND.contiguous(), None if weight_NE is None else weight_NE.contiguous()
    if fused is None:
        fused = layer.sizes[1] <= FUSED_NEURONS
    if fused:
        y_PO = run_fused(layer, x_ND, pairs, weight_NE)
    else:
        hidden_PH, _, _ = run_input_layer(layer, x_ND, pairs, weight_NE, save=False)
        y_PO = multiply_rows(hidden_PH, layer.weights.down_EHO, pairs, tile=layer.tile("split"))
    return add_up(y_PO, pairs, weights.bias_O)


def run_masked(weights: Weights, x_ND: Tensor, keep_NE: Tensor, weight_NE: Tensor | None = None) -> Tensor:
    """Compute all experts with PyTorch's products and mask them in the kernel of the activation; without gradients."""
    up_FD, up_bias_F, gate_FD, gate_bias_F = (
        None if part is None else part.flatten(0, 1) for part in input_tensors(weights)
    )
    assert up_FD is not None
    up_NF = F.linear(x_ND, up_FD, up_bias_F)
    gate_NF = None if gate_FD is None else F.linear(x_ND, gate_FD, gate_bias_F)
    mask_rows(_layer(weights), up_NF, gate_NF, keep_NE, weight_NE)
    down_FO = weights.down_EHO.flatten(0, 1)
    return up_NF @ down_FO if weights.bias_O is None else torch.addmm(weights.bias_O, up_NF, down_FO)


def _layer(weights: Weights, tile: Tiles | None = None) -> Layer:
    code = activation_code(weights.activation)
    assert code is not None
    return Layer.of(weights, code, tile=tile)


def _run(weights: Weights, x_ND: Tensor, keep_NE: Tensor, weight_NE: Tensor | None) -> Tensor:
    if not torch.is_grad_enabled():
        return run_pairs(weights, x_ND, keep_NE, weight_NE)
    y_NO: Tensor = _Experts.apply(weights.activation, x_ND, keep_NE, weight_NE, *weights.tensors())
    return y_NO


class _Experts(torch.autograd.Function):
    """Experts with gradients of tokens, factors and weights: stores pre-activations, and computes hidden rows again."""

    @staticmethod
    def forward(
        ctx: Any,
        activation: Activation,
        x_ND: Tensor,
        keep_NE: Tensor,
        weight_NE: Tensor | None,
        *parts: Tensor | None,
    ) -> Tensor:
        weights = _weights(activation, parts)
        if not any(ctx.needs_input_grad):
            return run_pairs(weights, x_ND, keep_NE, weight_NE)
        layer, pairs = _layer(weights), list_pairs(keep_NE)
        x_ND, weight_NE = x_ND.contiguous(), None if weight_NE is None else weight_NE.contiguous()
        hidden_PH, up_PH, gate_PH = run_input_layer(layer, x_ND, pairs, weight_NE, save=True)
        ctx.activation = activation
        ctx.save_for_backward(x_ND, weight_NE, up_PH, gate_PH, *pairs, *parts)
        y_PO = multiply_rows(hidden_PH, layer.weights.down_EHO, pairs, tile=layer.tile("split"))
        return add_up(y_PO, pairs, weights.bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_NO: Tensor) -> Any:
        x_ND, weight_NE, up_PH, gate_PH, token_P, pair_NE, count_N, end_E, *parts = ctx.saved_tensors
        layer, pairs = _layer(_weights(ctx.activation, parts)), Pairs(token_P, pair_NE, count_N, end_E)
        _, x_needed, _, weight_needed, up_needed, down_needed, up_bias, gate_needed, gate_bias, bias_needed = (
            ctx.needs_input_grad
        )
        gradient_NO, tile, w = gradient_NO.contiguous(), layer.tile("gradient"), layer.weights
        up_grad_PH, gate_grad_PH, hidden_PH, weight_grad_NE = hidden_gradients(
            layer, gradient_NO, pairs, weight_NE, up_PH, gate_PH
        )
        x_grad = down_grad = up_grad = up_sum = gate_grad = gate_sum = None
        if x_needed:
            other = None if gate_grad_PH is None or w.gate_EHD is None else (gate_grad_PH, w.gate_EHD)
            rows_PD = multiply_rows(up_grad_PH, w.up_EHD, pairs, tile=layer.tile("split"), other=other)
            x_grad = add_up(rows_PD, pairs, None)
        if down_needed:
            down_grad, _ = weight_gradients(hidden_PH, gradient_NO, pairs, tile=tile)
        if up_needed or up_bias:
            up_grad, up_sum = weight_gradients(up_grad_PH, x_ND, pairs, tile=tile, sums=up_bias)
        if gate_grad_PH is not None and (gate_needed or gate_bias):
            gate_grad, gate_sum = weight_gradients(gate_grad_PH, x_ND, pairs, tile=tile, sums=gate_bias)
        weight_grad = weight_grad_NE.to(weight_NE.dtype) if weight_needed and weight_grad_NE is not None else None
        bias_grad = gradient_NO.sum(0) if bias_needed else None
        return None, x_grad, None, weight_grad, up_grad, down_grad, up_sum, gate_grad, gate_sum, bias_grad


def _weights(activation: Activation, parts: Any) -> Weights:
    return Weights(activation=activation, **dict(zip(TENSORS, parts, strict=True)))
