"""Triton kernel of the pooling of exits. Importing this needs Triton."""

# mypy: ignore-errors
# The kernel's code is Triton's language, which Triton's own compiler types.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def blend_windows(
    x_ptr, a_ptr, y_ptr, channels, columns, places, of_sample, of_channel, of_row, of_column,
    PLACES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """``a * max + (1 - a) * mean`` of windows of 2x2; ``y[sample, channel, place]`` is contiguous."""
    sample = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * PLACES + tl.arange(0, PLACES)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    inside = (place < places)[:, None] & (channel < channels)[None, :]
    row, column = place // columns * 2, place % columns * 2
    first = x_ptr + sample * of_sample + (row * of_row + column * of_column)[:, None] + (channel * of_channel)[None, :]
    v00 = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    v01 = tl.load(first + of_column, mask=inside, other=0.0).to(tl.float32)
    v10 = tl.load(first + of_row, mask=inside, other=0.0).to(tl.float32)
    v11 = tl.load(first + of_row + of_column, mask=inside, other=0.0).to(tl.float32)
    upper = tl.maximum(v00, v01, propagate_nan=tl.PropagateNan.ALL)
    lower = tl.maximum(v10, v11, propagate_nan=tl.PropagateNan.ALL)
    most = tl.maximum(upper, lower, propagate_nan=tl.PropagateNan.ALL)
    mean = (v00 + v01 + v10 + v11) * 0.25
    a = tl.load(a_ptr).to(tl.float32)
    y = tl.where(tl.abs(a) < 0.5, mean + a * (most - mean), most - (most - mean) * (1.0 - a))  # as torch.lerp
    to = y_ptr + sample * channels * places + channel.to(tl.int64)[None, :] * places + place[:, None]
    tl.store(to, y.to(y_ptr.dtype.element_ty), mask=inside)
