"""Atomic writes: a file has either its old or its new content, never half of each."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from pathlib import Path

from clframe.errors import RunFolderError

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
_LONGEST_WRITE = 2**30
"""Bytes of one call: Linux writes at most 2**31 - 4096, and macOS refuses 2**31."""


def write_atomically(path: str | Path, data: bytes | bytearray | memoryview | str) -> None:
    """Write ``data`` to a temporary file next to ``path``, sync it, and rename it to ``path``.

    Raises:
        RunFolderError: The folder cannot be written or the disk is full; ``path`` keeps its content.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
        try:
            _write_all(handle, memoryview(data.encode() if isinstance(data, str) else data))
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise RunFolderError(
            f"{path}: cannot be written ({error.strerror}); check the folder, its permissions and the free space"
        ) from None
    finally:
        # On a read-only file system even this fails, and its error would replace the one above.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _write_all(handle: int, data: memoryview) -> None:
    """Write all bytes: one call may write fewer than asked for, on a signal or a disk that is nearly full."""
    done = 0
    while done < len(data):
        written = os.write(handle, data[done : done + _LONGEST_WRITE])
        if written == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done += written


def remove_temporaries(folder: Path) -> None:
    """Delete the temporary files that killed writes have left in a folder."""
    for path in folder.glob(".*.tmp"):
        if _TEMPORARY.fullmatch(path.name):
            with contextlib.suppress(OSError):
                path.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; file systems that cannot sync a folder lose no data by it."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
