"""Files: atomic writes, bounded reads, and folders whose files are all inside them.

A write leaves either the old or the new content, never half of each. Folders and files that others hand over are read
by these functions: a file of absurd size or nesting, a pipe, or a link out of a run folder is one line.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clframe.errors import ConfigError, RunFolderError

_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
_LONGEST_WRITE = 2**30
"""Bytes of one call: Linux writes at most 2**31 - 4096, and macOS refuses 2**31."""

MOST_TEXT = 2**28
"""Largest size in bytes of a text file that is read; files of runs have kilobytes, of very long ones megabytes."""


def to_path(value: str | os.PathLike[str], *, where: str) -> Path:
    """Return a path that was given in Python.

    Args:
        value: The path.
        where: Start of the error.

    Raises:
        ConfigError: Something else, or a text that no file system takes.

    >>> to_path("runs/mine", where="run").name
    'mine'
    """
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise ConfigError(f"{where}: found {value!r}; give a path")
    if "\0" in os.fspath(value):
        raise ConfigError(f"{where}: found {os.fspath(value)!r}, which no path can be; give another")
    return Path(value)


def require_writable(folder: Path, *, where: str = "--output", advice: str = "choose another folder") -> None:
    """Refuse a folder that cannot be created or written, before any work.

    Args:
        folder: The folder, which need not exist.
        where: Start of the error: the option that names the folder.
        advice: What to do without permission.

    Raises:
        RunFolderError: A file at this path, or no permission.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise RunFolderError(f"{where}: {there} is not a folder; choose another")
    if not os.access(there, os.W_OK):
        raise RunFolderError(f"{where}: {there} cannot be written; {advice}")


def read_text(path: str | Path, *, most: int = MOST_TEXT) -> str:
    """Read a UTF-8 text file of at most ``most`` bytes.

    Raises:
        OSError: It cannot be opened.
        ValueError: It is larger, not UTF-8, or not a regular file, which could block or never end.
    """
    with open(path, "rb", opener=_open_regular) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(most + 1) if size <= most else b""
    if max(size, len(content)) > most:
        raise ValueError(f"has more than {most:,} bytes")
    return content.decode("utf-8")


def read_json(path: str | Path, *, most: int = MOST_TEXT) -> Any:
    """Read a JSON file of at most ``most`` bytes.

    Raises:
        OSError: It cannot be opened.
        ValueError: As :func:`read_text`, or it is not JSON or nested too deeply.
    """
    return parse_json(read_text(path, most=most))


def parse_json(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: It is not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def _open_regular(path: str, flags: int) -> int:
    # Without O_NONBLOCK, opening a named pipe blocks until something writes to it.
    handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        raise ValueError("is not a regular file")
    return handle


def check_contained(folder: Path) -> None:
    """Refuse a run folder with links that lead out of it, or with pipes and devices.

    A folder from another person could otherwise make a report show, or a resumed run overwrite, any file of the user.
    The folder itself may be a link, and links within it are followed. Files of a model in the cache of the Hugging
    Face hub are links to the cache's own blobs, which are accepted.

    Raises:
        RunFolderError: There is such an entry, or a folder that cannot be listed.
    """
    root = folder.resolve()
    homes = [root]
    if root.parent.name == "snapshots":
        homes.append(root.parent.parent / "blobs")
    try:
        for entry in _entries(root):
            if entry.is_symlink():
                try:
                    target = Path(entry.path).resolve()
                except (OSError, RuntimeError):  # a circle, which leads nowhere; RuntimeError before Python 3.13
                    continue
                if not any(target.is_relative_to(home) for home in homes):
                    raise RunFolderError(
                        f"{folder / Path(entry.path).relative_to(root)}: is a link to {target}, outside the run "
                        f"folder; replace it by the file or folder itself"
                    )
            elif not entry.is_dir(follow_symlinks=False) and not entry.is_file(follow_symlinks=False):
                raise RunFolderError(
                    f"{folder / Path(entry.path).relative_to(root)}: is neither a file nor a folder; remove it"
                )
    except OSError as error:
        raise RunFolderError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from None


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Yield everything below a folder; links to folders are not entered."""
    pending = [os.fspath(folder)]
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                yield entry
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)


def write_atomically(
    path: str | Path, data: bytes | bytearray | memoryview | str, *, sync: bool = True
) -> None:  # fmt: skip
    r"""Write ``data`` to a temporary file next to ``path``, sync it, and rename it to ``path``.

    Pipes and devices, such as ``/dev/null`` and ``/dev/stdout``, are written to as they are.

    Args:
        path: File to write.
        data: Its content; text is encoded as UTF-8, bytes of file names that are not as ``\udcff``.
        sync: Whether to wait until the file is on the disk; files that can be made again need not be.

    Raises:
        RunFolderError: The folder cannot be written or the disk is full; ``path`` keeps its content.
    """
    path = Path(path)
    # Names of files need not be UTF-8: such a byte is written as the escape that JSON and printable() use.
    encoded = data.encode(errors="backslashreplace") if isinstance(data, str) else data
    if _is_stream(path):
        _write_stream(path, encoded)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_BINARY", 0), 0o666)
        try:
            _write_all(handle, memoryview(encoded))
            if sync:
                os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(temporary, path)
        if sync:
            _sync_folder(path.parent)
    except OSError as error:
        raise RunFolderError(
            f"{path}: cannot be written ({error.strerror}); check the folder, its permissions and the free space"
        ) from None
    finally:
        # On a read-only file system even this fails, and its error would replace the one above.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _is_stream(path: Path) -> bool:
    """Whether a path is a pipe, a device, or a descriptor of this process, which no file may replace."""
    if str(path) in ("/dev/stdout", "/dev/stderr") or str(path.parent) == "/dev/fd":
        return True
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) or stat.S_ISBLK(mode)


def _write_stream(path: Path, data: bytes | bytearray | memoryview) -> None:
    try:
        with open(path, "wb") as stream:
            stream.write(data)
    except OSError as error:
        raise RunFolderError(f"{path}: cannot be written ({error.strerror}); give another file") from None


def _write_all(handle: int, data: memoryview) -> None:
    """Write all bytes: one call may write fewer than asked for, on a signal or a disk that is nearly full."""
    done = 0
    while done < len(data):
        written = os.write(handle, data[done : done + _LONGEST_WRITE])
        if written == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done += written


def is_temporary(name: str) -> bool:
    """Whether a file's name is that of a temporary file of :func:`write_atomically`."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_temporaries(folder: Path) -> None:
    """Delete the temporary files that killed writes have left in a folder."""
    for path in folder.glob(".*.tmp"):
        if is_temporary(path.name):
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
