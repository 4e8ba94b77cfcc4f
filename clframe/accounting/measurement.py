"""Time, memory and energy of calls, measured rather than derived from counts."""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from clframe.accounting.macs import evaluation_mode
from clframe.errors import ConfigError

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Times of single calls with one batch size."""

    batch: int
    """Samples per call."""
    seconds: tuple[float, ...]
    """Of every timed call, in order."""
    device: str

    @property
    def p50(self) -> float:
        """Median of the seconds."""
        return self.quantile(0.5)

    @property
    def p95(self) -> float:
        """95th percentile of the seconds."""
        return self.quantile(0.95)

    @property
    def throughput(self) -> float:
        """Samples per second over all timed calls."""
        return self.batch * len(self.seconds) / sum(self.seconds)

    def quantile(self, share: float) -> float:
        """Return the smallest observed time that at least this share of the calls do not exceed.

        >>> Latency(batch=1, seconds=(0.4, 0.1, 0.3, 0.2), device="cpu").quantile(0.5)
        0.2
        """
        return sorted(self.seconds)[max(1, math.ceil(share * len(self.seconds))) - 1]


def latency(
    module: nn.Module, example: Tensor, *, batches: Sequence[int] = (1,), warmup: int = 5, repeats: int = 30
) -> tuple[Latency, ...]:
    """Time ``module`` in evaluation mode without gradients, with one result per batch size.

    Calls cycle through the samples of ``example``, because the time of a model with early exits depends on its inputs.
    The module is not changed.

    Args:
        module: Module to time, called with one tensor.
        example: Inputs, batch first, on any device; repeated if a batch is larger.
        batches: Batch sizes.
        warmup: Calls before timing starts.
        repeats: Timed calls.

    Raises:
        ConfigError: A size or number of calls below 1, or no sample in ``example``.
    """
    if not batches or min(batches) < 1 or repeats < 1 or warmup < 0 or len(example) < 1:
        raise ConfigError(
            f"latency: found batches {list(batches)}, warmup {warmup}, repeats {repeats} and {len(example)} samples; "
            f"use sizes and repeats of at least 1 and an example with samples"
        )
    tensor = next(iter((*module.parameters(), *module.buffers())), example)
    inputs = example.to(tensor.device)
    with evaluation_mode(module), torch.inference_mode():
        return tuple(
            Latency(batch=size, seconds=_time_calls(module, parts, warmup, repeats), device=str(inputs.device))
            for size, parts in ((size, _split_batches(inputs, size)) for size in batches)
        )


def synchronize(device: torch.device) -> None:
    """Block until ``device`` has finished all queued work; no-op on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def time_call(call: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    """Result of a call, and the seconds until ``device`` has computed it."""
    synchronize(device)
    start = time.perf_counter()
    found = call()
    synchronize(device)
    return found, time.perf_counter() - start


def process_peak_bytes() -> int | None:
    """Return the peak resident memory of this process, as the system counts it; None if it does not.

    The peak never falls, so the peak of a single run needs a separate process.
    """
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class DevicePeak:
    """Peak of the memory that torch allocated on a CUDA device in a ``with`` block; None on other devices."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self.bytes: int | None = None

    def __enter__(self) -> DevicePeak:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = self.read()

    def read(self) -> int | None:
        """Return the peak since the block began."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None


def _time_calls(module: nn.Module, batches: Sequence[Tensor], warmup: int, repeats: int) -> tuple[float, ...]:
    device = batches[0].device
    for call in range(warmup):
        module(batches[call % len(batches)])
    return tuple(time_call(partial(module, batches[call % len(batches)]), device)[1] for call in range(repeats))


def _split_batches(x: Tensor, size: int) -> tuple[Tensor, ...]:
    """Split into batches of this size; repeat the samples if there are fewer."""
    if len(x) < size:
        copies = -(-size // len(x))
        return (x.repeat(copies, *(1 for _ in x.shape[1:]))[:size].contiguous(),)
    return tuple(x[start : start + size].contiguous() for start in range(0, len(x) - size + 1, size))


Source = Literal["nvml", "rapl", "none"]
"""Hardware counter that was read."""

POWERCAP = Path("/sys/class/powercap")
"""Folder of RAPL's counters on Linux."""


@dataclass(frozen=True)
class Energy:
    """Energy between two readings."""

    joules: float | None
    """None without a counter, or if the counter was not updated in between."""
    energy_source: Source


class EnergyMeter:
    """Reads the energy counter of a device at the start and the end of a ``with`` block, into ``energy``.

    Uses NVML for a GPU and RAPL for anything else. Both count the whole chip with everything that runs on it. NVML's
    counter is updated every 20 to 100 ms; a shorter block may have no reading.

    Args:
        device: Device that does the work.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self.energy = Energy(None, "none")

    def __enter__(self) -> EnergyMeter:
        self._source, self._read = _counter(self._device)
        self._start = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        self.energy = self.read()

    def read(self) -> Energy:
        """Return the energy since the block began."""
        if self._source == "none":
            return Energy(None, "none")
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return Energy(_difference(self._start, self._read()), self._source)


@dataclass(frozen=True)
class Reading:
    """Reading of a counter."""

    joules: float
    wraps_at: float | None = None
    """Value at which the counter restarts at zero."""


Readings = Mapping[str, Reading]


def _difference(start: Readings, end: Readings) -> float | None:
    """Return the joules of all counters; None if one is missing or has wrapped at an unknown value, or none changed."""
    if not start or start.keys() != end.keys():
        return None
    total = 0.0
    for name, before in start.items():
        spent = end[name].joules - before.joules
        if spent < 0:
            if before.wraps_at is None:
                return None
            spent += before.wraps_at
        total += spent
    return total if total > 0 else None


def _counter(device: torch.device) -> tuple[Source, Callable[[], Readings]]:
    if device.type == "cuda":
        read = _nvml(device)
        return ("none", dict) if read is None else ("nvml", read)
    return ("rapl", rapl) if rapl() else ("none", dict)


def rapl(folder: Path | None = None) -> Readings:
    """Read the counters of all processor packages; empty if there are none or one is not readable."""
    folder = POWERCAP if folder is None else folder
    readings = {}
    try:
        for package in sorted(folder.glob("intel-rapl:*")):
            if package.name.count(":") == 1:  # domains of a package are counted in it
                joules = int((package / "energy_uj").read_text()) / 1e6
                readings[package.name] = Reading(joules, int((package / "max_energy_range_uj").read_text()) / 1e6)
    except (OSError, ValueError):
        return {}
    return readings


def _nvml(device: torch.device) -> Callable[[], Readings] | None:
    """Return a function that reads one GPU's counter; None without NVML or a counter."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    with contextlib.suppress(nvml.NVMLError, AttributeError, RuntimeError):
        nvml.nvmlInit()
        # By UUID: NVML numbers all GPUs of the machine, torch only those in CUDA_VISIBLE_DEVICES.
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)

        def read() -> Readings:
            try:
                return {uuid: Reading(nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)}
            except nvml.NVMLError:
                return {}

        return read
    return None
