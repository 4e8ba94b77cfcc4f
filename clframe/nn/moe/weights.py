"""The weights of experts, and what an executor is.

Shape suffixes: N tokens, E experts, H neurons of an expert, D inputs, O outputs, P (token, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Activation = Callable[[Tensor], Tensor]


class Cut(NamedTuple):
    """Views of each expert's weights: up_HD, its bias, gate_HD, its bias, down_OH."""

    ups: Sequence[Tensor]
    up_biases: Sequence[Tensor] | None
    gates: Sequence[Tensor] | None
    gate_biases: Sequence[Tensor] | None
    downs: Sequence[Tensor]


class Weights(NamedTuple):
    """The weights of all experts of a layer.

    Attributes:
        up_EHD: Rows of the input weights.
        down_EHO: Columns of the output weights, transposed.
        activation: Of the input, or of the gate.
        up_bias_EH: Bias of the input weights.
        gate_EHD: Rows of the gate, in a gated network.
        gate_bias_EH: Bias of the gate.
        bias_O: Added once, whichever experts run.
        cut: The same, cut up by expert beforehand; detached, for use without gradients.
    """

    up_EHD: Tensor
    down_EHO: Tensor
    activation: Activation
    up_bias_EH: Tensor | None = None
    gate_EHD: Tensor | None = None
    gate_bias_EH: Tensor | None = None
    bias_O: Tensor | None = None
    cut: Cut | None = None

    def parts(self) -> tuple[Tensor | None, ...]:
        """All tensors, in the order of :data:`PARTS`."""
        return tuple(getattr(self, name) for name in PARTS)

    def views(self) -> Cut:
        """Cut up by expert, so that gradients pass where they are wanted."""
        return self.cut if self.cut is not None and not torch.is_grad_enabled() else cut(self)

    def merged(self, many: int) -> Weights:
        """The same with ``many`` neighboring experts as one; views."""

        def joined(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.unflatten(0, (-1, many)).flatten(1, 2)

        up, down, up_bias, gate, gate_bias, bias_O = self.parts()
        parts = (joined(up), joined(down), joined(up_bias), joined(gate), joined(gate_bias), bias_O)
        return Weights(activation=self.activation, **dict(zip(PARTS, parts, strict=True)))  # type: ignore[arg-type]

    def start(self, x_ND: Tensor) -> Tensor:
        """A fresh y_NO that holds the bias."""
        outputs = self.down_EHO.shape[2]
        if self.bias_O is None:
            return x_ND.new_zeros(len(x_ND), outputs)
        return self.bias_O.repeat(len(x_ND), 1)


PARTS = ("up_EHD", "down_EHO", "up_bias_EH", "gate_EHD", "gate_bias_EH", "bias_O")

Executor = Callable[[Weights, Tensor, Tensor, "Tensor | None"], Tensor]
"""y_NO of the weights, x_ND, keep_NE (what runs) and weight_NE (what outputs are multiplied by; None: 1)."""


def inputs_of(weights: Weights) -> tuple[Tensor | None, ...]:
    """up_EHD, its bias, gate_EHD and its bias."""
    return weights.up_EHD, weights.up_bias_EH, weights.gate_EHD, weights.gate_bias_EH


def hidden_of(
    weights: Weights,
    x_ND: Tensor,
    up_HD: Tensor | None,
    up_bias_H: Tensor | None,
    gate_HD: Tensor | None,
    gate_bias_H: Tensor | None,
) -> Tensor:
    """hidden_NH of some neurons."""
    assert up_HD is not None
    up_NH = F.linear(x_ND, up_HD, up_bias_H)
    if gate_HD is None:
        return weights.activation(up_NH)
    return up_NH * weights.activation(F.linear(x_ND, gate_HD, gate_bias_H))


def cut(weights: Weights) -> Cut:
    """Views by expert, cut in one go, so that their gradients come back in one go, too."""

    def unbound(part: Tensor | None) -> Sequence[Tensor] | None:
        return None if part is None else part.unbind(0)

    return Cut(
        weights.up_EHD.unbind(0),
        unbound(weights.up_bias_EH),
        unbound(weights.gate_EHD),
        unbound(weights.gate_bias_EH),
        weights.down_EHO.transpose(1, 2).unbind(0),
    )
