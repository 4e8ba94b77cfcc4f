"""Routers read from activations, without training, and experts that always run (CMoE).

Pei et al., "CMoE: Converting Mixture-of-Experts from Dense to Accelerate LLM Inference" (2025).

Shape suffixes: N tokens, D inputs, E routed experts, H neurons of an expert, F neurons of all experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from clframe.moe.experts import ExpertLayer

ACTIVE_SHARE = 0.1
"""Share of a layer's neurons, those of largest magnitude, that are active in a token."""

INPUT_PARTS = ("up", "up_bias", "gate", "gate_bias")
"""Weights of the input layer of experts, which a router copies."""


def active_neurons(hidden_NF: Tensor) -> Tensor:
    """Mask of each token's :data:`ACTIVE_SHARE` neurons of largest magnitude (at least one) that are not zero.

    >>> active_neurons(torch.tensor([[0.0, -3.0, 2.0], [0.0, 0.0, 0.0]])).int().tolist()
    [[0, 1, 0], [0, 0, 0]]
    """
    size_NF = hidden_NF.abs()
    index_NK = size_NF.topk(max(1, round(ACTIVE_SHARE * hidden_NF.shape[1])), dim=1).indices
    return torch.zeros_like(size_NF, dtype=torch.bool).scatter_(1, index_NK, True) & (size_NF > 0)


def most_active(hidden_NF: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` neurons that are active in most tokens, in ascending order; ties go to the first."""
    rate_F = active_neurons(hidden_NF).float().mean(0)
    return rate_F.argsort(descending=True, stable=True)[:count].sort().values


def representatives(hidden_NEH: Tensor) -> Tensor:
    """Neuron of each expert whose activity over the tokens is closest to the mean of its expert's neurons, index_E.

    >>> hidden = torch.tensor([[[9.0, 9.0, 0.0]], [[9.0, 0.0, 0.0]], [[9.0, 9.0, 0.0]]])
    >>> active_neurons(hidden.flatten(1)).view(3, 1, 3).sum(0).tolist(), representatives(hidden).tolist()
    ([[3, 0, 0]], [1])
    """
    experts, neurons = hidden_NEH.shape[1:]
    active_NEH = active_neurons(hidden_NEH.flatten(1)).unflatten(1, (experts, neurons)).float()
    index_E: Tensor = (active_NEH - active_NEH.mean(2, keepdim=True)).square().sum(0).argmin(1)
    return index_E


class RepresentativeRouter(nn.Module):
    """Scores each expert by one representative neuron: nothing is trained, and E neurons are computed.

    The score is the magnitude of the neuron's activation in a gated network, and the softplus of its pre-activation in
    a plain one, which ranks experts like ReLU and has no ties where that is 0.

    Args:
        experts: Layer to route to; weights are copied by :meth:`fit`.
        routed: Number of experts with a score, the last of the layer.

    Attributes:
        up: Rows of the input weights, [E, D]; also ``up_bias``, ``gate`` and ``gate_bias``, None if the layer has none.
    """

    up: Tensor
    up_bias: Tensor | None
    gate: Tensor | None
    gate_bias: Tensor | None

    def __init__(self, experts: ExpertLayer, routed: int) -> None:
        super().__init__()
        for name in INPUT_PARTS:
            part = getattr(experts, name)
            self.register_buffer(name, None if part is None else part.detach()[-routed:, 0].clone())
        # In a tuple, so that it is not registered as a submodule: hooks on it would see the router's values as well.
        self._activation = (experts.activation,)

    @property
    def macs(self) -> int:
        """MACs per token."""
        return self.up.numel() * (1 if self.gate is None else 2)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Nonnegative scores_NE."""
        up_NE = F.linear(x_ND, self.up, self.up_bias)
        if self.gate is None:
            return F.softplus(up_NE)
        gate_NE: Tensor = self._activation[0](F.linear(x_ND, self.gate, self.gate_bias))
        return (up_NE * gate_NE).abs()

    def draw(self, generator: Generator | None) -> None:
        """Do nothing: it has no random weights."""

    @torch.no_grad()
    def fit(self, experts: ExpertLayer, x_ND: Tensor) -> None:
        """Copy the weights of the experts' representatives on the given tokens."""
        routed = len(self.up)
        index_E = representatives(experts.hidden(x_ND)[:, -routed:])
        row_E = torch.arange(routed, device=index_E.device)
        for name in INPUT_PARTS:
            part: Any = getattr(experts, name)
            if part is not None:
                getattr(self, name).copy_(part[-routed:][row_E, index_E])
