"""latency.json in a run folder: how long predictions took, and on what they were timed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from clframe.accounting.entries import read_row
from clframe.errors import RunFolderError
from clframe.files import write_atomically

FILE = "latency.json"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Timed:
    """One way to predict with one size of batch."""

    way: str
    """``whole network``, every exit computed; ``exit/<name>``, all samples stop there and no exit before it is
    computed; ``policy``, the run's own."""
    batch: int
    p50: float
    """Seconds of a call."""
    p95: float
    throughput: float
    """Samples a second."""
    macs: float
    """Of one sample, counted while batches of this size ran: mean over the same samples."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """On what they were timed."""

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
    """What was measured."""

    setting: Setting
    rows: tuple[Timed, ...]

    @property
    def batches(self) -> Sequence[int]:
        """Sizes, each once, in order."""
        return tuple(dict.fromkeys(row.batch for row in self.rows))


def write_timings(timings: Timings, folder: Path) -> Path:
    """Write it into a run folder, all or nothing; returns the file."""
    content = {"schema_version": SCHEMA, **asdict(timings)}
    write_atomically(folder / FILE, json.dumps(content, indent=2, allow_nan=False) + "\n")
    return folder / FILE


def read_timings(folder: Path) -> Timings | None:
    """What a run folder has; None where nothing was timed.

    Raises:
        RunFolderError: A file that is damaged or of another schema.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = content["schema_version"]
        if found == SCHEMA:
            rows = tuple(read_row(Timed, row) for row in content["rows"])
            return Timings(setting=read_row(Setting, content["setting"]), rows=rows)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        raise RunFolderError(f"{path}: is damaged; measure anew with clframe latency {folder}, or delete it") from None
    raise RunFolderError(f"{path}: has schema {found}, this version reads {SCHEMA}; measure anew or delete it")
