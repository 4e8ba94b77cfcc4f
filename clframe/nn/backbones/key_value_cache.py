"""Keys and values of the tokens that an attention has computed, kept for those that follow.

Shape suffixes: B windows, H heads, T new tokens, L tokens so far, C capacity, E width of a head.
"""

from __future__ import annotations

from torch import Tensor


class KeyValueCache:
    """Keys_BHCE and values_BHCE of one attention, written in place, so that a CUDA graph can write and read them.

    Args:
        capacity: Largest number of tokens C.

    >>> import torch
    >>> cache = KeyValueCache(5)
    >>> cache.write(torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), torch.arange(3))
    >>> [tuple(part.shape) for part in cache.read(3)]
    [(1, 2, 3, 4), (1, 2, 3, 4)]
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._kept: tuple[Tensor, Tensor] | None = None

    def write(self, k_BHTE: Tensor, v_BHTE: Tensor, positions_T: Tensor) -> None:
        """Write the keys and values of tokens at their positions; the first call decides size and type."""
        if self._kept is None:
            batch, heads, _, width = k_BHTE.shape
            size = batch, heads, self.capacity, width
            # Zeros, since the weight 0 of a position that has no token does not cancel a NaN.
            self._kept = k_BHTE.new_zeros(size), v_BHTE.new_zeros(size)
        keys_BHCE, values_BHCE = self._kept
        keys_BHCE.index_copy_(2, positions_T, k_BHTE)
        values_BHCE.index_copy_(2, positions_T, v_BHTE)

    def read(self, length: int) -> tuple[Tensor, Tensor]:
        """Return keys_BHLE and values_BHLE of the first ``length`` positions, as views."""
        assert self._kept is not None
        return self._kept[0][:, :, :length], self._kept[1][:, :, :length]
