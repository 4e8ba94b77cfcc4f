"""Experts by torch's grouped matrix product, where it works.

Shape suffixes: N tokens, E experts, H neurons of an expert, D inputs, O outputs, P (token, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from clframe.functional.routing import pairs_by_expert
from clframe.nn.moe.executors import reference
from clframe.nn.moe.weights import Weights


def grouped_mm(weights: Weights, x_ND: Tensor, keep_NE: Tensor, weight_NE: Tensor | None = None) -> Tensor:
    """All pairs gathered, expert by expert, and torch's grouped matrix product over them.

    See :func:`grouped_mm_works` for where this is possible.
    """
    product = _grouped_product()
    assert product is not None
    expert_P, token_P = pairs_by_expert(keep_NE)
    if not len(token_P):
        return reference(weights, x_ND, keep_NE, weight_NE)
    ends_E = keep_NE.sum(0).cumsum(0).int()
    x_PD = x_ND.index_select(0, token_P)

    def layer(weight_EHD: Tensor, bias_EH: Tensor | None) -> Tensor:
        out_PH: Tensor = product(x_PD, weight_EHD.transpose(1, 2), offs=ends_E)
        return out_PH if bias_EH is None else out_PH.add_(bias_EH.index_select(0, expert_P))

    up_PH = layer(weights.up_EHD, weights.up_bias_EH)
    if weights.gate_EHD is None:
        hidden_PH = weights.activation(up_PH)
    else:
        hidden_PH = up_PH * weights.activation(layer(weights.gate_EHD, weights.gate_bias_EH))
    if weight_NE is not None:
        hidden_PH = hidden_PH * weight_NE[token_P, expert_P][:, None]
    return weights.start(x_ND).index_add_(0, token_P, product(hidden_PH, weights.down_EHO, offs=ends_E))


def grouped_mm_works(weights: Weights, x_ND: Tensor) -> bool:
    """Whether torch's grouped product takes these types and strides on this device; tried once for each."""
    sizes = (*weights.up_EHD.shape[1:], weights.down_EHO.shape[2])
    if x_ND.dtype != weights.up_EHD.dtype or any(size * x_ND.element_size() % 16 for size in sizes):
        return False
    return _tried(x_ND.device.type, x_ND.dtype)


@cache
def _grouped_product() -> Callable[..., Any] | None:
    """Torch's grouped matrix product; public from 2.10 on."""
    return getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


@cache
def _tried(device: str, dtype: torch.dtype) -> bool:
    """Whether the product is right on a small problem with an empty group, forwards and backwards."""
    product = _grouped_product()
    if product is None or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    # A counter of operators, if one is on, is to see what models do and not what is tried here.
    with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad():
        x = (torch.arange(80, device=device) % 7 - 3.0).view(5, 16).to(dtype).requires_grad_()
        weight = (torch.arange(768, device=device) % 5 - 2.0).view(3, 16, 16).to(dtype).requires_grad_()
        ends = torch.tensor([2, 2, 5], device=device, dtype=torch.int32)
        try:
            y = product(x, weight.transpose(1, 2), offs=ends)
            plain = torch.cat([x[:2] @ weight[0].t(), x[2:] @ weight[2].t()])
            gradients = torch.autograd.grad(y.square().sum(), (x, weight))
            expected = torch.autograd.grad(plain.square().sum(), (x, weight))
        except (RuntimeError, ValueError, NotImplementedError, TypeError):
            return False
        pairs = zip((y, *gradients), (plain, *expected), strict=True)
        return all(torch.allclose(a.float(), b.float(), rtol=1e-2) for a, b in pairs)
