"""What every test stands on: one thread a worker, and the same random numbers whoever runs first."""

from __future__ import annotations

import os
import random

# Before torch is imported: two workers with a thread pool each are slower than two with one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed Python, numpy and torch before each test; the value, for tests that hand it on."""
    value = 0
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value
