"""Triton kernels of a feed-forward network for one token. Importing this needs Triton; nothing imports it earlier.

A zero entry of a vector marks weights that are not needed: their loads are masked, so that memory is not read. The
number of zeros stays on the device. Sums of several programs are written as parts and added in a fixed order by another
kernel; atomics are not used, so that results are deterministic.

Shape suffixes: N entries of a vector, I inputs, O outputs, F neurons, S parts.
"""

# mypy: ignore-errors
# The kernels' code is Triton's language, which Triton's own compiler types.

from __future__ import annotations

import triton
import triton.language as tl

from clframe.moe.triton_kernels import activate


@triton.jit
def drop_small(x, least):
    """Set entries whose magnitude is below ``least`` to 0; NaN stays."""
    return tl.where(tl.abs(x) < least, 0.0, x)


@triton.jit
def apply_code(z, code: tl.constexpr):
    """Activation of a code; the identity for -1."""
    if code >= 0:
        z = activate(z, code)
    return z


@triton.jit
def row_products(
    x_ptr, weight_ptr, row, active, least, width: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr
):  # fmt: skip
    """``W[row] x`` in float32, 0 for rows that are not active; entries of x below ``least`` count as 0."""
    inner = tl.arange(0, INNER)
    place = row[:, None].to(tl.int64) * width + inner[None, :]
    total = tl.zeros((ROWS, INNER), dtype=tl.float32)
    for start in range(0, width, INNER):
        inside = start + inner < width
        x = drop_small(tl.load(x_ptr + start + inner, mask=inside, other=0.0).to(tl.float32), least)
        w = tl.load(weight_ptr + place + start, mask=active[:, None] & inside[None, :], other=0.0)
        total += w.to(tl.float32) * x[None, :]
    return tl.where(active, tl.sum(total, 1), 0.0)


@triton.jit
def hidden_by_output(
    x_ptr, first_ptr, first_bias_ptr, second_ptr, second_bias_ptr, out_ptr, least_input, least,
    neurons: tl.constexpr, width: tl.constexpr, given: tl.constexpr, two: tl.constexpr, skip: tl.constexpr,
    first_biased: tl.constexpr, second_biased: tl.constexpr, first_code: tl.constexpr, second_code: tl.constexpr,
    ROWS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """out_F: ``f(first x) * g(second x)`` if ``two``, else ``f(first x)``; weights have a row per neuron.

    Entries below ``least`` become 0: with ``skip`` those of the first factor, whose zeros skip rows of the second, else
    those of the result. If ``given``, ``first_ptr`` is the first factor itself.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = row < neurons
    if given:
        value = tl.load(first_ptr + row, mask=inside, other=0.0).to(tl.float32)
    else:
        value = row_products(x_ptr, first_ptr, row, inside, least_input, width, ROWS, INNER)
        if first_biased:
            value += tl.load(first_bias_ptr + row, mask=inside, other=0.0).to(tl.float32)
        value = apply_code(value, first_code)
    if skip:  # rounded before it is compared, as PyTorch does
        value = drop_small(value.to(out_ptr.dtype.element_ty).to(tl.float32), least)
    if two:
        active = inside
        if skip:
            active = inside & (value != 0)
        other = row_products(x_ptr, second_ptr, row, active, least_input, width, ROWS, INNER)
        if second_biased:
            other += tl.load(second_bias_ptr + row, mask=active, other=0.0).to(tl.float32)
        value = value * apply_code(other, second_code)
    if not skip:
        value = drop_small(value.to(out_ptr.dtype.element_ty).to(tl.float32), least)
    tl.store(out_ptr + row, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sum_by_input(
    x_ptr, weight_ptr, other_ptr, part_ptr, least, entries: tl.constexpr, outputs: tl.constexpr, two: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """part_SO: sums of ``x_n W[n]`` over CHUNK entries each; of a second weight as well if ``two``: part_2SO.

    Entries of x below ``least`` count as 0; rows of zeros are not read.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    split, splits = tl.program_id(1), tl.num_programs(1)
    inside = column < outputs
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    other_total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, CHUNK, ROWS):
        row = split * CHUNK + start + tl.arange(0, ROWS)
        x = drop_small(tl.load(x_ptr + row, mask=row < entries, other=0.0).to(tl.float32), least)
        place = row[:, None].to(tl.int64) * outputs + column[None, :]
        needed = (x != 0)[:, None] & inside[None, :]
        total += x[:, None] * tl.load(weight_ptr + place, mask=needed, other=0.0).to(tl.float32)
        if two:
            other_total += x[:, None] * tl.load(other_ptr + place, mask=needed, other=0.0).to(tl.float32)
    tl.store(part_ptr + split * outputs + column, tl.sum(total, 0), mask=inside)
    if two:
        tl.store(part_ptr + (splits + split) * outputs + column, tl.sum(other_total, 0), mask=inside)


@triton.jit
def add_parts(part_ptr, bias_ptr, column, inside, splits: tl.constexpr, outputs: tl.constexpr, biased: tl.constexpr,
              STEP: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Sum over the parts of some columns in float32, plus the bias."""
    total = tl.zeros((STEP, COLUMNS), dtype=tl.float32)
    for start in range(0, splits, STEP):
        split = start + tl.arange(0, STEP)
        mask = (split < splits)[:, None] & inside[None, :]
        total += tl.load(part_ptr + split[:, None] * outputs + column[None, :], mask=mask, other=0.0)
    out = tl.sum(total, 0)
    if biased:
        out += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return out


@triton.jit
def finish_sums(
    part_ptr, bias_ptr, other_bias_ptr, out_ptr, least, splits: tl.constexpr, outputs: tl.constexpr, two: tl.constexpr,
    biased: tl.constexpr, other_biased: tl.constexpr, code: tl.constexpr, other_code: tl.constexpr,
    STEP: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out_O: ``f(sum of part_SO + b)``, if ``two`` times that of the second sums; entries below ``least`` become 0."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < outputs
    value = apply_code(add_parts(part_ptr, bias_ptr, column, inside, splits, outputs, biased, STEP, COLUMNS), code)
    if two:
        second_ptr = part_ptr + splits * outputs
        other = add_parts(second_ptr, other_bias_ptr, column, inside, splits, outputs, other_biased, STEP, COLUMNS)
        value = value * apply_code(other, other_code)
    value = drop_small(value.to(out_ptr.dtype.element_ty).to(tl.float32), least)
    tl.store(out_ptr + column, value.to(out_ptr.dtype.element_ty), mask=inside)
