"""Joules from a real counter, or none at all: nothing here is ever estimated from time, load or a data sheet.

NVML counts a GPU's energy (through ``nvidia-ml-py``, where it is installed), RAPL a processor's (where the system
lets it be read). The source is recorded with every figure.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

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
