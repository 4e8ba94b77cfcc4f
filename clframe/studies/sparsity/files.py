"""Writing a study of sparsity: everything is made first, then written, the JSON last."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from clframe.errors import RunFolderError
from clframe.files import write_atomically
from clframe.reporting.folder import versions
from clframe.reporting.report.drawing import drawn
from clframe.reporting.report.table import to_csv, to_markdown
from clframe.studies.sparsity.figures import pictures
from clframe.studies.sparsity.study import SparsityStudy
from clframe.studies.sparsity.tables import tables, to_json


def default_folder(target: str) -> Path:
    """``RUN/sparsity`` of a run; ``sparsity/NAME`` below the working folder for other models.

    >>> str(default_folder("google/gemma-3-1b-pt"))
    'sparsity/google-gemma-3-1b-pt'
    """
    folder = Path(target).expanduser()
    if (folder / "config.yaml").is_file():
        return folder / "sparsity"
    name = folder.resolve().name if folder.is_dir() else target
    return Path("sparsity") / (re.sub(r"[^\w.-]+", "-", name).strip("-.") or "model")


def require_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made, before anything is measured.

    Raises:
        RunFolderError: A file is in its way, or its rights forbid it.
    """
    there = next(part for part in (folder, *folder.absolute().parents) if part.exists())
    if not there.is_dir():
        raise RunFolderError(f"--output: {there} is no folder; choose another")
    if not os.access(there, os.W_OK):
        raise RunFolderError(f"--output: {there} cannot be written; choose another folder")


def write_study(study: SparsityStudy, folder: Path, *, command: Sequence[str]) -> Path:
    """Write ``sparsity.json``, tables (CSV, Markdown) and figures (SVG, PNG); returns the path of the JSON.

    Raises:
        RunFolderError: The folder cannot be written.
    """
    files: dict[str, str | bytes] = {}
    for table in tables(study):
        files |= {f"{table.name}.csv": to_csv(table), f"{table.name}.md": to_markdown(table)}
    for picture in map(drawn, pictures(study)):
        files |= {f"{picture.name}.svg": picture.svg, f"{picture.name}.png": picture.png}
    files["sparsity.json"] = to_json(study, command=command, versions=versions())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"--output: {folder} cannot be made ({error.strerror}); choose another") from None
    for name, content in files.items():
        write_atomically(folder / name, content)
    return folder / "sparsity.json"
