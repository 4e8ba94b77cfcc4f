"""Seeds as pure functions of where they are used, and torch's process-wide settings."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def torch_settings(*, threads: int | None = None, deterministic: bool | None = None) -> Iterator[None]:
    """Threads and determinism while active, put back afterwards; None leaves one as it is.

    >>> before = torch.get_num_threads()
    >>> with torch_settings(threads=before + 1):
    ...     torch.get_num_threads() - before
    1
    >>> torch.get_num_threads() - before
    0
    """
    before = torch.get_num_threads()
    strict = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        if deterministic is not None:
            torch.use_deterministic_algorithms(deterministic)
        yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
