"""Linear layers of a feed-forward network whose weights are stored by input or by output, and their sparse products.

Products on a CPU read only the needed rows of the stored weight. Copying these rows (``index_select``) takes longer
than the dense product from about a tenth of the rows on, so they are read in place, by a bag of embeddings and its
gradient.

Shape suffixes: T tokens, N rows of the stored weight, I inputs, O outputs, A active entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clframe.sparse_decode.rules import FACTORS, Place, Rule, Rules

SUM_BELOW: Final = 0.45
MULTIPLY_BELOW: Final = 0.6
"""Shares of needed rows up to which sums of rows, and products with rows, are faster than the dense product on a CPU.

Measured with 2048 x 8192 weights in float32 and one thread.
"""


class Projection(nn.Module):
    """``W x + b`` for inference.

    Args:
        weight_OI: W.
        bias_O: b, or None.
        by_input: Whether a row of the stored weight belongs to an input; the weight is then copied, transposed.
            Otherwise a row belongs to an output, as in ``nn.Linear``, and memory is shared.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, *, by_input: bool) -> None:
        super().__init__()
        self.by_input = by_input
        weight_OI = weight_OI.detach()
        self.register_buffer("weight", (weight_OI.t() if by_input else weight_OI).contiguous(), persistent=False)
        self.register_buffer("bias", None if bias_O is None else bias_O.detach().contiguous(), persistent=False)

    @property
    def shape(self) -> tuple[int, int]:
        """(inputs, outputs)."""
        first, second = self.weight.shape
        return (first, second) if self.by_input else (second, first)

    def forward(self, x_TI: Tensor) -> Tensor:
        """Compute all outputs from all inputs."""
        return F.linear(x_TI, self.weight.t() if self.by_input else self.weight, self.bias)

    def skip_inputs(self, x_1I: Tensor) -> Tensor:
        """Compute all outputs of one token; weights of inputs that are 0 are not read. Needs ``by_input``."""
        index_A = x_1I[0].nonzero()[:, 0]
        if len(index_A) > SUM_BELOW * x_1I.shape[1]:
            return self.forward(x_1I)
        y_1O = sum_rows(self.weight, x_1I[0, index_A], index_A)[None]
        return y_1O if self.bias is None else y_1O + self.bias

    def skip_outputs(self, x_1I: Tensor, index_A: Tensor) -> Tensor:
        """Compute the outputs at ``index_A`` of one token. Needs a weight by output."""
        if len(index_A) > MULTIPLY_BELOW * len(self.weight):
            return self.forward(x_1I)[:, index_A]
        y_1A = multiply_rows(self.weight, x_1I, index_A)[None]
        return y_1A if self.bias is None else y_1A + self.bias[index_A]


def sum_rows(weight_NO: Tensor, x_A: Tensor, index_A: Tensor) -> Tensor:
    """``sum over a of x_a W[index_a]``, in as many parts as there are threads.

    >>> sum_rows(torch.tensor([[1.0, 2.0], [5.0, 6.0], [3.0, 4.0]]), torch.tensor([2.0, -1.0]), torch.tensor([0, 2]))
    tensor([-1.,  0.])
    """
    if not len(index_A):
        return weight_NO.new_zeros(weight_NO.shape[1])
    size = -(-len(index_A) // torch.get_num_threads())
    starts = torch.arange(0, len(index_A), size)
    parts = F.embedding_bag(index_A, weight_NO, starts, mode="sum", per_sample_weights=x_A)
    return parts[0] if len(parts) == 1 else parts.sum(0)


def multiply_rows(weight_NI: Tensor, x_1I: Tensor, index_A: Tensor) -> Tensor:
    """``W[index_A] x``.

    >>> weight_NI = torch.tensor([[1.0, 2.0], [5.0, 6.0], [3.0, 5.0]])
    >>> multiply_rows(weight_NI, torch.tensor([[1.0, -1.0]]), torch.tensor([2]))
    tensor([-2.])
    """
    if not len(index_A):
        return x_1I.new_zeros(0)
    # The gradient of a bag of embeddings with respect to its factors is this product; no public function computes it
    # without the bag itself.
    zero = torch.zeros(1, dtype=torch.long)
    bag_A = torch.zeros_like(index_A)
    out: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x_1I.contiguous(), weight_NI, index_A, zero, bag_A, 0, -1
    )
    return out


class Parts(NamedTuple):
    """A feed-forward network ``down(f(first(x)) * g(second(x)))``, or without second factor, and what it skips.

    Attributes:
        first: The projection that is computed first: the factor with a rule, else the gate; without gate, up.
        second: The other factor of a gated network.
        down: The last layer, stored by input.
        act_first: f; None for the identity.
        act_second: g; None for the identity.
        rules: By place.
    """

    first: Projection
    second: Projection | None
    down: Projection
    act_first: Callable[[Tensor], Tensor] | None
    act_second: Callable[[Tensor], Tensor] | None
    rules: Rules

    @property
    def hidden(self) -> Place | None:
        """Place other than the input that has a rule."""
        return next((place for place in self.rules if place != "input"), None)

    @property
    def skips_second(self) -> bool:
        """Whether the rule applies to the first factor, so that rows of the second are skipped."""
        return self.hidden in FACTORS

    @property
    def hidden_rule(self) -> Rule | None:
        """Rule of :attr:`hidden`."""
        return None if self.hidden is None else self.rules[self.hidden]


def compute_masked(parts: Parts, x_TD: Tensor) -> Tensor:
    """Compute y_TO with every weight, for any number of tokens: the reference of all sparse paths."""
    out: Tensor = parts.down(masked_hidden(parts, x_TD))
    return out


def masked_hidden(parts: Parts, x_TD: Tensor) -> Tensor:
    """Compute hidden_TF, the input of the last layer, with every weight."""
    x_TD = _apply(parts.rules.get("input"), x_TD)
    hidden_TF = _activate(parts.act_first, parts.first(x_TD))
    if parts.skips_second:
        hidden_TF = _apply(parts.hidden_rule, hidden_TF)
    if parts.second is not None:
        hidden_TF = hidden_TF * _activate(parts.act_second, parts.second(x_TD))
    return hidden_TF if parts.skips_second else _apply(parts.hidden_rule, hidden_TF)


def compute_active(parts: Parts, x_1D: Tensor) -> Tensor:
    """Compute y_1O of one token on a CPU, where the weights of zeros are not read.

    Zeros that no rule has made count too, such as those of ReLU.
    """
    x_1D = _apply(parts.rules.get("input"), x_1D)
    first_1F = _activate(parts.act_first, _project(parts.first, x_1D))
    if parts.second is None:
        return parts.down.skip_inputs(_apply(parts.hidden_rule, first_1F))
    if not parts.skips_second:
        second_1F = _activate(parts.act_second, _project(parts.second, x_1D))
        return parts.down.skip_inputs(_apply(parts.hidden_rule, first_1F * second_1F))
    first_1F = _apply(parts.hidden_rule, first_1F)
    index_A = first_1F[0].nonzero()[:, 0]
    second_1A = _activate(parts.act_second, parts.second.skip_outputs(x_1D, index_A))
    hidden_1F = torch.zeros_like(first_1F)
    hidden_1F[:, index_A] = first_1F[:, index_A] * second_1A
    return parts.down.skip_inputs(hidden_1F)


def _project(projection: Projection, x_1D: Tensor) -> Tensor:
    out: Tensor = projection.skip_inputs(x_1D) if projection.by_input else projection(x_1D)
    return out


def _apply(rule: Rule | None, x_TN: Tensor) -> Tensor:
    return x_TN if rule is None else rule.apply(x_TN)


def _activate(activation: Callable[[Tensor], Tensor] | None, z_TN: Tensor) -> Tensor:
    return z_TN if activation is None else activation(z_TN)
