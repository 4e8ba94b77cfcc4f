"""Triton kernels that choose experts and list the tokens of each one. Importing this needs Triton.

Shape suffixes: N tokens, E experts, D inputs, W width of the router's hidden layer, P (token, expert) pairs, B blocks
of tokens.
"""

# mypy: ignore-errors
# The kernels' code is Triton's language, which Triton's own compiler types.

from __future__ import annotations

import triton
import triton.language as tl

from clframe.moe.triton_kernels import gathered_products


@triton.jit
def route(
    x_ptr, hidden_ptr, score_ptr, keep_ptr, tokens, least, k,
    experts: tl.constexpr, width: tl.constexpr, neurons: tl.constexpr, top: tl.constexpr, precision: tl.constexpr,
    ROWS: tl.constexpr, INNER: tl.constexpr, HIDDEN: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """keep_NE of a norm router, ``s = |V relu(U x)|``: ``s >= least * max(s)``, or the k best, the first in a tie.

    Scores are compared in float32.
    """
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    neuron, expert = tl.arange(0, HIDDEN), tl.arange(0, EXPERTS)
    source = tl.where(token < tokens, token, 0).to(tl.int64)
    hidden, _ = gathered_products(
        x_ptr, source, hidden_ptr, hidden_ptr, neuron, neurons, width, False, precision, ROWS, HIDDEN, INNER
    )
    score = tl.load(
        score_ptr + expert[None, :] * neurons + neuron[:, None],
        mask=(expert[None, :] < experts) & (neuron[:, None] < neurons),
        other=0.0,
    )
    s = tl.abs(tl.dot(tl.maximum(hidden, 0.0).to(score.dtype), score, input_precision=precision))
    s = tl.where(expert[None, :] < experts, s, -1.0)
    if top:
        ahead = tl.zeros((ROWS, EXPERTS), dtype=tl.int32)
        for other in range(experts):
            value = tl.sum(tl.where(expert[None, :] == other, s, 0.0), 1)[:, None]
            ahead += ((value > s) | ((value == s) & (other < expert[None, :]))).to(tl.int32)
        keep = ahead < k
    else:
        keep = s >= tl.max(s, 1)[:, None] * least
    inside = (token[:, None] < tokens) & (expert[None, :] < experts)
    tl.store(keep_ptr + token[:, None].to(tl.int64) * experts + expert[None, :], keep.to(tl.int8), mask=inside)


@triton.jit
def count_pairs(
    keep_ptr, count_ptr, tokens, experts: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr
):  # fmt: skip
    """count_BE: tokens of each block that keep each expert."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EXPERTS)
    inside = (token[:, None] < tokens) & (expert[None, :] < experts)
    keep = tl.load(keep_ptr + token[:, None].to(tl.int64) * experts + expert[None, :], mask=inside, other=0)
    tl.store(count_ptr + tl.program_id(0) * experts + expert, tl.sum(keep.to(tl.int32), 0), mask=expert < experts)


@triton.jit
def place_pairs(
    keep_ptr, count_ptr, token_ptr, pair_ptr, kept_ptr, end_ptr, tokens, blocks,
    experts: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Number the pairs expert by expert, and token by token within an expert.

    token_P of each pair; the pairs of each token at the front of its row of pair_NE, and their number kept_N; and
    end_E, the number of pairs up to and including each expert's.
    """
    block, expert = tl.program_id(0), tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), dtype=tl.int32)
    before = tl.zeros((EXPERTS,), dtype=tl.int32)
    for start in range(0, blocks, STEP):
        other = start + tl.arange(0, STEP)
        count = tl.load(
            count_ptr + other[:, None] * experts + expert[None, :],
            mask=(other[:, None] < blocks) & (expert[None, :] < experts),
            other=0,
        )
        total += tl.sum(count, 0)
        before += tl.sum(tl.where(other[:, None] < block, count, 0), 0)
    end = tl.cumsum(total, 0)
    token = block * ROWS + tl.arange(0, ROWS)
    inside = (token[:, None] < tokens) & (expert[None, :] < experts)
    entry = token[:, None].to(tl.int64) * experts + expert[None, :]
    keep = tl.load(keep_ptr + entry, mask=inside, other=0).to(tl.int32)
    pair = (end - total + before)[None, :] + tl.cumsum(keep, 0) - keep
    kept = inside & (keep != 0)
    tl.store(token_ptr + pair, tl.broadcast_to(token[:, None], (ROWS, EXPERTS)), mask=kept)
    front = token[:, None].to(tl.int64) * experts + tl.cumsum(keep, 1) - keep
    tl.store(pair_ptr + front, pair, mask=kept)
    tl.store(kept_ptr + token, tl.sum(keep, 1), mask=token < tokens)
    if block == 0:
        tl.store(end_ptr + expert, end, mask=expert < experts)
