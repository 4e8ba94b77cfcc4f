"""Randomness as a pure function of where it is used.

Every random choice of a run is drawn from a generator seeded by ``derive_seed(seed, ...)`` with the place
it belongs to (experience, epoch, component). So a run that was stopped goes on with the numbers it would
have had, without any generator state being saved, and one choice more in one place shifts no other.
"""

from __future__ import annotations

import hashlib

import torch


def derive_seed(seed: int, *place: int | str) -> int:
    """A 63-bit seed for one place of a run: the first bytes of BLAKE2b over ``(seed, *place)``.

    >>> derive_seed(0, "order", 1) == derive_seed(0, "order", 1)
    True
    >>> derive_seed(0, "order", 1) == derive_seed(0, "order", 2)
    False
    """
    digest = hashlib.blake2b(repr((seed, *place)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator_for(seed: int, *place: int | str) -> torch.Generator:
    """A CPU generator seeded by :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *place))


def epoch_order(size: int, *, seed: int, experience: int, epoch: int) -> torch.Tensor:
    """order_N: the permutation of ``size`` samples for one epoch, a function of its arguments alone.

    >>> epoch_order(4, seed=0, experience=0, epoch=0).sort().values.tolist()
    [0, 1, 2, 3]
    """
    return torch.randperm(size, generator=generator_for(seed, "order", experience, epoch))
