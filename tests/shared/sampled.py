"""Products of parameters of which the default suite runs a part, the slow one all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def sampled(first: Sequence[Any], second: Sequence[Any], *, every: int = 2) -> list[Any]:
    """Return all pairs as parameters; those marked slow leave each value with one in ``every`` values of the other.

    A value of ``second`` may be a tuple of several parameters. Positions choose the pairs, so they are always the same.
    """
    return [
        pytest.param(a, *(b if isinstance(b, tuple) else (b,)), marks=[pytest.mark.slow] * ((i + j) % every != 0))
        for i, a in enumerate(first)
        for j, b in enumerate(second)
    ]
