"""Seeds as pure functions of their use, and torch's process-wide settings."""

from __future__ import annotations

import hashlib
import os
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral

import numpy as np
import torch


def derive_seed(seed: int, *use: int | str) -> int:
    """Derive a 63-bit seed for one use in a run: the first bytes of BLAKE2b over ``(seed, *use)``.

    >>> derive_seed(0, "order", 1) == derive_seed(0, "order", 1)
    True
    >>> derive_seed(0, "order", 1) == derive_seed(0, "order", 2)
    False
    >>> derive_seed(np.int64(7), "order", np.int64(1)) == derive_seed(7, "order", 1)
    True
    """
    # Whole numbers of numpy are written in another way than those of Python.
    plain = tuple(int(value) if isinstance(value, Integral) else value for value in (seed, *use))
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator_for(seed: int, *use: int | str) -> torch.Generator:
    """Make a CPU generator seeded by :func:`derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *use))


def seed_global_generators(seed: int) -> None:
    """Seed the generators of torch, numpy and random that belong to the process.

    >>> seed_global_generators(5)
    >>> torch.rand(1).item() == torch.rand(1, generator=torch.Generator().manual_seed(5)).item()
    True
    """
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # torch.manual_seed queues a call with its stack trace, a millisecond, for devices that do not exist
        torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def epoch_order(size: int, *, seed: int, experience: int, epoch: int) -> torch.Tensor:
    """Permutation order_N of ``size`` samples for one epoch; depends on the arguments only.

    >>> epoch_order(4, seed=0, experience=0, epoch=0).sort().values.tolist()
    [0, 1, 2, 3]
    """
    return torch.randperm(size, generator=generator_for(seed, "order", experience, epoch))


@contextmanager
def torch_settings(
    *, threads: int | None = None, deterministic: bool | None = None, cuda: bool = False
) -> Iterator[None]:
    """Set CPU threads and determinism while active and restore them at the end; None changes nothing.

    On CUDA, ``deterministic=False`` also has cuDNN measure which algorithms are fastest, and allows TF32 in products
    of float32 matrices and in convolutions; True forbids both.

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
    variable = os.environ.get(_COMPILER_VARIABLE)
    cudnn = torch.backends.cudnn
    cuda_settings = cudnn.benchmark, cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        if deterministic is not None:
            _use_deterministic_algorithms(deterministic, variable="1" if deterministic else None)
            if cuda:
                torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = not deterministic
                torch.set_float32_matmul_precision("highest" if deterministic else "high")
        yield
    finally:
        if cuda:
            torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32, products = cuda_settings
            torch.set_float32_matmul_precision(products)
        torch.set_num_threads(before)
        _use_deterministic_algorithms(strict, warn_only=warn_only, variable=variable)


_COMPILER = "torch._inductor.config"
_COMPILER_VARIABLE = "TORCHINDUCTOR_DETERMINISTIC"


def _use_deterministic_algorithms(on: bool, *, warn_only: bool = False, variable: str | None = None) -> None:
    """Call ``torch.use_deterministic_algorithms`` without importing torch's compiler, which takes seconds.

    That sets an option of the compiler as well. As long as the compiler is not imported, the environment variable from
    which it reads the option at import is set instead.
    """
    if _COMPILER in sys.modules:
        torch.use_deterministic_algorithms(on, warn_only=warn_only)
    else:
        torch.set_deterministic_debug_mode(("warn" if warn_only else "error") if on else "default")
    if variable is None:
        os.environ.pop(_COMPILER_VARIABLE, None)
    else:
        os.environ[_COMPILER_VARIABLE] = variable
