"""A small run folder that a test may damage, and the command line called on it."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

from clframe.cli import main

RUNS = Path(__file__).parents[1] / "fixtures" / "runs"


@pytest.fixture
def run(here):
    """A finished run, and inputs for it in ``inputs.npz``."""
    np.savez(here / "inputs.npz", x=np.zeros((2, 1, 8, 8), dtype=np.uint8))
    return Path(shutil.copytree(RUNS / "format_3", here / "run"))


@pytest.fixture
def call(capsys):
    """Call the command line; returns its code and what it printed."""

    def calling(*arguments):
        code = main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return calling


@pytest.fixture
def refused(call):
    """Call, and see that it ends with code 2 and one line, without using memory as a file claims."""

    def refusing(arguments, *texts):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        code, _, err = call(*arguments)
        lines = err.splitlines()
        assert code == 2, err
        assert [line for line in lines if line.startswith("clframe: error: ")] == lines[-1:]
        assert "Traceback" not in err
        for text in texts:
            assert text in lines[-1]
        # Kilobytes: modules that are imported for the first time take most of it.
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_500_000

    return refusing


READERS = {
    "report": ["report", "run"],
    "resume": ["run", "--resume", "run"],
    "predict": ["predict", "run", "inputs.npz"],
    "evaluate": ["evaluate", "run"],
    "export": ["export", "run", "--format", "safetensors"],
    "extend": ["extend", "run", "benchmark=digits"],
    "card": ["card", "run"],
    "latency": ["latency", "run"],
    "analyze": ["analyze", "exits", "run"],
}
"""A command for every verb that reads a run folder."""


@pytest.fixture(scope="session")
def readers():
    """See :data:`READERS`."""
    return READERS
