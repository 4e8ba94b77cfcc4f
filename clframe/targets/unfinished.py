"""Run folders that a command finds when it is given again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from clframe.config.named import named_plugins
from clframe.config.schema import Config
from clframe.config.typed import as_tree, same_config, to_yaml
from clframe.errors import ClframeError, RunFolderError
from clframe.report.loading import flatten
from clframe.run_folder import RunFolder, started_at
from clframe.targets.loading import read_config
from clframe.targets.portable import is_portable
from clframe.training.checkpoint import checkpoint_files

MOST_COMPARED = 20
"""Unfinished runs whose configs are read, newest first: a folder may hold thousands."""


def claim_folder(path: Path, config: Config) -> tuple[RunFolder, bool]:
    """Return the folder of a run at ``path``, and whether it has been started before.

    Args:
        path: A folder that does not exist or is empty, or one of a run.
        config: The config of the run, resolved.

    Raises:
        RunFolderError: It cannot be created, has other files, or a run of another config.
    """
    if RunFolder.is_unused(path):
        return RunFolder.create_at(path), False
    if path.is_dir() and not (path / "config.yaml").exists():
        raise RunFolderError(f"folder: {path} has other files than those of a run; give another folder")
    folder = RunFolder.open(path, where="folder")
    if is_portable(path):
        raise RunFolderError(f"folder: {path} is a copy of a model without the state of its run; give another folder")
    found = read_config(folder)
    if not _is_same(found, config):
        raise RunFolderError(
            f"folder: {path} has a run of another config ({_difference(found, config)}); give another folder"
        )
    if (path / "results.json").is_file() and not checkpoint_files(path / "checkpoints"):
        raise RunFolderError(f"folder: {path} has a finished run without checkpoints; give another folder")
    return folder, True


def find_unfinished(config: Config) -> Path | None:
    """Return the newest run of exactly this config that is neither finished nor in progress, or None.

    Only runs that can be resumed are found, in the folder where a new run of this config is created.
    """
    if named_plugins(config.components):
        return None
    for path in _unfinished(Path(config.output) / config.name):
        folder = RunFolder(path)
        try:
            if _is_same(read_config(folder), config) and not folder.is_locked():
                return path
        except (ClframeError, OSError):  # a run that cannot be read is not the one that is looked for
            continue
    return None


def _unfinished(parent: Path) -> Iterator[Path]:
    """Yield run folders with checkpoints and without results, newest first."""
    try:
        found = [path for path in parent.iterdir() if not path.is_symlink()]
        folders = sorted(found, key=lambda path: (started_at(path), path.name), reverse=True)
    except OSError:
        return
    count = 0
    for path in folders:
        if (path / "results.json").exists() or not any((path / "checkpoints").glob("*.ckpt")):
            continue
        yield path
        count += 1
        if count == MOST_COMPARED:
            return


def _is_same(found: Config, config: Config) -> bool:
    """Whether two configs are equal, wherever their run folders are."""
    return same_config(to_yaml(replace(found, output=config.output)), to_yaml(config))


def _difference(found: Config, config: Config) -> str:
    """The first key that differs, with both values."""
    one, two = (flatten(as_tree(each)) for each in (replace(found, output=config.output), config))
    for key in sorted({*one, *two}):
        there, here = one.get(key), two.get(key)
        if there != here:
            return f"{key}: {_shorten(there)} there, {_shorten(here)} here"
    return "options of its strategy"


def _shorten(value: str | None) -> str:
    if value is None:
        return "not set"
    return value if len(value) <= 60 else f"{value[:57]}..."
