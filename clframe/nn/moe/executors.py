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
from clframe.nn.moe.weights import Weights, hidden_of, inputs_of


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
        if torch.is_grad_enabled():  # in place it would write over what backward needs
            hidden_NEH = hidden_NEH.masked_fill(~keep_NE[..., None], 0)
        else:
            hidden_NEH = hidden_NEH.mul_(keep_NE[..., None])  # in a fifth of the time
    hidden_NF, down_FO = hidden_NEH.flatten(1), weights.down_EHO.flatten(0, 1)
    if weights.bias_O is None:
        return hidden_NF @ down_FO
    return torch.addmm(weights.bias_O, hidden_NF, down_FO)


def views(weights: Weights, x_ND: Tensor, keep_NE: Tensor, weight_NE: Tensor | None = None) -> Tensor:
    """Token by token, the experts that run one after the other: reads no weight that is not needed."""
    chosen: list[list[int]] = [keep_E.nonzero().flatten().tolist() for keep_E in keep_NE]
    if not any(chosen):
        return reference(weights, x_ND, keep_NE, weight_NE)  # whose gradients are zeros, not missing
    return token_by_token(weights, x_ND, chosen, weight_NE)


def grouped(weights: Weights, x_ND: Tensor, keep_NE: Tensor, weight_NE: Tensor | None = None) -> Tensor:
    """Expert by expert: gather its tokens, two matrix products, add to where they came from.

    Here ``weight_NE`` may have a third dimension, one weight for each of so many equal parts of an expert.
    """
    expert_P, token_P = pairs_by_expert(keep_NE)
    if not len(token_P):
        return reference(weights, x_ND, keep_NE, weight_NE)
    counts: list[int] = keep_NE.sum(0).tolist()
    scales = None
    if weight_NE is not None:
        scales = weight_NE[token_P, expert_P].view(len(token_P), -1, 1).split(counts)
    *parts, downs = weights.views()
    y_NO = weights.start(x_ND)
    for expert, (count, token) in enumerate(zip(counts, token_P.split(counts), strict=True)):
        if not count:
            continue
        own = (None if part is None else part[expert] for part in parts)
        hidden = hidden_of(weights, x_ND.index_select(0, token), *own)
        if scales is not None:
            scale_np1 = scales[expert]
            hidden = (hidden.view(count, scale_np1.shape[1], -1) * scale_np1).flatten(1)
        y_NO = y_NO.index_add_(0, token, hidden @ downs[expert].t())
    return y_NO


def merged(
    weights: Weights, x_ND: Tensor, keep_NE: Tensor, weight_NE: Tensor | None = None, *, many: int
) -> Tensor:
    """As :func:`grouped`, ``many`` neighboring experts at a time: fewer and larger products for small experts.

    A token is computed by all neighbors of an expert that it keeps, and those that it does not keep are masked.
    """
    keep_NGm = keep_NE.unflatten(1, (-1, many))
    weight_NGm = keep_NGm.to(x_ND.dtype)
    if weight_NE is not None:
        weight_NGm = weight_NGm * weight_NE.unflatten(1, (-1, many))
    return grouped(weights.merged(many), x_ND, keep_NGm.any(2), weight_NGm)


def _flat(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.flatten(0, 1)


def token_by_token(
    weights: Weights, x_ND: Tensor, chosen: Sequence[Sequence[int]], weight_NE: Tensor | None
) -> Tensor:
    """Matrix times vector throughout, which reads each weight of an active expert once; ``chosen`` by token."""
    ups, up_biases, gates, gate_biases, downs = weights.views()
    activation = weights.activation
    found = []
    for n, experts in enumerate(chosen):
        x_D = x_ND[n]
        y_O = x_D.new_zeros(weights.down_EHO.shape[2]) if weights.bias_O is None else weights.bias_O.clone()
        for expert in experts:
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
