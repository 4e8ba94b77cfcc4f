"""Pre-norm decoder: a small causal language model.

Shape suffixes: B windows, S ids of a window, T = S - 1 tokens, D width, H heads, E width of a head, F hidden neurons.
"""

from __future__ import annotations

from math import sqrt
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clframe.errors import ConfigError
from clframe.nn.backbones.base import BACKBONES, Backbone
from clframe.nn.backbones.checks import require_at_least, require_depth
from clframe.nn.backbones.key_value_cache import KeyValueCache

Hidden = Literal["swiglu", "relu", "gelu"]
"""Feed-forward network: gated by SiLU, or plain with ReLU or GELU."""
STD = 0.02
"""Standard deviation of initial weights, as in GPT-2; layers that end a residual branch have STD / sqrt(2 depth)."""


class TokenEmbedding(nn.Module):
    """Embeds the ids of a window except the last, which is only a target.

    Args:
        vocabulary: Number of ids.
        width: D.
    """

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, width)

    def forward(self, ids_BS: Tensor) -> Tensor:
        """Compute tokens_BTD."""
        out: Tensor = self.table(ids_BS[:, :-1].long())
        return out


def rotary_table(positions: int, width: int, *, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [positions, width / 2] of the angles ``position * base^(-2 i / width)``.

    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021), equation 15.
    """
    frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angle = torch.arange(positions, dtype=torch.float32)[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x_BHTE: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + E / 2) of each vector by the angles of its position, as Llama does.

    The product of a rotated query and a rotated key depends on their contents and the distance of their positions only.
    """
    first, second = x_BHTE.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class CausalAttention(nn.Module):
    """Multi-head self-attention with rotary positions, in which a token attends to itself and to those before it.

    Args:
        width: D.
        heads: H; they divide the width into an even number of dimensions each.
        context: Largest number of tokens.
        base: Base of the rotary frequencies.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, width: int, *, heads: int, context: int, base: float) -> None:
        super().__init__()
        self.heads, self.base = heads, base
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        cos, sin = rotary_table(context, width // heads, base=base)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Compute the output_BTD of the attention."""
        q, k, v = self._project(x_BTD, slice(x_BTD.shape[1]))
        return self._join(F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def extend(self, x_BTD: Tensor, cache: KeyValueCache, positions_T: Tensor, length: int) -> Tensor:
        """Compute the output_BTD of further tokens, which attend to earlier ones too, and keep their keys and values.

        Args:
            x_BTD: The new tokens.
            cache: Keys and values of the tokens before them, to which those of the new ones are added.
            positions_T: Their positions; on the device, so that a CUDA graph serves every position.
            length: Number of positions of the cache that are read, at least up to the last new one; later ones have
                the weight 0.
        """
        q, k, v = self._project(x_BTD, positions_T)
        cache.write(k, v, positions_T)
        seen_TL = positions_T[:, None] >= torch.arange(length, device=positions_T.device)
        return self._join(F.scaled_dot_product_attention(q, *cache.read(length), attn_mask=seen_TL))

    def _project(self, x_BTD: Tensor, positions: slice | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, H, T, E] of tokens at these positions."""
        q, k, v = (self._split(layer(x_BTD)) for layer in (self.q_proj, self.k_proj, self.v_proj))
        # Not of the dtype of x, since autocast changes that of q.
        cos, sin = self.cos[positions].to(q.dtype), self.sin[positions].to(q.dtype)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def _join(self, mixed_BHTE: Tensor) -> Tensor:
        out: Tensor = self.o_proj(mixed_BHTE.transpose(1, 2).flatten(2))
        return out

    def _split(self, x_BTD: Tensor) -> Tensor:
        split: Tensor = x_BTD.unflatten(2, (self.heads, -1))
        return split.transpose(1, 2)


class GatedFFN(nn.Module):
    """``W_down (SiLU(W_gate x) * W_up x)``. Shazeer, "GLU Variants Improve Transformer" (2020).

    Args:
        width: D.
        hidden: F.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Compute the output_BTD."""
        out: Tensor = self.down_proj(self.act_fn(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))
        return out


class PlainFFN(nn.Module):
    """``W_down act(W_up x)``.

    Args:
        width: D.
        hidden: F.
        activation: The activation.
    """

    def __init__(self, width: int, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.act_fn = activation
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Compute the output_BTD."""
        out: Tensor = self.down_proj(self.act_fn(self.up_proj(x_BTD)))
        return out


class DecoderBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + FFN(norm(x))``.

    Args:
        attention: The attention.
        ffn: The feed-forward network.
        width: D.
        dropout: Probability of dropout on both branches.
    """

    def __init__(self, attention: CausalAttention, ffn: nn.Module, *, width: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.attention = attention
        self.ffn_norm = nn.RMSNorm(width, eps=1e-6)
        self.mlp = ffn
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Compute tokens_BTD of tokens_BTD."""
        return self._add_ffn(x_BTD + self.dropout(self.attention(self.attention_norm(x_BTD))))

    def extend(self, x_BTD: Tensor, cache: KeyValueCache, positions_T: Tensor, length: int) -> Tensor:
        """Compute further tokens_BTD, see :meth:`CausalAttention.extend`."""
        mixed_BTD = self.attention.extend(self.attention_norm(x_BTD), cache, positions_T, length)
        return self._add_ffn(x_BTD + self.dropout(mixed_BTD))

    def _add_ffn(self, x_BTD: Tensor) -> Tensor:
        out: Tensor = x_BTD + self.dropout(self.mlp(self.ffn_norm(x_BTD)))
        return out


@BACKBONES.register("decoder")
def decoder(
    input_shape: tuple[int],
    *,
    vocabulary: int = 2048,
    width: int = 128,
    depth: int = 4,
    heads: int = 4,
    hidden: int | None = None,
    ffn: Literal["swiglu", "relu", "gelu"] = "swiglu",
    tied: bool = True,
    dropout: float = 0.0,
    rope_base: float = 10000.0,
) -> Backbone:
    """Causal language model with random weights: pre-norm blocks with RMSNorm and rotary positions, without biases.

    For ``benchmark: language_model``, whose inputs are windows of context + 1 ids: the model predicts each id from
    those before it. Stages are ``embed``, ``block1``, ``block2``, ...; the last one ends in a normalization. Touvron
    et al., "LLaMA: Open and Efficient Foundation Language Models" (2023).

    Args:
        input_shape: (context + 1,) ids of a window.
        vocabulary: Number of token ids, that of the benchmark.
        width: Width of a token.
        depth: Number of blocks.
        heads: Attention heads; they must divide the width into parts of even size.
        hidden: Hidden neurons of an FFN; by default 4 times the width, and 8/3 times for ``swiglu``, which has three
            layers, rounded up to a multiple of 8.
        ffn: ``swiglu``: gated by SiLU; ``relu``, ``gelu``: plain.
        tied: Whether the classifiers of all exits share the weights of the embedding.
        dropout: Probability of dropout on the branches of a block.
        rope_base: Base of the rotary frequencies.

    Raises:
        ConfigError: An option out of range, or inputs that are not windows of ids.

    >>> decoder((65,), vocabulary=50, width=16, depth=1, heads=2).tap_shapes
    {'embed': (64, 16), 'block1': (64, 16)}
    """
    context = _context(input_shape)
    sizes = (("vocabulary", vocabulary, 2), ("width", width, 1), ("heads", heads, 1), ("hidden", hidden or 1, 1))
    for option, value, least in sizes:
        require_at_least(value, least, where=f"decoder.{option}")
    require_depth(depth, where="decoder.depth")
    if width % heads or (width // heads) % 2:
        raise ConfigError(f"decoder.heads: found {heads} with width {width}; give heads of an even width each")
    if not 0 <= dropout < 1:
        raise ConfigError(f"decoder.dropout: found {dropout}; give 0 or more and less than 1")
    if not rope_base > 1:
        raise ConfigError(f"decoder.rope_base: found {rope_base}; give a number above 1")
    neurons = hidden or (-(-8 * width // 24) * 8 if ffn == "swiglu" else 4 * width)
    embed = TokenEmbedding(vocabulary, width)
    nn.init.normal_(embed.table.weight, std=STD)
    shape = (context, width)
    stages: list[tuple[str, nn.Module, tuple[int, ...]]] = [("embed", embed, shape)]
    for number in range(1, depth + 1):
        attention = CausalAttention(width, heads=heads, context=context, base=rope_base)
        block = DecoderBlock(attention, _ffn(ffn, width, neurons), width=width, dropout=dropout)
        _initialize(block, depth)
        stages.append((f"block{number}", block, shape))
    name, last, _ = stages.pop()
    stages.append((name, nn.Sequential(last, nn.RMSNorm(width, eps=1e-6)), shape))
    return Backbone(stages, input_shape=input_shape, vocabulary=vocabulary, tied=tied)


def _context(input_shape: tuple[int, ...]) -> int:
    if len(input_shape) != 1 or input_shape[0] < 2:
        raise ConfigError(
            f"decoder: found inputs of shape {input_shape}; use benchmark=language_model, or give windows of ids of "
            f"shape (context + 1,)"
        )
    return input_shape[0] - 1


def _ffn(kind: Hidden, width: int, hidden: int) -> nn.Module:
    if kind == "swiglu":
        return GatedFFN(width, hidden)
    if kind not in ("relu", "gelu"):
        raise ConfigError(f"decoder.ffn: found {kind!r}; give 'swiglu', 'relu' or 'gelu'")
    return PlainFFN(width, hidden, nn.ReLU() if kind == "relu" else nn.GELU())


def _initialize(block: nn.Module, depth: int) -> None:
    for name, part in block.named_modules():
        if isinstance(part, nn.Linear):
            ends_branch = name.endswith(("o_proj", "down_proj"))
            nn.init.normal_(part.weight, std=STD / sqrt(2 * depth) if ends_branch else STD)
