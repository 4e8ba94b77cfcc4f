"""Locks of cells: two sweeps on one folder, on one machine or on several, never train the same cell.

The process that trains a cell holds ``.sweep/locks/<cell>.lock`` and renews its time every 15 seconds. A lock is stale,
and another process takes it over,

- if it was taken on the same machine by a process that has ended, or
- if it has not been renewed for 120 seconds, by the clock of the file system (machines may disagree about the time).

A process whose lock has been taken over, since it was suspended, say, ends immediately without writing anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from clframe.errors import RunFolderError
from clframe.files import read_json
from clframe.run_folder import SWEEP_RECORDS, is_alive

RENEWED: Final = 15.0
"""Seconds between two renewals."""
STALE: Final = 120.0
"""Seconds without renewal after which a lock is stale."""


class Holder(NamedTuple):
    """The process that holds a lock."""

    host: str
    pid: int
    token: str
    """Differs between any two times that a lock was taken."""


def lock_path(sweep: Path, key: str) -> Path:
    """Return the file of a cell's lock."""
    return sweep / SWEEP_RECORDS / "locks" / f"{key}.lock"


def holder(sweep: Path, key: str) -> Holder | None:
    """Return the process that trains a cell, or None if none does."""
    path = lock_path(sweep, key)
    found = _read(path)
    return found if found is not None and not _is_stale(path, found) else None


@contextlib.contextmanager
def claim(sweep: Path, key: str, *, on_lost: Callable[[], None] | None = None) -> Iterator[bool]:
    """Hold the lock of a cell in a ``with`` block; yields False if another process has it.

    Args:
        sweep: Folder of the sweep.
        key: Of the cell.
        on_lost: Called in another thread when the lock has been taken over; None ends the process.

    Raises:
        RunFolderError: The folder cannot be written.
    """
    path = lock_path(sweep, key)
    mine = Holder(socket.gethostname(), os.getpid(), uuid.uuid4().hex)
    if not _take(path, mine):
        yield False
        return
    done = threading.Event()
    keeper = threading.Thread(target=_renew, args=(path, mine, done, on_lost or _end), daemon=True)
    keeper.start()
    try:
        yield True
    finally:
        done.set()
        keeper.join()
        if _read(path) == mine:
            path.unlink(missing_ok=True)


def _take(path: Path, mine: Holder) -> bool:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = _read(path)
        if found is not None or path.exists():
            if not _is_stale(path, found):
                return False
            _remove(path, found)
        # Written before it gets its name, so that no process reads half of it; a link to a name in use fails.
        new = path.with_name(f".{mine.token}.new")
        new.write_text(json.dumps(mine._asdict()), encoding="utf-8")
        try:
            os.link(new, path)
        except FileExistsError:
            return False
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise RunFolderError(f"{path.parent}: cannot be written ({error.strerror}); give another --folder") from None
    return True


def _remove(path: Path, stale: Holder | None) -> None:
    """Remove a stale lock; one that another process has taken in the meantime is restored."""
    aside = path.with_name(f".{uuid.uuid4().hex}.stale")
    try:
        os.rename(path, aside)
    except FileNotFoundError:  # another process was faster
        return
    if _read(aside) != stale:
        with contextlib.suppress(FileExistsError):  # its holder then finds another token, and ends
            os.link(aside, path)
    aside.unlink(missing_ok=True)


def _renew(path: Path, mine: Holder, done: threading.Event, on_lost: Callable[[], None]) -> None:
    missing = 0
    while not done.wait(RENEWED if not missing else 1.0):
        found = _read(path)
        missing = missing + 1 if found is None else 0  # it is missing for a moment in _remove
        if missing > 2 or (found is not None and found != mine):
            on_lost()
            return
        if found is not None:
            with contextlib.suppress(OSError):
                os.utime(path)


def _end() -> None:
    os.write(2, b"clframe: the lock of this cell was taken over by another process; ending\n")
    os._exit(1)


def _read(path: Path) -> Holder | None:
    """Read a lock; None if there is none or it is damaged."""
    try:
        found = read_json(path)
        return Holder(str(found["host"]), int(found["pid"]), str(found["token"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_stale(path: Path, found: Holder | None) -> bool:
    if found is not None and found.host == socket.gethostname() and (not is_alive(found.pid) or _is_zombie(found.pid)):
        return True
    try:
        return _now(path.parent) - path.stat().st_mtime > STALE
    except OSError:
        return False


def _now(folder: Path) -> float:
    """Return the time of the file system, which may be that of another machine."""
    probe = folder / f".{os.getpid()}-{threading.get_ident()}.now"
    try:
        probe.touch()
        os.utime(probe)
        return probe.stat().st_mtime
    except OSError:  # a folder that cannot be written, whose states are only shown
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _is_zombie(pid: int) -> bool:
    """Whether a process has ended and only its entry is left (Linux): its parent has not waited for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return False
