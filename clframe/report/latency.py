"""The file latency.json of a run folder: latencies and the setting they were measured in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from clframe.accounting.entries import read_row
from clframe.errors import RunFolderError
from clframe.files import read_json, write_atomically

FILE = "latency.json"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Timed:
    """Latency of one way to predict at one batch size."""

    way: str
    """``whole network``, every exit computed; ``exit/<name>``, all samples exit there and earlier exits are not
    computed; ``policy``, the run's exit policy; ``policy, CUDA graphs``, the same by graphs, on CUDA only."""
    batch: int
    p50: float
    """Median, in seconds per call."""
    p95: float
    throughput: float
    """Samples per second."""
    macs: float
    """MACs per sample at this batch size, mean over the same samples."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Hardware and options of a measurement."""

    device: str
    processor: str
    threads: int
    torch: str
    dtype: str
    warmup: int
    repeats: int
    samples: int


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Latencies of one run."""

    setting: Setting
    rows: tuple[Timed, ...]

    @property
    def batches(self) -> Sequence[int]:
        """Batch sizes, each once, in order."""
        return tuple(dict.fromkeys(row.batch for row in self.rows))


def write_timings(timings: Timings, folder: Path) -> Path:
    """Write latencies into a run folder, all or nothing; returns the path."""
    content = {"schema_version": SCHEMA, **asdict(timings)}
    write_atomically(folder / FILE, json.dumps(content, indent=2, allow_nan=False) + "\n")
    return folder / FILE


def read_timings(folder: Path) -> Timings | None:
    """Read the latencies of a run folder; None where none were measured.

    Raises:
        RunFolderError: A file that is damaged or of another schema.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        content = read_json(path)
        found = content["schema_version"]
        if found == SCHEMA:
            rows = tuple(read_row(Timed, row) for row in content["rows"])
            return Timings(setting=read_row(Setting, content["setting"]), rows=rows)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise RunFolderError(f"{path}: is damaged; measure again with clframe latency {folder}, or delete it") from None
    raise RunFolderError(f"{path}: has schema {found}, this version reads {SCHEMA}; measure again or delete it")
