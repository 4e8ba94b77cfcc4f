"""The kernels of ``triton_experts.py``. Importing this needs Triton; nothing imports it before it is run.

In a grid (block of columns, block of an expert's tokens, expert) every program computes one tile; blocks behind an
expert's last token exit immediately. Sizes of weights are constants of the compiled kernel.
"""

# mypy: ignore-errors
# The kernels' code is Triton's language, which Triton's own compiler types.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(z, code: tl.constexpr):
    """ReLU, GELU, GELU by tanh or SiLU."""
    if code == 0:
        return tl.maximum(z, 0.0)
    if code == 1:
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    if code == 2:
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    return z * tl.sigmoid(z)


@triton.jit
def make_hidden(
    x_ptr, order_ptr, count_ptr, up_ptr, up_bias_ptr, gate_ptr, gate_bias_ptr, weight_ptr, hidden_ptr, tokens,
    experts: tl.constexpr, neurons: tl.constexpr, width: tl.constexpr,
    biased: tl.constexpr, gated: tl.constexpr, gate_biased: tl.constexpr, weighted: tl.constexpr,
    code: tl.constexpr, precision: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """hidden_ENH of each expert's own tokens, packed at the front of its rows."""
    expert = tl.program_id(2).to(tl.int64)
    count = tl.load(count_ptr + expert)
    if tl.program_id(1) * ROWS >= count:
        return
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.load(order_ptr + expert * (tokens + 1) + row, mask=row < count, other=0).to(tl.int64)
    inner = tl.arange(0, INNER)
    up = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    gate = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, width, INNER):
        k = start + inner
        x = tl.load(
            x_ptr + token[:, None] * width + k[None, :],
            mask=(row[:, None] < count) & (k[None, :] < width),
            other=0.0,
        )
        place = (expert * neurons + column[None, :]) * width + k[:, None]
        inside = (column[None, :] < neurons) & (k[:, None] < width)
        up += tl.dot(x, tl.load(up_ptr + place, mask=inside, other=0.0), input_precision=precision)
        if gated:
            gate += tl.dot(x, tl.load(gate_ptr + place, mask=inside, other=0.0), input_precision=precision)
    own = expert * neurons + column
    if biased:
        up += tl.load(up_bias_ptr + own, mask=column < neurons, other=0.0)[None, :]
    if gate_biased:
        gate += tl.load(gate_bias_ptr + own, mask=column < neurons, other=0.0)[None, :]
    hidden = up * activate(gate, code) if gated else activate(up, code)
    if weighted:
        hidden *= tl.load(weight_ptr + token * experts + expert, mask=row < count, other=0.0)[:, None]
    tl.store(
        hidden_ptr + (expert * tokens + row[:, None]) * neurons + column[None, :],
        hidden.to(hidden_ptr.dtype.element_ty),
        mask=(row[:, None] < count) & (column[None, :] < neurons),
    )


@triton.jit
def add_outputs(
    hidden_ptr, order_ptr, count_ptr, down_ptr, y_ptr, tokens,
    neurons: tl.constexpr, outputs: tl.constexpr, precision: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """Add each expert's outputs to y_NO, in float32."""
    expert = tl.program_id(2).to(tl.int64)
    count = tl.load(count_ptr + expert)
    if tl.program_id(1) * ROWS >= count:
        return
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.load(order_ptr + expert * (tokens + 1) + row, mask=row < count, other=0).to(tl.int64)
    inner = tl.arange(0, INNER)
    y = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, neurons, INNER):
        k = start + inner
        hidden = tl.load(
            hidden_ptr + (expert * tokens + row[:, None]) * neurons + k[None, :],
            mask=(row[:, None] < count) & (k[None, :] < neurons),
            other=0.0,
        )
        down = tl.load(
            down_ptr + (expert * neurons + k[:, None]) * outputs + column[None, :],
            mask=(k[:, None] < neurons) & (column[None, :] < outputs),
            other=0.0,
        )
        y += tl.dot(hidden, down, input_precision=precision)
    mask = (row[:, None] < count) & (column[None, :] < outputs)
    tl.atomic_add(y_ptr + token[:, None] * outputs + column[None, :], y, mask=mask, sem="relaxed")
