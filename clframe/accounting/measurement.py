"""Measured time, memory and energy of calls: never derived from counts."""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clframe.accounting.macs import as_found
from clframe.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Times of single calls with one size of batch."""

    batch: int
    """Samples of a call."""
    seconds: tuple[float, ...]
    """Every timed call, in order."""
    device: str

    @property
    def p50(self) -> float:
        """Seconds that half of the calls stay within."""
        return self.quantile(0.5)

    @property
    def p95(self) -> float:
        """Seconds that 95 % of the calls stay within."""
        return self.quantile(0.95)

    @property
    def throughput(self) -> float:
        """Samples a second over all timed calls."""
        return self.batch * len(self.seconds) / sum(self.seconds)

    def quantile(self, share: float) -> float:
        """The smallest time that at least this share of the calls stay within, a time really seen.

        >>> Latency(batch=1, seconds=(0.4, 0.1, 0.3, 0.2), device="cpu").quantile(0.5)
        0.2
        """
        return sorted(self.seconds)[max(1, math.ceil(share * len(self.seconds))) - 1]


def latency(
    module: nn.Module, example: Tensor, *, batches: Sequence[int] = (1,), warmup: int = 5, repeats: int = 30
) -> tuple[Latency, ...]:
    """Time ``module`` in evaluation mode without gradients, one result for each size of batch.

    Each call gets the next samples of ``example``, and the first ones again after the last: how long a model that stops
    early takes depends on its inputs. The module is left as it was found.

    Args:
        module: What to time; it is called with one tensor.
        example: Inputs, batch first, on any device; repeated where a batch is larger.
        batches: Sizes.
        warmup: Calls that are not timed.
        repeats: Calls that are.

    Raises:
        ConfigError: A size or number of calls below 1, or no sample in ``example``.
    """
    if not batches or min(batches) < 1 or repeats < 1 or warmup < 0 or len(example) < 1:
        raise ConfigError(
            f"latency: found batches {list(batches)}, warmup {warmup}, repeats {repeats} and {len(example)} samples; "
            f"give sizes and repeats of 1 or more and an example that is not empty"
        )
    tensor = next(iter((*module.parameters(), *module.buffers())), example)
    inputs = example.to(tensor.device)
    with as_found(module), torch.inference_mode():
        return tuple(
            Latency(batch=size, seconds=_times(module, parts, warmup, repeats), device=str(inputs.device))
            for size, parts in ((size, _dealt(inputs, size)) for size in batches)
        )


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has finished what it was given; nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def process_peak_bytes() -> int | None:
    """The most memory this process has held so far, as the system counts it; None where it does not.

    It never falls, so only a process of its own can say what one run takes.
    """
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class DevicePeak:
    """The most memory that torch held on a CUDA device inside a ``with`` block; None on other devices."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self.bytes: int | None = None

    def __enter__(self) -> DevicePeak:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device)


def _times(module: nn.Module, batches: Sequence[Tensor], warmup: int, repeats: int) -> tuple[float, ...]:
    device = batches[0].device
    for call in range(warmup):
        module(batches[call % len(batches)])
    synchronize(device)
    seconds = []
    for call in range(repeats):
        x = batches[call % len(batches)]
        start = time.perf_counter()
        module(x)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return tuple(seconds)


def _dealt(x: Tensor, size: int) -> tuple[Tensor, ...]:
    """Batches of this size, one behind the other; one that repeats the samples where there are fewer."""
    if len(x) < size:
        copies = -(-size // len(x))
        return (x.repeat(copies, *(1 for _ in x.shape[1:]))[:size].contiguous(),)
    return tuple(x[start : start + size].contiguous() for start in range(0, len(x) - size + 1, size))


Source = Literal["nvml", "rapl", "none"]
"""Who counted."""

POWERCAP = Path("/sys/class/powercap")
"""Where Linux keeps RAPL's counters."""


@dataclass(frozen=True)
class Energy:
    """Energy between two readings."""

    joules: float | None
    """None where nothing counted, or the counter had not moved on yet."""
    energy_source: Source


class EnergyMeter:
    """Reads the counter of a device at the start and the end of a ``with`` block, into ``energy``.

    A GPU is asked through NVML, anything else through RAPL. Both count the whole chip, with everything that runs
    on it. NVML's counter moves every 20 to 100 ms: over a shorter block it may stand still, which is no figure.

    Args:
        device: Where the work runs.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self.energy = Energy(None, "none")

    def __enter__(self) -> EnergyMeter:
        self._source, self._read = _counter(self._device)
        self._start = self._read()
        return self

    def __exit__(self, *_: object) -> None:
        if self._source == "none":
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.energy = Energy(_between(self._start, self._read()), self._source)


@dataclass(frozen=True)
class Reading:
    """A counter at one moment."""

    joules: float
    wraps_at: float | None = None
    """From where the counter starts again at zero."""


Readings = Mapping[str, Reading]


def _between(start: Readings, end: Readings) -> float | None:
    """Joules by all counters; None where one is missing, has wrapped unseen or none has moved."""
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
    """The counters of all processor packages; empty where there is none or one may not be read."""
    folder = POWERCAP if folder is None else folder
    readings = {}
    try:
        for package in sorted(folder.glob("intel-rapl:*")):
            if package.name.count(":") == 1:  # parts of a package are counted in it
                joules = int((package / "energy_uj").read_text()) / 1e6
                readings[package.name] = Reading(joules, int((package / "max_energy_range_uj").read_text()) / 1e6)
    except (OSError, ValueError):
        return {}
    return readings


def _nvml(device: torch.device) -> Callable[[], Readings] | None:
    """A reader of one GPU's counter, or None where NVML or the counter is not there."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    with contextlib.suppress(nvml.NVMLError, AttributeError, RuntimeError):
        nvml.nvmlInit()
        # By UUID: NVML numbers all GPUs of the machine, torch those that it was shown.
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
