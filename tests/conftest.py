"""Settings of every test: one thread per worker, and seeds that do not depend on the order of tests."""

from __future__ import annotations

import os
import random

# Before torch is imported: two workers with a thread pool each are slower than two with one thread.
THREADS = int(os.environ.get("TEST_THREADS", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

import numpy as np
import pytest
import torch

torch.set_num_threads(THREADS)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed Python, numpy and torch before each test; returns the value."""
    value = 0
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value
