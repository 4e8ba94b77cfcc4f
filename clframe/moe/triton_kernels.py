"""Triton kernels of experts, forward. Importing this needs Triton; nothing imports it before it is run.

Pairs of a token and an expert are numbered expert by expert: pair p is row p of hidden_PH and of y_PO. A program
computes one tile of pairs of one expert, see :func:`find_tile`; programs behind the last tile exit immediately. So the
number of pairs stays on the device. Sizes of weights are constants of the compiled kernel.

Shape suffixes: N tokens, E experts, H neurons of an expert, D inputs, O outputs, P pairs.
"""

# mypy: ignore-errors
# The kernels' code is Triton's language, which Triton's own compiler types.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(z, code: tl.constexpr):
    """ReLU, GELU, GELU by tanh or SiLU."""
    # 0.7071 is 1 / sqrt(2) and 1.5958 is 2 * sqrt(2 / pi): 0.5 * (1 + tanh(a)) = sigmoid(2 * a).
    if code == 0:
        return tl.maximum(z, 0.0)
    if code == 1:
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    if code == 2:
        return z * tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    return z * tl.sigmoid(z)


@triton.jit
def find_tile(
    end_ptr, tile, experts: tl.constexpr, ROWS: tl.constexpr, EXPERTS: tl.constexpr
):  # fmt: skip
    """Expert of a tile (at least E behind the last tile), the tile's first pair, and the end of the expert's pairs."""
    e = tl.arange(0, EXPERTS)
    end = tl.load(end_ptr + e, mask=e < experts, other=0)
    start = tl.load(end_ptr + e - 1, mask=(e > 0) & (e < experts), other=0)
    tiles = (end - start + ROWS - 1) // ROWS
    tiles_through = tl.cumsum(tiles, 0)
    expert = tl.sum((tiles_through <= tile).to(tl.int32), 0)
    own = e == expert
    first = tl.sum(tl.where(own, start + (tile - tiles_through + tiles) * ROWS, 0), 0)
    return expert, first, tl.sum(tl.where(own, end, 0), 0)


@triton.jit
def gathered_products(
    x_ptr, token, up_ptr, gate_ptr, column, neurons: tl.constexpr, width: tl.constexpr, gated: tl.constexpr,
    precision: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """``x[token] @ up.t()`` and ``x[token] @ gate.t()`` (0 if not gated) in float32, for some rows of the weights."""
    inner = tl.arange(0, INNER)
    x_at = x_ptr + token[:, None] * width + inner[None, :]
    place = column[None, :] * width + inner[:, None]
    # Without masks the loads are asynchronous copies of 16 bytes.
    even: tl.constexpr = width % INNER == 0
    whole: tl.constexpr = even and neurons % COLUMNS == 0
    up = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    gate = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, width, INNER):
        if even:  # noqa: SIM108 - Triton compiles only one branch of a statement
            x = tl.load(x_at + start)
        else:
            x = tl.load(x_at + start, mask=start + inner[None, :] < width, other=0.0)
        if whole:
            w = tl.load(up_ptr + place + start)
        else:
            inside = (column[None, :] < neurons) & (start + inner[:, None] < width)
            w = tl.load(up_ptr + place + start, mask=inside, other=0.0)
        up = tl.dot(x, w, up, input_precision=precision)
        if gated:
            if whole:
                v = tl.load(gate_ptr + place + start)
            else:
                v = tl.load(gate_ptr + place + start, mask=inside, other=0.0)
            gate = tl.dot(x, v, gate, input_precision=precision)
    return up, gate


@triton.jit
def add_biases(
    up, gate, up_bias_ptr, gate_bias_ptr, expert, column, neurons: tl.constexpr, biased: tl.constexpr,
    gate_biased: tl.constexpr,
):  # fmt: skip
    """Pre-activations with the biases of an expert."""
    if biased:
        up += tl.load(up_bias_ptr + expert * neurons + column, mask=column < neurons, other=0.0)[None, :]
    if gate_biased:
        gate += tl.load(gate_bias_ptr + expert * neurons + column, mask=column < neurons, other=0.0)[None, :]
    return up, gate


@triton.jit
def expert_outputs(
    x_ptr, token_ptr, end_ptr, up_ptr, up_bias_ptr, gate_ptr, gate_bias_ptr, down_ptr, weight_ptr, y_ptr,
    experts: tl.constexpr, neurons: tl.constexpr, width: tl.constexpr, outputs: tl.constexpr,
    biased: tl.constexpr, gated: tl.constexpr, gate_biased: tl.constexpr, weighted: tl.constexpr,
    code: tl.constexpr, precision: tl.constexpr,
    ROWS: tl.constexpr, NEURONS: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """y_PO of both layers of small experts: hidden neurons of a tile stay on the chip."""
    expert, first, last = find_tile(end_ptr, tl.program_id(0), experts, ROWS, EXPERTS)
    if expert >= experts:
        return
    pair = first + tl.arange(0, ROWS)
    token = tl.load(token_ptr + pair, mask=pair < last, other=0).to(tl.int64)
    neuron, own = tl.arange(0, NEURONS), expert.to(tl.int64) * neurons
    up, gate = gathered_products(
        x_ptr, token, up_ptr + own * width, gate_ptr + own * width, neuron, neurons, width, gated, precision,
        ROWS, NEURONS, INNER,
    )  # fmt: skip
    up, gate = add_biases(up, gate, up_bias_ptr, gate_bias_ptr, expert, neuron, neurons, biased, gate_biased)
    hidden = up * activate(gate, code) if gated else activate(up, code)
    if weighted:
        hidden *= tl.load(weight_ptr + token * experts + expert, mask=pair < last, other=0.0)[:, None]
    hidden = hidden.to(x_ptr.dtype.element_ty)
    column = tl.arange(0, COLUMNS)
    y_at = y_ptr + pair[:, None].to(tl.int64) * outputs + column[None, :]
    down_at = down_ptr + (own + neuron[:, None]) * outputs + column[None, :]
    for start in range(0, outputs, COLUMNS):
        if neurons == NEURONS and outputs % COLUMNS == 0:
            down = tl.load(down_at + start)
        else:
            inside = (neuron[:, None] < neurons) & (start + column[None, :] < outputs)
            down = tl.load(down_at + start, mask=inside, other=0.0)
        y = tl.dot(hidden, down, input_precision=precision)
        mask = pair[:, None] < last
        if outputs % COLUMNS != 0:
            mask = mask & (start + column[None, :] < outputs)
        tl.store(y_at + start, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def hidden_rows(
    x_ptr, token_ptr, end_ptr, up_ptr, up_bias_ptr, gate_ptr, gate_bias_ptr, weight_ptr,
    hidden_ptr, up_z_ptr, gate_z_ptr,
    experts: tl.constexpr, neurons: tl.constexpr, width: tl.constexpr,
    biased: tl.constexpr, gated: tl.constexpr, gate_biased: tl.constexpr, weighted: tl.constexpr, saved: tl.constexpr,
    code: tl.constexpr, precision: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """hidden_PH, and if ``saved`` the pre-activations for backward."""
    expert, first, last = find_tile(end_ptr, tl.program_id(1), experts, ROWS, EXPERTS)
    if expert >= experts:
        return
    pair = first + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.load(token_ptr + pair, mask=pair < last, other=0).to(tl.int64)
    own = expert.to(tl.int64) * neurons * width
    up, gate = gathered_products(
        x_ptr, token, up_ptr + own, gate_ptr + own, column, neurons, width, gated, precision, ROWS, COLUMNS, INNER
    )
    up, gate = add_biases(up, gate, up_bias_ptr, gate_bias_ptr, expert, column, neurons, biased, gate_biased)
    hidden = up * activate(gate, code) if gated else activate(up, code)
    if weighted:
        hidden *= tl.load(weight_ptr + token * experts + expert, mask=pair < last, other=0.0)[:, None]
    place = pair[:, None].to(tl.int64) * neurons + column[None, :]
    mask = (pair[:, None] < last) & (column[None, :] < neurons)
    tl.store(hidden_ptr + place, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)
    if saved:
        tl.store(up_z_ptr + place, up.to(up_z_ptr.dtype.element_ty), mask=mask)
        if gated:
            tl.store(gate_z_ptr + place, gate.to(gate_z_ptr.dtype.element_ty), mask=mask)


@triton.jit
def output_rows(
    hidden_ptr, other_ptr, end_ptr, down_ptr, other_down_ptr, y_ptr,
    experts: tl.constexpr, neurons: tl.constexpr, outputs: tl.constexpr, both: tl.constexpr, precision: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """``y_PO = hidden_PH @ down_EHO[expert of p]``, plus the same of another pair of tensors if ``both``."""
    expert, first, last = find_tile(end_ptr, tl.program_id(1), experts, ROWS, EXPERTS)
    if expert >= experts:
        return
    pair = first + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    row = tl.where(pair < last, pair, first).to(tl.int64)  # rows behind the last are not stored, and may be undefined
    hidden_at = row[:, None] * neurons + inner[None, :]
    down_at = (expert.to(tl.int64) * neurons + inner[:, None]) * outputs + column[None, :]
    whole: tl.constexpr = neurons % INNER == 0 and outputs % COLUMNS == 0
    y = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, neurons, INNER):
        depth = start + inner[None, :] < neurons
        inside = (start + inner[:, None] < neurons) & (column[None, :] < outputs)
        if whole:
            hidden, down = tl.load(hidden_ptr + hidden_at + start), tl.load(down_ptr + down_at + start * outputs)
        else:
            hidden = tl.load(hidden_ptr + hidden_at + start, mask=depth, other=0.0)
            down = tl.load(down_ptr + down_at + start * outputs, mask=inside, other=0.0)
        y = tl.dot(hidden, down, y, input_precision=precision)
        if both:
            other = tl.load(other_ptr + hidden_at + start, mask=depth, other=0.0)
            other_down = tl.load(other_down_ptr + down_at + start * outputs, mask=inside, other=0.0)
            y = tl.dot(other, other_down, y, input_precision=precision)
    mask = (pair[:, None] < last) & (column[None, :] < outputs)
    tl.store(y_ptr + row[:, None] * outputs + column[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_pairs(
    y_ptr, pair_ptr, count_ptr, bias_ptr, out_ptr, experts: tl.constexpr, outputs: tl.constexpr, biased: tl.constexpr,
    STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out_NO: the sum of each token's rows of y_PO in the order of the experts, in float32, plus the bias."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    count = tl.load(count_ptr + token)
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for start in range(0, count, STEP):
        place = start + tl.arange(0, STEP)
        pair = tl.load(pair_ptr + token * experts + place, mask=place < count, other=0).to(tl.int64)
        rows = tl.load(
            y_ptr + pair[:, None] * outputs + column[None, :],
            mask=(place[:, None] < count) & (column[None, :] < outputs),
            other=0.0,
        )
        total += tl.sum(rows.to(tl.float32), 0)
    if biased:
        total += tl.load(bias_ptr + column, mask=column < outputs, other=0.0)
    tl.store(out_ptr + token * outputs + column, total.to(out_ptr.dtype.element_ty), mask=column < outputs)


@triton.jit
def mask_hidden(
    up_ptr, gate_ptr, keep_ptr, weight_ptr, experts: tl.constexpr, neurons: tl.constexpr, gated: tl.constexpr,
    weighted: tl.constexpr, code: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Replace the pre-activations of all experts, up_NEH, by the hidden neurons of the active ones, 0 elsewhere."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < experts * neurons
    entry = token * experts + column // neurons
    keep = tl.load(keep_ptr + entry, mask=inside, other=0) != 0
    place = token * (experts * neurons) + column
    up = tl.load(up_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if gated:
        hidden = up * activate(tl.load(gate_ptr + place, mask=inside, other=0.0).to(tl.float32), code)
    else:
        hidden = activate(up, code)
    if weighted:
        hidden *= tl.load(weight_ptr + entry, mask=inside, other=0.0)
    tl.store(up_ptr + place, tl.where(keep, hidden, 0.0).to(up_ptr.dtype.element_ty), mask=inside)
