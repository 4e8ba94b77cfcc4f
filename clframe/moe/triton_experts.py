"""Executor of experts on CUDA with two fused Triton kernels and no synchronization with the device.

The routing mask is converted to a list of tokens for each expert on the device. Outputs are accumulated with atomics,
so results are not deterministic to the last bit; deterministic mode uses another executor. Backward recomputes with
:func:`~clframe.moe.executors.grouped`.

Shape suffixes as in ``executors.py``.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clframe.moe.executors import TENSORS, Activation, Weights, grouped


class Tiles(NamedTuple):
    """Tile of one kernel program: tokens, columns, and the depth of one inner product."""

    rows: int
    columns: int
    inner: int
    warps: int = 4
    stages: int = 3


def tiles(tokens: int, dtype: torch.dtype) -> Tiles:
    """Tile sizes for a number of tokens and a dtype; the fastest of six on an H100."""
    if dtype is not torch.float32:
        return Tiles(64, 128, 64)
    return Tiles(32, 32, 32) if tokens <= 512 else Tiles(64, 64, 16)


def activation_code(activation: Activation) -> int | None:
    """0 for ReLU, 1 GELU, 2 GELU with tanh, 3 SiLU, None for others.

    Compares values on a grid, so that equivalent implementations (those of transformers) are recognized.

    >>> activation_code(nn.GELU(approximate="tanh")), activation_code(torch.relu), activation_code(nn.Tanh())
    (2, 0, None)
    """
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
    return fits and _installed() and _code(weights.activation) is not None


def run_triton(weights: Weights, x_ND: Tensor, keep_NE: Tensor, weight_NE: Tensor | None = None) -> Tensor:
    """Compute y_NO; see :data:`~clframe.moe.executors.Executor`."""
    y_NO: Tensor = _Experts.apply(weights.activation, x_ND, keep_NE, weight_NE, *weights.tensors())
    return y_NO


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        activation: Activation,
        x_ND: Tensor,
        keep_NE: Tensor,
        weight_NE: Tensor | None,
        *parts: Tensor | None,
    ) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(x_ND, keep_NE, weight_NE, *parts)
        return _launch(_weights(activation, parts), x_ND, keep_NE, weight_NE)

    @staticmethod
    def backward(ctx: Any, gradient_NO: Tensor) -> Any:
        saved: tuple[Tensor | None, ...] = ctx.saved_tensors
        needed = (ctx.needs_input_grad[1], False, *ctx.needs_input_grad[3:])
        inputs = [
            None if value is None else value.detach().requires_grad_(needs)
            for value, needs in zip(saved, needed, strict=True)
        ]
        x_ND, keep_NE, weight_NE, *parts = inputs
        assert x_ND is not None and keep_NE is not None
        # Recomputing stores no hidden activations; the kernels have no backward.
        with torch.enable_grad():
            y_NO = grouped(_weights(ctx.activation, tuple(parts)), x_ND, keep_NE, weight_NE)
        wanted = [value for value in inputs if value is not None and value.requires_grad]
        found = iter(torch.autograd.grad(y_NO, wanted, gradient_NO, allow_unused=True))
        gradients = [next(found) if value is not None and value.requires_grad else None for value in inputs]
        return (None, *gradients)


def _weights(activation: Activation, parts: tuple[Tensor | None, ...]) -> Weights:
    return Weights(activation=activation, **dict(zip(TENSORS, parts, strict=True)))  # type: ignore[arg-type]


def _launch(weights: Weights, x_ND: Tensor, keep_NE: Tensor, weight_NE: Tensor | None) -> Tensor:
    from clframe.moe.triton_kernels import add_outputs, make_hidden

    code = _code(weights.activation)
    assert code is not None
    experts, neurons, width = weights.up_EHD.shape
    tokens, outputs = len(x_ND), weights.down_EHO.shape[2]
    x_ND = x_ND.contiguous()
    order_EM, count_E = tokens_of_experts(keep_NE)
    hidden_ENH = x_ND.new_empty(experts, tokens, neurons)
    empty = x_ND.new_empty(0)
    gate_EHD, up_bias_EH, gate_bias_EH = (
        empty if part is None else part.contiguous()
        for part in (weights.gate_EHD, weights.up_bias_EH, weights.gate_bias_EH)
    )
    tile = tiles(tokens, x_ND.dtype)
    how = {
        "precision": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        "ROWS": tile.rows, "COLUMNS": tile.columns, "INNER": tile.inner,
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    blocks = -(-tokens // tile.rows)
    make_hidden[(-(-neurons // tile.columns), blocks, experts)](
        x_ND, order_EM, count_E, weights.up_EHD.contiguous(), up_bias_EH, gate_EHD, gate_bias_EH,
        empty if weight_NE is None else weight_NE.contiguous(), hidden_ENH, tokens, experts, neurons, width,
        biased=weights.up_bias_EH is not None, gated=weights.gate_EHD is not None,
        gate_biased=weights.gate_bias_EH is not None, weighted=weight_NE is not None, code=code, **how,
    )  # fmt: skip
    y_NO = torch.zeros(tokens, outputs, device=x_ND.device)  # accumulates in float32 for any weight dtype
    add_outputs[(-(-outputs // tile.columns), blocks, experts)](
        hidden_ENH, order_EM, count_E, weights.down_EHO.contiguous(), y_NO, tokens, neurons, outputs, **how
    )
    if weights.bias_O is not None:
        y_NO += weights.bias_O
    return y_NO.to(x_ND.dtype)


def tokens_of_experts(keep_NE: Tensor) -> tuple[Tensor, Tensor]:
    """Token indices of each expert, at the front of its row of order_EM, M = N + 1, and their numbers count_E.

    Entries after the first count_E of a row are undefined. Uses cumulative sums instead of sorting, without
    synchronization.

    >>> order_EM, count_E = tokens_of_experts(torch.tensor([[True, False], [False, False], [True, True]]))
    >>> count_E.tolist(), order_EM[0, :2].tolist(), order_EM[1, :1].tolist()
    ([2, 1], [0, 2], [2])
    """
    tokens, experts = keep_NE.shape
    rank_EN = keep_NE.t().cumsum(1, dtype=torch.int32)
    place_EN = torch.where(keep_NE.t(), rank_EN - 1, tokens).long()
    order_EM = torch.empty(experts, tokens + 1, dtype=torch.int32, device=keep_NE.device)
    token_N = torch.arange(tokens, dtype=torch.int32, device=keep_NE.device)
    order_EM.scatter_(1, place_EN, token_N.expand(experts, tokens))
    return order_EM, rank_EN[:, -1].contiguous()


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _code(activation: Activation) -> int | None:
    return activation_code(activation)
