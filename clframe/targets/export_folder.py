"""New folders that are written completely or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clframe.errors import RunFolderError


def require_new(folder: Path, *, where: str) -> None:
    """Refuse a folder that has content, and a file of that name.

    Raises:
        RunFolderError: There is something to lose.
    """
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise RunFolderError(f"{where}: {folder} exists; give another --output, or delete it")


@contextmanager
def new_folder(folder: Path, *, where: str) -> Iterator[Path]:
    """Context that yields a temporary folder next to ``folder`` and renames it to ``folder`` at its end.

    An error inside leaves nothing behind, not even folders created above it.

    Args:
        folder: The folder to create; an empty one may exist.
        where: Prefix of messages.

    Raises:
        RunFolderError: The folder has content or cannot be written.
    """
    require_new(folder, where=where)
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    created = [parent for parent in folder.parents if not parent.exists()]
    try:
        fresh.mkdir(parents=True)
        yield fresh
        if folder.is_dir():
            folder.rmdir()
        fresh.rename(folder)
    except BaseException as error:
        shutil.rmtree(fresh, ignore_errors=True)
        for parent in created:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        if isinstance(error, OSError):
            reason = error.strerror or type(error).__name__
            raise RunFolderError(f"{where}: {folder} cannot be written ({reason}); give another --output") from None
        raise
