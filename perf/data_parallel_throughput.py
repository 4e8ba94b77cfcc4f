"""Throughput of a strategy on one device or on several, and the time of its replay buffers; see data_parallel.py."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from data_parallel_settings import Settings, build
from torch import nn

from clframe.training.distributed import Group
from clframe.training.observer import UNOBSERVED, StepObserver
from clframe.training.synchronization import fingerprint, state_tensors, synchronize

WARM = 10
"""Steps before the clock starts: the first ones run eagerly, then one is recorded."""
FIRST = 4
"""Steps of the experience before the one that is timed."""
REPEATS = 5
"""Repetitions of an operation that takes a few milliseconds."""


class Clock:
    """Times the steps of a strategy after the first ones, and ends the experience.

    Args:
        seconds: How long to time.
        group: The processes; all take equally many steps.

    Attributes:
        on_end: Called after the last step.
    """

    def __init__(self, seconds: float, group: Group | None) -> None:
        self._seconds, self._group = seconds, group
        self._step, self._last, self._new = 0, -1, 0
        self._start = self._timed = 0.0
        self.rate = self.step_ms = self.average_ms = 0.0
        self.on_end: Callable[[], None] = lambda: None

    def watch(self, loop: Any, *, batch: int) -> None:
        """Time the next experience of a strategy."""
        self._device, self._batch = loop.device, batch
        loop.on_step = self._after_step

    def _after_step(self, loop: Any) -> None:
        self._step += 1
        if self._step == WARM:
            self._start = now(self._device)
        elif self._step == WARM + 3:
            each = max((now(self._device) - self._start) / 3, 1e-4)
            more = {"steps": float(min(max(3, round(self._seconds / each)), 400))}
            self._last = self._step + int((more if self._group is None else self._group.agree(more))["steps"])
            self._timed = now(self._device)
        elif self._step == self._last:
            passed = now(self._device) - self._timed
            steps = self._last - WARM - 3
            self.rate, self.step_ms = steps * self._batch / passed, 1e3 * passed / steps
            if self._group is not None:
                self.average_ms = self._time_average(loop)
            self.on_end()
            loop.stop_training()

    def _time_average(self, loop: Any) -> float:
        start = now(self._device)
        for _ in range(REPEATS):
            loop.average_gradients()
        return 1e3 * (now(self._device) - start) / REPEATS


class BufferTimes(StepObserver):
    """Times what an experience does for the replay buffers of a strategy.

    Args:
        loop: The strategy.

    Attributes:
        select_ms: Selecting samples at the end of the experience, with the features or logits that this takes.
    """

    def __init__(self, loop: Any) -> None:
        self._loop = loop
        self._owners = [component.name for component in loop.learner.composition if component.keeps_memory]
        self.select_ms = 0.0

    def around(self, section: str, component: str = "", samples: int = 0) -> AbstractContextManager[object]:
        """Time the end of an experience of components with a buffer."""
        times = section == "after_experience" and component in self._owners
        return self._timed() if times else UNOBSERVED

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = now(self._loop.device)
        yield
        self.select_ms += 1e3 * (now(self._loop.device) - start)

    def measure(self) -> dict[str, float]:
        """Return the times after an experience, in milliseconds; of several devices those of the exchange too."""
        states = {name: self._loop.learner.state[name] for name in self._owners}
        if not states:
            return {}
        tensors = list(state_tensors(states))
        found = {
            "buffer_select_ms": round(self.select_ms, 3),
            "buffer_mib": round(sum(t.numel() * t.element_size() for t in tensors) / 2**20, 3),
        }
        group = self._loop.group
        if group is not None:
            exchange: dict[str, Callable[[], Any]] = {
                "buffer_exchange_ms": lambda: synchronize(
                    nn.Module(),  # type: ignore[arg-type]  # no weights
                    states, device=group.device, is_first=group.is_first,
                ),
                "buffer_check_ms": lambda: group.check_equal(
                    {"buffer": fingerprint(tensors)}, where="after an experience", advice="report it"
                ),
            }  # fmt: skip
            found |= {name: round(self._mean_ms(call, group), 3) for name, call in exchange.items()}
        return found

    def _mean_ms(self, call: Callable[[], Any], group: Group) -> float:
        call()
        group.barrier()
        start = now(self._loop.device)
        for _ in range(REPEATS):
            call()
        return 1e3 * (now(self._loop.device) - start) / REPEATS


def now(device: torch.device) -> float:
    """Return the time in seconds once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def throughput(
    expression: str, settings: Settings, *, batch: int, device: torch.device, group: Group | None, capture: Any,
    precision: str, seconds: float, evaluates: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Train an experience briefly, then time steps of the next one."""
    data = settings.benchmark
    loop = build(
        expression, data, settings.make, device=device, group=group, precision=precision, batch=batch, epochs=200,
        capture=capture if device.type == "cuda" else False,
    )  # fmt: skip
    first, second = data.avalanche.train_stream
    loop.limit_batches = FIRST
    loop.train_epochs = 1
    loop.train(first)
    loop.limit_batches, loop.train_epochs = None, 200
    clock = Clock(seconds, group)
    clock.watch(loop, batch=batch)
    buffers = BufferTimes(loop)
    clock.on_end = lambda: setattr(loop.learner, "observer", buffers)  # not while steps are timed
    loop.train(second)
    found = {"rate": round(clock.rate, 1), "step_ms": round(clock.step_ms, 3), "average_ms": round(clock.average_ms, 3)}
    if loop.step_capture is not None:
        found["graphs"] = loop.step_capture.recorded
    found |= buffers.measure()
    if device.type == "cuda":
        found["memory_gib"] = round(torch.cuda.max_memory_allocated(device) / 2**30, 2)
        torch.cuda.reset_peak_memory_stats(device)
    if evaluates:
        loop.eval(data.evaluation_stream[:1])
        start = now(device)
        for _ in range(2):
            loop.eval(data.evaluation_stream)
        found["eval"] = round(2 * settings.images / (now(device) - start), 1)
    return found
