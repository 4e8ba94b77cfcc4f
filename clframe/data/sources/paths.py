"""Folders and files that a user names: found, or answered with the nearest that is there."""

from __future__ import annotations

import os
from pathlib import Path

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
