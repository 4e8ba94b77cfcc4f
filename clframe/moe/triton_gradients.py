"""Triton kernels of experts, backward. Importing this needs Triton.

Numbering of pairs and shape suffixes as in ``triton_kernels.py``.
"""

# mypy: ignore-errors
# The kernels' code is Triton's language, which Triton's own compiler types.

from __future__ import annotations

import triton
import triton.language as tl

from clframe.moe.triton_kernels import activate, find_tile, gathered_products


@triton.jit
def derivative(z, code: tl.constexpr):
    """Derivative of :func:`~clframe.moe.triton_kernels.activate`."""
    # Its constants, 0.3989 = 1 / sqrt(2 * pi) of the normal density, and 0.134145 = 3 * 0.044715.
    if code == 0:
        return tl.where(z > 0.0, 1.0, 0.0)
    if code == 1:
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    if code == 2:
        s = tl.sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        return s + z * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    s = tl.sigmoid(z)
    return s + z * s * (1.0 - s)


@triton.jit
def hidden_gradients(
    g_ptr, token_ptr, end_ptr, down_ptr, weight_ptr, up_z_ptr, gate_z_ptr,
    up_grad_ptr, gate_grad_ptr, hidden_ptr, weight_grad_ptr,
    experts: tl.constexpr, neurons: tl.constexpr, outputs: tl.constexpr,
    gated: tl.constexpr, weighted: tl.constexpr, code: tl.constexpr, precision: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Gradients of the pre-activations and the factors, and hidden_PH again, from the outputs' gradient g_NO."""
    expert, first, last = find_tile(end_ptr, tl.program_id(1), experts, ROWS, EXPERTS)
    if expert >= experts:
        return
    pair = first + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    token = tl.load(token_ptr + pair, mask=pair < last, other=0).to(tl.int64)
    down = down_ptr + expert.to(tl.int64) * neurons * outputs
    g, _ = gathered_products(
        g_ptr, token, down, down, column, neurons, outputs, False, precision, ROWS, COLUMNS, INNER
    )
    place = pair[:, None].to(tl.int64) * neurons + column[None, :]
    mask = (pair[:, None] < last) & (column[None, :] < neurons)
    up = tl.load(up_z_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if gated:
        gate = tl.load(gate_z_ptr + place, mask=mask, other=0.0).to(tl.float32)
        scale = activate(gate, code)
        hidden = up * scale
    else:
        hidden = activate(up, code)
        scale = derivative(up, code)
    if weighted:
        weight = tl.load(weight_ptr + token * experts + expert, mask=pair < last, other=0.0).to(tl.float32)[:, None]
        share = tl.sum(tl.where(mask, g * hidden, 0.0), 1)
        tl.atomic_add(weight_grad_ptr + token * experts + expert, share, mask=pair < last, sem="relaxed")
        g *= weight
        hidden *= weight
    tl.store(up_grad_ptr + place, (g * scale).to(up_grad_ptr.dtype.element_ty), mask=mask)
    tl.store(hidden_ptr + place, hidden.to(hidden_ptr.dtype.element_ty), mask=mask)
    if gated:
        own = g * up * derivative(gate, code)
        tl.store(gate_grad_ptr + place, own.to(gate_grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def weight_gradients(
    a_ptr, x_ptr, token_ptr, end_ptr, out_ptr, sum_ptr,
    neurons: tl.constexpr, width: tl.constexpr, summed: tl.constexpr, precision: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """``out_EHD[e] = a_PH.t() @ x_ND[token_P]`` over the pairs of expert e, and the sums of a_PH if ``summed``."""
    expert = tl.program_id(2)
    first = tl.load(end_ptr + expert - 1, mask=expert > 0, other=0)
    last = tl.load(end_ptr + expert)
    neuron = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, INNER)
    out = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for start in range(first, last, INNER):
        pair = start + inner
        token = tl.load(token_ptr + pair, mask=pair < last, other=0).to(tl.int64)
        a = tl.load(
            a_ptr + pair[None, :].to(tl.int64) * neurons + neuron[:, None],
            mask=(pair[None, :] < last) & (neuron[:, None] < neurons),
            other=0.0,
        )
        x = tl.load(
            x_ptr + token[:, None] * width + column[None, :],
            mask=(pair[:, None] < last) & (column[None, :] < width),
            other=0.0,
        )
        out = tl.dot(a, x, out, input_precision=precision)
        if summed:
            total += tl.sum(a.to(tl.float32), 1)
    own = expert.to(tl.int64) * neurons + neuron
    mask = (neuron[:, None] < neurons) & (column[None, :] < width)
    tl.store(out_ptr + own[:, None] * width + column[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
    if summed:
        once = tl.where(tl.program_id(0) == 0, neuron, neurons)
        tl.store(sum_ptr + own, total.to(sum_ptr.dtype.element_ty), mask=once < neurons)
