"""Files and folders of data sets: checked paths of the user, class folders, and downloads."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError

from clframe.data.sources.image_files import IMAGE_ENDINGS
from clframe.errors import ConfigError, DataError, nearest

_JUNK_FOLDERS = frozenset({"__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information"})
"""Folders that archivers and file systems add, in lower case: never classes."""

_SHOWN_PATH = 120  # characters of a path in a message, so that it stays one readable line


def require_path(path: str, *, option: str, kind: str) -> Path:
    """Check a path given by the user and expand ``~``.

    Raises:
        ConfigError: No path.
        DataError: The path does not exist, or is not a ``kind`` ("file", which is a regular file, or "folder").
    """
    if not path:
        raise ConfigError(f"benchmark.{option}: found nothing; give the path of a {kind}")
    # os.path.expanduser leaves an unknown ~user alone, and os.path.exists is False for names that no file system
    # takes: the methods of Path raise in both cases.
    found = Path(os.path.expanduser(path))
    if not os.path.exists(found):
        raise DataError(f"{shorten_path(found)}: no such {kind}; {suggest_path(found, folders=kind == 'folder')}")
    is_folder = os.path.isdir(found)
    if is_folder != (kind == "folder"):
        raise DataError(f"{found}: is a {'folder' if is_folder else 'file'}; give the path of a {kind}")
    if kind == "file" and not os.path.isfile(found):  # opening a named pipe would block forever
        raise DataError(f"{found}: is not a regular file; give the path of a {kind}")
    return found


def shorten_path(path: str | Path) -> str:
    """A path for a message: the start of one that is longer than file systems accept.

    >>> shorten_path("data/" + 300 * "a")[-23:]
    'aaa... (305 characters)'
    """
    text = str(path)
    return text if len(text) <= 2 * _SHOWN_PATH else f"{text[:_SHOWN_PATH]}... ({len(text)} characters)"


def class_folders(root: Path) -> dict[str, list[str]]:
    """Paths of the images of each class, sorted: the images at any depth in each folder of ``root``.

    Raises:
        DataError: No folders, a folder without images, or one that cannot be read.
    """
    images = {name: images_below(root / name) for name in subfolders(root)}
    if not images:
        raise DataError(f"{root}: holds no folders; put the images of each class into a folder named after it")
    for name, paths in images.items():
        if not paths:
            raise DataError(f"{root / name}: holds no images; add some or remove the folder")
    return images


def subfolders(root: Path) -> list[str]:
    """Names of the folders in ``root``, sorted, without hidden ones and those of archivers and file systems."""
    try:
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if not _is_junk(entry.name) and entry.is_dir())
    except OSError as error:
        raise read_error(root, error) from None


def images_below(folder: Path, *, failed: dict[str, str] | None = None) -> list[str]:
    """Paths of all images below ``folder``, sorted: regular files that are not hidden, by their ending.

    Args:
        folder: The folder.
        failed: Receives the reason for each folder that cannot be listed, and for each image that is not a file, such
            as a broken link. None: the first one that cannot be read is an error, and what is not a file is left out.

    Raises:
        DataError: A folder or file that cannot be read, without ``failed``.
    """
    found: list[str] = []
    pending = [str(folder)]
    while pending:
        current = pending.pop()
        try:
            with os.scandir(current) as entries:
                listed = [entry for entry in entries if not _is_junk(entry.name)]
        except OSError as error:
            _report(current, read_error(Path(current), error), failed)
            continue
        for entry in listed:
            try:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                elif not entry.name.lower().endswith(IMAGE_ENDINGS):
                    continue
                elif entry.is_file():
                    found.append(entry.path)
                elif failed is not None:
                    failed[entry.path] = f"{entry.path}: {_not_a_file(Path(entry.path))}"
            except OSError as error:  # a link that leads to itself, for one
                _report(entry.path, read_error(Path(entry.path), error), failed)
    return sorted(found)


def _report(path: str, error: DataError, failed: dict[str, str] | None) -> None:
    if failed is None:
        raise error from None
    failed[path] = str(error)


def _not_a_file(path: Path) -> str:
    if os.path.islink(path) and not os.path.exists(path):
        return f"no such file; {_broken_link(path)}"
    return "is not a regular file; give an image file"


def _broken_link(link: Path) -> str:
    return f"{link} is a link to {os.readlink(link)}, which does not exist; restore it, or remove the link"


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.lower() in _JUNK_FOLDERS


def read_text(path: Path) -> str:
    """Read a UTF-8 text file, without its byte order mark.

    Raises:
        DataError: The file is missing, unreadable or not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8 text; save the file as UTF-8") from None
    except OSError as error:
        raise read_error(path, error) from None


def read_error(path: Path, error: OSError) -> DataError:
    """Error for a file or folder that cannot be opened."""
    return DataError(f"{path}: cannot be read ({error.strerror or error}); check that it exists and its permissions")


def suggest_path(missing: Path, *, folders: bool = False) -> str:
    """Advice about a path that does not exist: the existing name nearest to its first missing component.

    A link to something that does not exist is named as such.

    Args:
        missing: The path.
        folders: Whether a folder is wanted, so that no file is suggested.
    """
    while not os.path.exists(missing.parent):
        folders = True  # what is missing has to contain something
        missing = missing.parent
    if os.path.islink(missing):
        return _broken_link(missing)
    try:
        names = os.listdir(missing.parent)
        close = nearest(missing.name, [n for n in names if not folders or os.path.isdir(missing.parent / n)])
    except OSError:
        close = None
    kind = "folder" if folders else "entry"
    return f"did you mean {missing.parent / close}?" if close else f"{missing.parent} has no {kind} of that name"


_TIMEOUT_SECONDS = 60.0  # torchvision sets no timeout and would wait forever for a server that does not respond

_DISK_ERRORS = (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT, errno.ENOTDIR)


@dataclass(frozen=True)
class PublishedFile:
    """A file as its authors publish it."""

    file: str
    """Path below ``data_dir``."""
    url: str
    md5: str


def ensure_files(
    title: str,
    data_dir: Path,
    *,
    wanted: Sequence[str],
    published: Sequence[PublishedFile],
    fetch: Callable[[str], object],
    download: bool,
) -> None:
    """Make sure that every path of ``wanted`` exists in ``data_dir``; download what is missing.

    Published files that are already there are verified and unpacked without a network.

    Args:
        title: Name of the data in messages.
        data_dir: Folder of the data.
        wanted: Files and folders of the complete data.
        published: The files to download.
        fetch: Downloads and unpacks into the folder it is given, in which existing published files are linked.
        download: Whether to use the network.

    Raises:
        DataError: Data that is missing and cannot be downloaded, is damaged, or does not fit on the disk.
    """
    missing = [name for name in wanted if not os.path.exists(data_dir / name)]
    if not missing:
        return
    there = [p for p in published if os.path.isfile(data_dir / p.file)]
    for p in there:
        _check_md5(data_dir / p.file, p.md5)
    absent = [p for p in published if p not in there]
    if absent and not download:
        raise DataError(
            f"{data_dir}: holds no {title} ({missing[0]} is missing) and download is off; set "
            f"benchmark.download=true, or put {absent[0].url} at {data_dir / absent[0].file}"
        )
    with _staging_folder(data_dir) as folder:
        for p in there:
            target = folder / p.file
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(data_dir / p.file, target)
            except OSError:  # the file system has no hard links
                shutil.copy2(data_dir / p.file, target)
        errors = _one_line_errors(title, data_dir, missing[0], absent or published)
        with errors, _socket_timeout(), warnings.catch_warnings():
            # torchvision extracts without a filter, which Python 3.12 and 3.13 warn of; the archives' md5 is checked.
            warnings.filterwarnings("ignore", "Python 3.14 will", DeprecationWarning)
            fetch(str(folder))
        for name in missing:
            if not (folder / name).exists():
                raise DataError(f"{title}: found no {name} in the download; see {published[0].url}")


def _check_md5(file: Path, md5: str) -> None:
    from torchvision.datasets.utils import check_md5

    if not check_md5(file, md5):
        raise DataError(
            f"{file}: its md5 is not {md5}, so it is damaged or incomplete; delete it and run again"
        )


@contextmanager
def _staging_folder(data_dir: Path) -> Iterator[Path]:
    """A temporary folder in ``data_dir``, whose content moves to ``data_dir`` if the block succeeds.

    So an interrupted download leaves no incomplete data, and no empty folders either.
    """
    made = [p for p in (data_dir, *data_dir.parents) if not os.path.exists(p)]
    done = False
    try:
        try:
            data_dir.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=".download-", dir=data_dir))
        except OSError as error:
            raise _write_error(data_dir, error) from None
        try:
            yield folder
            _move(folder, data_dir)
            done = True
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        if not done:
            with suppress(OSError):
                for created in made:
                    created.rmdir()


def _move(source: Path, target: Path) -> None:
    """Move the content of ``source`` to ``target``, merging folders that exist in both."""
    for entry in sorted(source.iterdir()):
        destination = target / entry.name
        if entry.is_dir() and destination.is_dir():
            _move(entry, destination)
        else:
            os.replace(entry, destination)


@contextmanager
def _socket_timeout() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextmanager
def _one_line_errors(title: str, data_dir: Path, missing: str, sources: Sequence[PublishedFile]) -> Iterator[None]:
    urls = sources[0].url + (f" and {len(sources) - 1} more" if len(sources) > 1 else "")
    try:
        yield
    except OSError as error:
        if isinstance(error, HTTPError):
            error.close()
        if error.errno in _DISK_ERRORS:
            raise _write_error(data_dir, error) from None
        raise _download_error(title, data_dir, missing, urls, error) from None
    except Exception as error:  # torchvision, urllib and the archive readers share no base class of errors
        if "corrupted" in str(error) or not isinstance(error, RuntimeError):
            raise DataError(
                f"{title}: the download of {urls} is not the published file ({_error_text(error)}); try again later, "
                f"or put the files into {data_dir}"
            ) from None
        raise _download_error(title, data_dir, missing, urls, error) from None


def _download_error(title: str, data_dir: Path, missing: str, urls: str, error: Exception) -> DataError:
    return DataError(
        f"{data_dir}: holds no {title} ({missing} is missing) and {urls} cannot be reached "
        f"({_error_text(error)}); go online, or put the files there"
    )


def _write_error(folder: Path, error: OSError) -> DataError:
    return DataError(
        f"{folder}: cannot be written ({error.strerror or error}); check its permissions and free space, "
        f"or set benchmark.data_dir"
    )


def _error_text(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1].strip().removeprefix("<urlopen error ").removesuffix(">")
