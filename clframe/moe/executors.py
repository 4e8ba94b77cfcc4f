"""Executors of experts in plain PyTorch, and the weights they read.

Shape suffixes: N tokens, E experts, H neurons of an expert, D inputs, O outputs, P (token, expert) pairs, G groups of m
experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes

from clframe.errors import UnsupportedError
from clframe.moe.routing import pairs_by_expert
from clframe.moe.split_products import parts_of, split_inputs, split_outputs

Activation = Callable[[Tensor], Tensor]


class ExpertViews(NamedTuple):
    """Views of each expert's weights: up_HD, its bias, gate_HD, its bias, down_OH."""

    ups: Sequence[Tensor]
    up_biases: Sequence[Tensor] | None
    gates: Sequence[Tensor] | None
    gate_biases: Sequence[Tensor] | None
    downs: Sequence[Tensor]


class Weights(NamedTuple):
    """Weights of all experts of a layer.

    Attributes:
        up_EHD: Rows of the input weights.
        down_EHO: Columns of the output weights, transposed.
        activation: Applied to the input projection, or to the gate.
        up_bias_EH: Bias of the input weights.
        gate_EHD: Rows of the gate in a gated network.
        gate_bias_EH: Bias of the gate.
        bias_O: Output bias, added once for each token, independent of the experts that run.
        by_expert: Detached views of each expert, split in advance for use without gradients.
    """

    up_EHD: Tensor
    down_EHO: Tensor
    activation: Activation
    up_bias_EH: Tensor | None = None
    gate_EHD: Tensor | None = None
    gate_bias_EH: Tensor | None = None
    bias_O: Tensor | None = None
    by_expert: ExpertViews | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors, in the order of :data:`TENSORS`."""
        return tuple(getattr(self, name) for name in TENSORS)

    def per_expert(self) -> ExpertViews:
        """Views of each expert's weights; differentiable while gradients are enabled."""
        return self.by_expert if self.by_expert is not None and not torch.is_grad_enabled() else split_by_expert(self)

    def to(self, dtype: torch.dtype) -> Weights:
        """Weights of another dtype; differentiable."""
        if dtype == self.up_EHD.dtype:
            return self
        parts = (None if part is None else part.to(dtype) for part in self.tensors())
        return Weights(activation=self.activation, **dict(zip(TENSORS, parts, strict=True)))  # type: ignore[arg-type]

    def merge(self, many: int) -> Weights:
        """View the weights with ``many`` neighboring experts as one expert."""

        def joined(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.unflatten(0, (-1, many)).flatten(1, 2)

        up, down, up_bias, gate, gate_bias, bias_O = self.tensors()
        parts = (joined(up), joined(down), joined(up_bias), joined(gate), joined(gate_bias), bias_O)
        return Weights(activation=self.activation, **dict(zip(TENSORS, parts, strict=True)))  # type: ignore[arg-type]

    def initial_output(self, x_ND: Tensor) -> Tensor:
        """New y_NO filled with the output bias."""
        outputs = self.down_EHO.shape[2]
        if self.bias_O is None:
            return x_ND.new_zeros(len(x_ND), outputs)
        return self.bias_O.repeat(len(x_ND), 1)


TENSORS = ("up_EHD", "down_EHO", "up_bias_EH", "gate_EHD", "gate_bias_EH", "bias_O")

Executor = Callable[[Weights, Tensor, Tensor, "Tensor | None"], Tensor]
"""Function from weights, x_ND, keep_NE (mask of experts to run) and weight_NE (output factors, or None) to y_NO."""


def input_tensors(weights: Weights) -> tuple[Tensor | None, ...]:
    """up_EHD, its bias, gate_EHD and its bias."""
    return weights.up_EHD, weights.up_bias_EH, weights.gate_EHD, weights.gate_bias_EH


def compute_hidden(
    weights: Weights,
    x_ND: Tensor,
    up_HD: Tensor | None,
    up_bias_H: Tensor | None,
    gate_HD: Tensor | None,
    gate_bias_H: Tensor | None,
) -> Tensor:
    """Compute hidden_NH of the given neurons."""
    assert up_HD is not None
    up_NH = F.linear(x_ND, up_HD, up_bias_H)
    if gate_HD is None:
        return weights.activation(up_NH)
    return up_NH * weights.activation(F.linear(x_ND, gate_HD, gate_bias_H))


def compute_all_hidden(weights: Weights, x_ND: Tensor, *, parts: int) -> Tensor:
    """Compute hidden_NF of the neurons of all experts, in so many parts."""
    up_NF = split_outputs(x_ND, weights.up_EHD.flatten(0, 1), _flat(weights.up_bias_EH), parts=parts)
    if weights.gate_EHD is None:
        return weights.activation(up_NF)
    gate_NF = split_outputs(x_ND, weights.gate_EHD.flatten(0, 1), _flat(weights.gate_bias_EH), parts=parts)
    return up_NF * weights.activation(gate_NF)


def split_by_expert(weights: Weights) -> ExpertViews:
    """Split the weights into views by expert.

    Uses one ``unbind`` per tensor, so that backward assembles the gradient of each tensor in one operation.
    """

    def unbound(part: Tensor | None) -> Sequence[Tensor] | None:
        return None if part is None else part.unbind(0)

    return ExpertViews(
        weights.up_EHD.unbind(0),
        unbound(weights.up_bias_EH),
        unbound(weights.gate_EHD),
        unbound(weights.gate_bias_EH),
        weights.down_EHO.transpose(1, 2).unbind(0),
    )


def reference(weights: Weights, x_ND: Tensor, keep_NE: Tensor, weight_NE: Tensor | None = None) -> Tensor:
    """Compute every hidden neuron and zero those of inactive experts; defines the result of all executors."""
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
    """Compute all experts with two matrix products and mask; ``keep_NE`` None keeps all.

    ``dropout`` is the dropout probability of the hidden neurons.
    """
    experts, neurons, _ = weights.up_EHD.shape
    parts = parts_of(x_ND, weights.up_EHD)
    hidden_NF = compute_all_hidden(weights, x_ND, parts=parts)
    if dropout:
        hidden_NF = F.dropout(hidden_NF, dropout)
    hidden_NEH = hidden_NF.view(x_ND.shape[0], experts, neurons)
    if weight_NE is not None:
        hidden_NEH = hidden_NEH * weight_NE[..., None]
    if keep_NE is not None:
        if torch.is_grad_enabled():  # backward needs the unmasked values
            hidden_NEH = hidden_NEH.masked_fill(~keep_NE[..., None], 0)
        else:
            hidden_NEH = hidden_NEH.mul_(keep_NE[..., None])  # five times faster in place
    return _project(weights, hidden_NEH.flatten(1), parts=parts)


def dense_without(weights: Weights, x_1D: Tensor, inactive: Sequence[int]) -> Tensor:
    """Compute all experts of one token and zero the ``inactive`` ones; faster than a mask; without gradients only."""
    experts, neurons, _ = weights.up_EHD.shape
    parts = parts_of(x_1D, weights.up_EHD)
    hidden_1F = compute_all_hidden(weights, x_1D, parts=parts)
    if inactive:
        hidden_1F.view(experts, neurons).index_fill_(0, torch.tensor(inactive), 0.0)
    return _project(weights, hidden_1F, parts=parts)


def per_token(weights: Weights, x_ND: Tensor, keep_NE: Tensor, weight_NE: Tensor | None = None) -> Tensor:
    """Run the active experts token by token; reads only the weights that are needed."""
    chosen: list[list[int]] = [keep_E.nonzero().flatten().tolist() for keep_E in keep_NE]
    if not any(chosen):
        return reference(weights, x_ND, keep_NE, weight_NE)  # gives gradients of zero instead of none
    return run_tokens(weights, x_ND, chosen, weight_NE)


def grouped(weights: Weights, x_ND: Tensor, keep_NE: Tensor, weight_NE: Tensor | None = None) -> Tensor:
    """Run expert by expert: gather its tokens, two matrix products, scatter-add the results.

    ``weight_NE`` may have a third dimension with one factor for each of several equal parts of an expert.
    """
    expert_P, token_P = pairs_by_expert(keep_NE)
    if not len(token_P):
        return reference(weights, x_ND, keep_NE, weight_NE)
    counts: list[int] = keep_NE.sum(0).tolist()
    scales = None
    if weight_NE is not None:
        scales = weight_NE[token_P, expert_P].view(len(token_P), -1, 1).split(counts)
    *parts, downs = weights.per_expert()
    y_NO = weights.initial_output(x_ND)
    for expert, (count, token) in enumerate(zip(counts, token_P.split(counts), strict=True)):
        if not count:
            continue
        own = (None if part is None else part[expert] for part in parts)
        hidden = compute_hidden(weights, x_ND.index_select(0, token), *own)
        if scales is not None:
            scale_np1 = scales[expert]
            hidden = (hidden.view(count, scale_np1.shape[1], -1) * scale_np1).flatten(1)
        y_NO = y_NO.index_add_(0, token, hidden @ downs[expert].t())
    return y_NO


def merged_groups(
    weights: Weights, x_ND: Tensor, keep_NE: Tensor, weight_NE: Tensor | None = None, *, many: int
) -> Tensor:
    """Run :func:`grouped` on groups of ``many`` neighboring experts: fewer and larger products for small experts.

    A token runs through every group with an active expert; inactive experts of the group are masked.
    """
    keep_NGm = keep_NE.unflatten(1, (-1, many))
    weight_NGm = keep_NGm.to(x_ND.dtype)
    if weight_NE is not None:
        weight_NGm = weight_NGm * weight_NE.unflatten(1, (-1, many))
    return grouped(weights.merge(many), x_ND, keep_NGm.any(2), weight_NGm)


def _project(weights: Weights, hidden_NF: Tensor, *, parts: int) -> Tensor:
    """Compute y_NO of all hidden neurons, in so many parts."""
    return split_inputs(hidden_NF, weights.down_EHO.flatten(0, 1), weights.bias_O, parts=parts)


def _flat(part: Tensor | None) -> Tensor | None:
    return None if part is None else part.flatten(0, 1)


def run_tokens(
    weights: Weights, x_ND: Tensor, chosen: Sequence[Sequence[int]], weight_NE: Tensor | None
) -> Tensor:
    """Run the experts ``chosen`` for each token with matrix-vector products.

    Reads each weight of an active expert once.
    """
    ups, up_biases, gates, gate_biases, downs = weights.per_expert()
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


def grouped_mm(weights: Weights, x_ND: Tensor, keep_NE: Tensor, weight_NE: Tensor | None = None) -> Tensor:
    """Gather all pairs sorted by expert, and multiply with PyTorch's grouped matrix product.

    See :func:`grouped_mm_works` for the supported types and sizes.

    Raises:
        UnsupportedError: A version of torch without the product.
    """
    product = _grouped_product()
    if product is None:
        raise UnsupportedError(f"grouped_mm: torch {torch.__version__} has no grouped product; use 'grouped'")
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
    return weights.initial_output(x_ND).index_add_(0, token_P, product(hidden_PH, weights.down_EHO, offs=ends_E))


def grouped_mm_works(weights: Weights, x_ND: Tensor) -> bool:
    """Whether PyTorch's grouped product supports these types and strides on this device; tested once per type."""
    sizes = (*weights.up_EHD.shape[1:], weights.down_EHO.shape[2])
    if x_ND.dtype != weights.up_EHD.dtype or any(size * x_ND.element_size() % 16 for size in sizes):
        return False
    return _grouped_mm_is_correct(x_ND.device.type, x_ND.dtype)


@cache
def _grouped_product() -> Callable[..., Any] | None:
    """PyTorch's grouped matrix product; public since 2.10."""
    return getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


@cache
def _grouped_mm_is_correct(device: str, dtype: torch.dtype) -> bool:
    """Whether the product is correct on a small problem with an empty group, forward and backward."""
    product = _grouped_product()
    if product is None or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    # Hidden from an active MAC counter, which counts the model only.
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
