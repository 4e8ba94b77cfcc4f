"""A linear layer that reads only the weights of the largest inputs: for one or few tokens at inference."""

from __future__ import annotations

import time
from statistics import median
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clframe.errors import ConfigError, UnsupportedError
from clframe.sparsity.ffn import shape_of, weight_of
from clframe.sparsity.functional import keep, require_value

Rule = Literal["threshold", "max_p"]


class SparseLinear(nn.Module):
    """``W (x * mask(x)) + b``, where the columns of W that are multiplied by zeros are not read.

    Implemented as a bag of embeddings: rows of the transposed weight are looked up and summed, weighted by the inputs.
    This is faster for one token and densities well below one half; from ``dense_above`` on, and for more than
    ``tokens`` tokens, the masked input is multiplied densely with the same result. For inference only: the weight is
    copied once, transposed, and receives no gradient.

    Args:
        linear: The layer, or transformers' Conv1D.
        value: p of ``max_p`` or the threshold.
        rule: Inputs to keep: ``|x| >= value * max |x|``, or ``|x| >= value``.
        dense_above: Density from which on the dense product is used; see :func:`break_even`.
        tokens: Largest number of tokens for which the bag is used.

    Raises:
        UnsupportedError: Not a linear layer, or one on the meta device.
        ConfigError: A value out of range.

    >>> linear = nn.Linear(4, 3)
    >>> x = torch.tensor([[3.0, 0.1, -0.2, 0.0]])
    >>> sparse = SparseLinear(linear, value=1.0, rule="threshold")
    >>> torch.allclose(sparse(x), linear.weight[:, 0] * 3 + linear.bias)
    True
    """

    weight_IO: Tensor
    bias_O: Tensor | None

    def __init__(
        self, linear: nn.Module, *, value: float, rule: Rule = "max_p", dense_above: float = 0.3, tokens: int = 1
    ) -> None:
        super().__init__()
        if shape_of(linear) is None:
            raise UnsupportedError(f"sparsity: found {type(linear).__name__}; give a linear layer")
        if weight_of(linear).is_meta:
            raise UnsupportedError("sparsity: found a layer on the meta device, without weights; load it first")
        require_value(value, kind=rule)
        if not 0 <= dense_above <= 1:
            raise ConfigError(f"sparsity.dense_above: found {dense_above}; give a share between 0 and 1")
        self.value, self.rule, self.dense_above, self.tokens = value, rule, dense_above, tokens
        self.register_buffer("weight_IO", weight_of(linear).detach().T.contiguous(), persistent=False)
        bias = linear.bias
        self.register_buffer("bias_O", bias.detach().clone() if isinstance(bias, Tensor) else None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output for the masked input; x has shape (..., inputs)."""
        mask = keep(x, self.value, kind=self.rule)
        x_TI, mask_TI = x.reshape(-1, x.shape[-1]), mask.reshape(-1, x.shape[-1])
        if 0 < len(x_TI) <= self.tokens:
            token_N, input_N = mask_TI.nonzero(as_tuple=True)
            if len(input_N) <= self.dense_above * x_TI.numel():
                return self._bag(x_TI, mask_TI, token_N, input_N).reshape(*x.shape[:-1], -1)
        return F.linear(x * mask, self.weight_IO.T, self.bias_O)

    def _bag(self, x_TI: Tensor, mask_TI: Tensor, token_N: Tensor, input_N: Tensor) -> Tensor:
        counts_T = mask_TI.sum(1)
        y_TO = F.embedding_bag(
            input_N,
            self.weight_IO,
            counts_T.cumsum(0) - counts_T,
            mode="sum",
            per_sample_weights=x_TI[token_N, input_N],
        )
        return y_TO if self.bias_O is None else y_TO + self.bias_O


@torch.no_grad()
def break_even(linear: nn.Module, *, points: int = 8, repeats: int = 15) -> float:
    """Measure the density below which the bag is faster than the dense layer for one token on this machine.

    Bisects the interval of densities ``points`` times, comparing medians of ``repeats`` runs; 0 where the bag is never
    faster, as for small layers.
    """
    width = weight_of(linear).shape[1]
    weight = weight_of(linear)
    x = torch.linspace(1, 2, width, device=weight.device, dtype=weight.dtype)[None]
    dense = _seconds(linear, x, repeats=repeats)
    sparse = SparseLinear(linear, value=0.5, rule="threshold", dense_above=1.0)
    low, high = 0.0, 1.0
    for _ in range(points):
        middle = (low + high) / 2
        masked = x.clone()
        masked[:, int(width * middle) :] = 0
        low, high = (middle, high) if _seconds(sparse, masked, repeats=repeats) < dense else (low, middle)
    return low


def _seconds(layer: nn.Module, x: Tensor, *, repeats: int) -> float:
    layer(x)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        layer(x)
        if x.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return median(times)
