"""What torch keeps for the whole process, set for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
