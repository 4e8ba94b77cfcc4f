"""Seconds and bytes that a call really takes: measured, never derived from counts.

Latency is what one batch waits; throughput is samples a second. Both follow a warm-up, and the device has finished
before a clock is read.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clframe.errors import ConfigError
from clframe.functional.macs import as_found


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
