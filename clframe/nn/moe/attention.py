"""Torch's attention with its projections as modules of their own.

Shape suffixes: B batch, T queries, S keys, D width, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clframe.errors import UnsupportedError


class OpenAttention(nn.Module):
    """What ``nn.MultiheadAttention`` computes, by four linear layers that can be seen and replaced.

    Torch keeps the weights of three of them in one tensor and calls none of them as a module. The fast path of
    torch's encoder layers, which would look for that tensor, does not run with this module.

    Args:
        attention: The module whose place it takes; its weights are copied.

    Attributes:
        query: Projection of the queries; likewise ``key``, ``value`` and ``out``.

    Raises:
        UnsupportedError: Keys or values of another width, or extra keys (``add_bias_kv``, ``add_zero_attn``).
    """

    in_proj_bias = None  # torch's encoder layers ask for these three before they take the fast path
    in_proj_weight = None
    _qkv_same_embed_dim = False

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
            raise UnsupportedError(
                "moe: found an attention with keys or values of another width, or with keys added; leave projections "
                "as they are"
            )
        self.embed_dim = attention.embed_dim
        self.num_heads = attention.num_heads
        self.dropout = attention.dropout
        self.batch_first = attention.batch_first
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        weights = attention.in_proj_weight.chunk(3)
        self.query, self.key, self.value = (_linear(weight, bias) for weight, bias in zip(weights, biases, strict=True))
        self.out: nn.Module = _linear(attention.out_proj.weight, attention.out_proj.bias)
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's; see there."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0 if self.batch_first else 1) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (self._heads(x) for x in (self.query(query), self.key(key), self.value(value)))
        bias = self._bias(attn_mask, key_padding_mask, like=q)
        dropout = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
            weights = (scores if bias is None else scores + bias).softmax(-1)
            mixed = F.dropout(weights, dropout, self.training) @ v
        else:
            mixed, weights = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout), None
        y: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        y = y if self.batch_first else y.transpose(0, 1)
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        return (y if batched else y.squeeze(0 if self.batch_first else 1)), weights

    def _heads(self, x_BTD: Tensor) -> Tensor:
        x_BHTD: Tensor = x_BTD.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return x_BHTD

    def _bias(self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, *, like: Tensor) -> Tensor | None:
        """What is added to scores_BHTS. ``is_causal`` is a hint only: torch wants the mask beside it."""
        bias = None
        if attn_mask is not None:
            bias = _added(attn_mask, like)
            bias = bias if bias.dim() == 2 else bias.unflatten(0, (-1, self.num_heads))
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, like)[:, None, None, :]
            bias = padding if bias is None else bias + padding
        return bias


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as numbers to add: of booleans, True is left out."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -torch.inf)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return made
