"""Published files: used where they are, fetched by torchvision's own code where they are not.

A download goes to a folder of its own inside ``data_dir`` and moves to its place when it is whole: whatever
goes wrong, nothing half-written is left.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError

from clframe.errors import DataError

_SILENCE_SECONDS = 60.0  # torchvision waits forever for a server that says nothing

_DISK_ERRORS = (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT, errno.ENOTDIR)


@dataclass(frozen=True)
class Published:
    """A file as its authors publish it."""

    file: str
    """Its place under ``data_dir``."""
    url: str
    md5: str


def provide(
    title: str,
    data_dir: Path,
    *,
    wanted: Sequence[str],
    published: Sequence[Published],
    fetch: Callable[[str], object],
    download: bool,
) -> None:
    """See to it that every path of ``wanted`` is in ``data_dir``.

    Published files that lie there already are checked and unpacked without a network.

    Args:
        title: The data, as messages call it.
        data_dir: Where it is or goes.
        wanted: Files and folders that make it complete.
        published: What is downloaded.
        fetch: Downloads and unpacks into the folder it is given; finds published files there already.
        download: Whether to use the network.

    Raises:
        DataError: Missing and not to be had, damaged, or no room for it; one line.
    """
    missing = [name for name in wanted if not (data_dir / name).exists()]
    if not missing:
        return
    there = [p for p in published if (data_dir / p.file).is_file()]
    for p in there:
        _check_md5(data_dir / p.file, p.md5)
    absent = [p for p in published if p not in there]
    if absent and not download:
        raise DataError(
            f"{data_dir}: holds no {title} ({missing[0]} is missing) and download is off; set "
            f"benchmark.download=true, or put {absent[0].url} at {data_dir / absent[0].file}"
        )
    with _moved_when_whole(data_dir) as folder:
        for p in there:
            target = folder / p.file
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(data_dir / p.file, target)
            except OSError:  # a file system without hard links
                shutil.copy2(data_dir / p.file, target)
        with _one_line_errors(title, data_dir, missing[0], absent or published), _patience():
            fetch(str(folder))
        for name in missing:
            if not (folder / name).exists():
                raise DataError(f"{title}: what was downloaded has no {name}; see {published[0].url}")


def _check_md5(file: Path, md5: str) -> None:
    from torchvision.datasets.utils import check_md5

    if not check_md5(file, md5):
        raise DataError(
            f"{file}: its md5 is not {md5}, so it is damaged or was not downloaded to the end; delete it and run again"
        )


@contextmanager
def _moved_when_whole(data_dir: Path) -> Iterator[Path]:
    """A new folder in ``data_dir``; its content moves up when the block ends well, and vanishes otherwise."""
    made = [p for p in (data_dir, *data_dir.parents) if not p.exists()]
    done = False
    try:
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=".download-", dir=data_dir))
        except OSError as error:
            raise _unwritable(data_dir, error) from None
        try:
            yield folder
            _move(folder, data_dir)
            done = True
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        if not done:
            with suppress(OSError):
                for place in made:
                    place.rmdir()


def _move(source: Path, target: Path) -> None:
    """Rename what is in ``source`` into ``target``: whole folders where there is none of the name."""
    for entry in sorted(source.iterdir()):
        place = target / entry.name
        if entry.is_dir() and place.is_dir():
            _move(entry, place)
        else:
            os.replace(entry, place)


@contextmanager
def _patience() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_SILENCE_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextmanager
def _one_line_errors(title: str, data_dir: Path, missing: str, sources: Sequence[Published]) -> Iterator[None]:
    urls = sources[0].url + (f" and {len(sources) - 1} more" if len(sources) > 1 else "")
    try:
        yield
    except OSError as error:
        if isinstance(error, HTTPError):
            error.close()
        if error.errno in _DISK_ERRORS:
            raise _unwritable(data_dir, error) from None
        raise _unreachable(title, data_dir, missing, urls, error) from None
    except Exception as error:  # torchvision, urllib and the archive readers share no class of errors
        if "corrupted" in str(error) or not isinstance(error, RuntimeError):
            raise DataError(
                f"{title}: {urls} did not arrive as published ({_reason(error)}); try again later, "
                f"or put the files into {data_dir}"
            ) from None
        raise _unreachable(title, data_dir, missing, urls, error) from None


def _unreachable(title: str, data_dir: Path, missing: str, urls: str, error: Exception) -> DataError:
    return DataError(
        f"{data_dir}: holds no {title} ({missing} is missing) and {urls} cannot be reached "
        f"({_reason(error)}); go online, or put the files there"
    )


def _unwritable(folder: Path, error: OSError) -> DataError:
    return DataError(
        f"{folder}: cannot be written ({error.strerror or error}); see to its rights and free space, "
        f"or set benchmark.data_dir"
    )


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1].strip().removeprefix("<urlopen error ").removesuffix(">")
