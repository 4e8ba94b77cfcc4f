"""Triton kernel of top-p masks. Importing this needs Triton.

Shape suffixes: T tokens, N neurons.
"""

# mypy: ignore-errors
# The kernel's code is Triton's language, which Triton's own compiler types.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def top_p(x_ptr, share_ptr, keep_ptr, neurons, WIDTH: tl.constexpr):
    """keep_TN of one token: entries of at least t, the largest number for which their sum reaches the share.

    Bit patterns of numbers that are not negative are in the order of the numbers, so 31 bisections of them find t
    exactly, without sorting. Sums are in float64.
    """
    column = tl.arange(0, WIDTH)
    start = tl.program_id(0).to(tl.int64) * neurons
    inside = column < neurons
    size = tl.abs(tl.load(x_ptr + start + column, mask=inside, other=0.0).to(tl.float32))
    bits = size.to(tl.int32, bitcast=True)
    mass = size.to(tl.float64)
    needed = tl.sum(mass, 0) * tl.load(share_ptr)
    low = tl.full((), 0, tl.int32)
    high = tl.full((), 0x7F800001, tl.int32)  # above infinity
    for _ in range(31):
        middle = low + (high - low) // 2
        enough = tl.sum(tl.where(bits >= middle, mass, 0.0), 0) >= needed
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    least = tl.where(needed > 0, low, 0x7FFFFFFF)  # nothing of a token of zeros, or with NaN
    keep = (bits >= least) & (bits > 0)
    tl.store(keep_ptr + start + column, keep.to(tl.int8), mask=inside)
