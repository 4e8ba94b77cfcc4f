"""Sweeps without training; see tests/shared/fake_cells.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fake_cells import SMALL, Recorder


@pytest.fixture
def recorder():
    return Recorder


@pytest.fixture
def small():
    """A space of one cell, with changes."""
    from clframe.sweep.space import Space

    def make(*, grid=None, **changes):
        return replace(Space(config="quickstart", grid={**SMALL, **(grid or {})}), **changes)

    return make
