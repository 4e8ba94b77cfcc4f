"""Ways to run experts in plain torch, on any device.

All compute ``y_n = bias + sum over experts e that token n keeps of weight_ne * E_e(x_n)``, and the same gradients; they
differ in the order of additions only. No weight is copied.

Shape suffixes: N tokens, E experts, H neurons of an expert, D inputs, O outputs, P (token, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from clframe.functional.routing import pairs_by_expert
from clframe.nn.moe.weights import Weights, cut, hidden_of, inputs_of


def reference(weights: Weights, x_ND: Tensor, keep_NE: Tensor, weight_NE: Tensor | None = None) -> Tensor:
    """Every hidden neuron computed, those of experts that do not run set to zero: the definition."""
    up_NEH = torch.einsum("nd,ehd->neh", x_ND, weights.up_EHD)
    if weights.up_bias_EH is not None:
        up_NEH = up_NEH + weights.up_bias_EH
    if weights.gate_EHD is None:
        hidden_NEH = weights.activation(up_NEH)
    else:
        gate_NEH = torch.einsum("nd,ehd->neh", x_ND, weights.gate_EHD)
        if weights.gate_bias_EH is not None:
            gate_NEH = gate_NEH + weights.gate_bias_EH
        hidden_NEH = up_NEH * weights.activation(gate_NEH)
    if weight_NE is not None:
        hidden_NEH = hidden_NEH * weight_NE[..., None]
    hidden_NEH = hidden_NEH.masked_fill(~keep_NE[..., None], 0)
    y_NO = torch.einsum("neh,eho->no", hidden_NEH, weights.down_EHO)
    return y_NO if weights.bias_O is None else y_NO + weights.bias_O


def dense(
    weights: Weights,
    x_ND: Tensor,
    keep_NE: Tensor | None,
    weight_NE: Tensor | None = None,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """The same as two large matrix products; ``keep_NE`` None keeps all. ``dropout`` acts on the hidden neurons."""
    experts, neurons, _ = weights.up_EHD.shape
    hidden_NF = hidden_of(weights, x_ND, *(_flat(part) for part in inputs_of(weights)))
    if dropout:
        hidden_NF = F.dropout(hidden_NF, dropout)
    hidden_NEH = hidden_NF.view(len(x_ND), experts, neurons)
    if weight_NE is not None:
        hidden_NEH = hidden_NEH * weight_NE[..., None]
    if keep_NE is not None:
        dropped_NE1 = ~keep_NE[..., None]
        if torch.is_grad_enabled():  # in place it would write over what backward needs
            hidden_NEH = hidden_NEH.masked_fill(dropped_NE1, 0)
        else:
            hidden_NEH = hidden_NEH.masked_fill_(dropped_NE1, 0)
    hidden_NF, down_FO = hidden_NEH.flatten(1), weights.down_EHO.flatten(0, 1)
    if weights.bias_O is None:
        return hidden_NF @ down_FO
    return torch.addmm(weights.bias_O, hidden_NF, down_FO)


def views(weights: Weights, x_ND: Tensor, keep_NE: Tensor, weight_NE: Tensor | None = None) -> Tensor:
    """Token by token, the experts that run one after the other: reads no weight that is not needed."""
    rows: list[list[bool]] = keep_NE.tolist()
    if not any(map(any, rows)):
        return reference(weights, x_ND, keep_NE, weight_NE)  # whose gradients are zeros, not missing
    return token_by_token(weights, x_ND, rows, weight_NE)


def grouped(weights: Weights, x_ND: Tensor, keep_NE: Tensor, weight_NE: Tensor | None = None) -> Tensor:
    """Expert by expert: gather its tokens, two matrix products, add to where they came from."""
    expert_P, token_P = pairs_by_expert(keep_NE)
    if not len(token_P):
        return reference(weights, x_ND, keep_NE, weight_NE)
    scale_P1 = None if weight_NE is None else weight_NE[token_P, expert_P][:, None]
    counts: list[int] = keep_NE.sum(0).tolist()
    *parts, downs = cut(weights)
    y_NO = weights.start(x_ND)
    start = 0
    for expert, count in enumerate(counts):
        if not count:
            continue
        token = token_P[start : start + count]
        own = (None if part is None else part[expert] for part in parts)
        hidden = hidden_of(weights, x_ND.index_select(0, token), *own)
        if scale_P1 is not None:
            hidden = hidden * scale_P1[start : start + count]
        y_NO = y_NO.index_add_(0, token, hidden @ downs[expert].t())
        start += count
    return y_NO


def _flat(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.flatten(0, 1)


def token_by_token(
    weights: Weights, x_ND: Tensor, rows: list[list[bool]], weight_NE: Tensor | None
) -> Tensor:
    """Matrix times vector throughout, which reads each weight of an active expert once."""
    ready = weights.cut if weights.cut is not None and not torch.is_grad_enabled() else cut(weights)
    ups, up_biases, gates, gate_biases, downs = ready
    activation = weights.activation
    found = []
    for n, row in enumerate(rows):
        x_D = x_ND[n]
        y_O = x_D.new_zeros(weights.down_EHO.shape[2]) if weights.bias_O is None else weights.bias_O.clone()
        for expert, runs in enumerate(row):
            if not runs:
                continue
            hidden_H = _layer(ups, up_biases, expert, x_D)
            if gates is None:
                hidden_H = activation(hidden_H)
            else:
                hidden_H = hidden_H * activation(_layer(gates, gate_biases, expert, x_D))
            if weight_NE is not None:
                hidden_H = hidden_H * weight_NE[n, expert]
            y_O.addmv_(downs[expert], hidden_H)
        found.append(y_O)
    return torch.stack(found) if len(found) != 1 else found[0][None]


def _layer(weight: Sequence[Tensor], bias: Sequence[Tensor] | None, expert: int, x_D: Tensor) -> Tensor:
    if bias is None:
        return torch.mv(weight[expert], x_D)
    return torch.addmv(bias[expert], weight[expert], x_D)
