"""Settings of every test: one thread per worker, no GPU unless asked for, fixed seeds, and no needless figures."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib.metadata
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch is imported: two workers with a thread pool each are slower than two with one thread.
THREADS = int(os.environ.get("TEST_THREADS", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
if not os.environ.get("TEST_GPU"):
    # The suite compares numbers bit for bit, which a GPU does not promise: `make test-gpu` runs the tests that need one.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Lightning looks through all installed packages for callbacks whenever a Fabric or a Trainer is made.
_entry_points = importlib.metadata.entry_points
_found = functools.cache(lambda path, parameters: _entry_points(**dict(parameters)))
importlib.metadata.entry_points = lambda **parameters: _found(tuple(sys.path), tuple(parameters.items()))

import numpy as np
import pytest
import torch

torch.set_num_threads(THREADS)
if not os.environ.get("TEST_GPU"):
    # Lightning has torch look for the driver's library at every loader of data, which without one is a millisecond each.
    torch.cuda._cached_device_count = 0

# Under nohup, or in the background of a script, these are ignored, and a run that a test interrupts would ignore them.
for _name, _handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, _name) and signal.getsignal(getattr(signal, _name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, _name), _handler)

DRAWN = {"clframe.execution": "write_figures", "clframe.training.tensorboard_pages": "draw_pictures"}
"""Functions that draw during a run, by module: four fifths of the time of a run as small as those of the tests. The option
``trainer.figures`` would be in every config that tests compare."""
_drawing = False


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "figures: runs draw their figures, which other tests leave out to save time")
    # A power cut ends the tests as well, and a run of half a second waits for the disk forty times.
    os.fsync = lambda handle: None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect slow tests unless -m or the id of a test asks for them."""
    if config.option.markexpr or any("::" in argument for argument in config.args):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections, which would pass over it again and again."""
    gc.freeze()
    atexit.register(gc.unfreeze)  # else libraries report what they find alive at the end


class _Clock:
    """Replaces ``time``: a sleep advances the clock instead of taking time. Names of event files end in the second, so a
    resumed run sleeps until the next one."""

    _ahead = 0.0

    def time(self) -> float:
        return time.time() + self._ahead

    def sleep(self, seconds: float) -> None:
        self._ahead += seconds

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)


CLOCK = _Clock()
CLOCKED = ("clframe.training.event_files", "tensorboard.summary.writer.event_file_writer")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    """Decide about figures before the fixtures of a module, which may run clframe, are made."""
    global _drawing
    for name in CLOCKED:
        if name in sys.modules:
            sys.modules[name].time = CLOCK
    _drawing = item.get_closest_marker("figures") is not None
    for name, function in DRAWN.items():
        module = sys.modules.get(name)  # not imported here: most tests need neither
        original = getattr(module, function, None)
        if original is not None and not hasattr(original, "drawn_on_request"):
            setattr(module, function, _on_request(original))


def _on_request(draw: Callable[..., object]) -> Callable[..., object]:
    def drawn(*args: object, **options: object) -> object:
        if _drawing:
            return draw(*args, **options)
        return {}

    drawn.drawn_on_request = True
    return drawn


@pytest.fixture(scope="session")
def drawing() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A context in which runs draw their figures, for fixtures that tests with and without the marker share."""

    @contextlib.contextmanager
    def on() -> Iterator[None]:
        global _drawing
        before, _drawing = _drawing, True
        try:
            yield
        finally:
            _drawing = before

    return on


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed Python, numpy and torch before each test; returns the value."""
    value = 0
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value
