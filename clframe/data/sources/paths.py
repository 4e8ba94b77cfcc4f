"""Folders and files of data sets: found where the user says, or downloaded."""

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

from clframe.data.sources.image_files import IMAGE_ENDINGS
from clframe.errors import ConfigError, DataError, nearest


def given_path(path: str, *, option: str, kind: str) -> Path:
    """The path as the user meant it, ``~`` expanded.

    Raises:
        ConfigError: None was given.
        DataError: Nothing is there, or not a ``kind`` ("file" or "folder").
    """
    if not path:
        raise ConfigError(f"benchmark.{option}: found nothing; give the path of a {kind}")
    found = Path(path).expanduser()
    if not found.exists():
        raise DataError(f"{found}: no such {kind}; {_advice(found)}")
    if found.is_dir() != (kind == "folder"):
        raise DataError(f"{found}: is a {'folder' if found.is_dir() else 'file'}; give the path of a {kind}")
    return found


def class_folders(root: Path) -> dict[str, list[str]]:
    """Paths of the images in each class's folder, at any depth, sorted; other files are passed over.

    Raises:
        DataError: No folders, a folder without images, or one that cannot be read.
    """
    images = {name: images_below(root / name) for name in subfolders(root)}
    if not images:
        raise DataError(f"{root}: holds no folders; put the images of each class into a folder of its own")
    for name, paths in images.items():
        if not paths:
            raise DataError(f"{root / name}: holds no images; add some or remove the folder")
    return images


def subfolders(root: Path) -> list[str]:
    """Names of the folders in ``root``, hidden ones left out, sorted."""
    try:
        return sorted(e.name for e in os.scandir(root) if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise unreadable(root, error) from None


def images_below(folder: Path) -> list[str]:
    """Paths of all images below ``folder``, sorted; hidden files are left out."""

    def stop(error: OSError) -> None:
        raise unreadable(Path(error.filename or folder), error)

    found: list[str] = []
    for place, _, names in os.walk(folder, onerror=stop):
        found += [
            os.path.join(place, name)
            for name in names
            if name.lower().endswith(IMAGE_ENDINGS) and not name.startswith(".")
        ]
    return sorted(found)


def text_of(path: Path) -> str:
    """A text file's content, without a byte order mark.

    Raises:
        DataError: The file is missing, unreadable or no UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is no UTF-8 text; save the file as UTF-8") from None
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> DataError:
    """The error for a file or folder that the system would not open."""
    return DataError(f"{path}: cannot be read ({error.strerror or error}); check that it is there and its rights")


def _advice(missing: Path) -> str:
    """The nearest sibling of the first part of a path that is not there."""
    while not missing.parent.exists():
        missing = missing.parent
    try:
        close = nearest(missing.name, os.listdir(missing.parent))
    except OSError:
        close = None
    return f"did you mean {missing.parent / close}?" if close else f"{missing.parent} holds nothing of that name"


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
