"""Folders of studies: conversions to experts and studies of sparsity, written whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from clframe.data.target import Target
from clframe.environment import versions
from clframe.errors import RunFolderError, UnsupportedError
from clframe.files import write_atomically
from clframe.moe import routed_layers
from clframe.moe.conversion.output import curve_csv, markdown, pictures
from clframe.moe.conversion.study import Study, record
from clframe.moe.pipeline import Recipe
from clframe.plotting.style import drawn
from clframe.sparsity import output as sparsity_output
from clframe.sparsity.study import SparsityStudy
from clframe.tables import to_csv, to_markdown
from clframe.training.checkpoint import save_checkpoint
from clframe.training.trained import CONVERTED, newest, recipe_of

WEIGHTS = "weights.pt"


def folder_for(target: Target, options: object, *, output: str | Path | None) -> Path:
    """Where a conversion goes: ``output``, or a folder named by method and options in the run's folder ``moefy``.

    Raises:
        RunFolderError: A folder that holds something else.
    """
    if output is not None:
        folder = Path(output).expanduser()
    else:
        digest = hashlib.sha256(repr(options).encode()).hexdigest()[:8]
        name = f"{getattr(options, 'method', 'moefy')}-{digest}"
        if target.run is not None:
            folder = Path(target.name).expanduser() / "moefy" / name
        else:
            folder = Path("moefy") / target.name.rstrip("/").rpartition("/")[2] / name
    if folder.exists() and not (folder / CONVERTED).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunFolderError(f"--output: {folder} holds something else than a conversion; give a folder of its own")
    return folder


def write_conversion(study: Study, folder: Path) -> Path:
    """Write ``moefy.json``, the model, ``curve.csv``, ``moefy.md`` and figures; an earlier conversion is replaced.

    Raises:
        RunFolderError: The folder cannot be written; what stood there is untouched.
    """
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        (fresh / "figures").mkdir(parents=True)
        tree = record(study)
        _write_model(study, fresh)
        write_atomically(fresh / "curve.csv", curve_csv(tree))
        write_atomically(fresh / "moefy.md", markdown(tree))
        for picture in pictures(tree):
            files = drawn(picture)
            write_atomically(fresh / "figures" / f"{picture.name}.png", files.png)
            write_atomically(fresh / "figures" / f"{picture.name}.svg", files.svg)
        write_atomically(fresh / CONVERTED, json.dumps(tree, indent=1) + "\n")
        _replace(fresh, folder)
    except BaseException as error:
        shutil.rmtree(fresh, ignore_errors=True)
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        if isinstance(error, OSError):
            raise RunFolderError(f"{folder}: cannot be written ({error.strerror}); check its rights") from None
        raise
    return folder


def restore_model(folder: str | Path, model: nn.Module) -> nn.Module:
    """A hub's model as it was converted: the dense one, freshly loaded, takes shapes and weights of ``folder``.

    Args:
        folder: Of a conversion of a model that is no run; ``clframe.load`` reads those of runs.
        model: As :func:`~clframe.targets.opening.open_target` gives it; changed in place.

    Raises:
        RunFolderError: No such conversion, or weights that do not fit.
        UnsupportedError: A model that was converted already.
    """
    path = Path(folder).expanduser()
    recipe: Recipe = recipe_of(path)
    if not (path / WEIGHTS).is_file():
        raise RunFolderError(f"{path}: holds the conversion of a run; read it with clframe.load")
    if routed_layers(model):
        raise UnsupportedError(f"moefy: found {type(model).__name__} converted already; give the dense model")
    recipe.shape(model)
    try:
        state = torch.load(path / WEIGHTS, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:160]
        raise RunFolderError(f"{path / WEIGHTS}: does not fit the model ({reason})") from None
    return model.eval().requires_grad_(False)


def _write_model(study: Study, folder: Path) -> None:
    """A checkpoint like that of the run, with other weights and shapes; for other models, the weights."""
    target = study.converted.target
    state = {name: value.detach().cpu() for name, value in target.model.state_dict().items()}
    if target.run is None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(folder / WEIGHTS, buffer.getvalue())
        return
    run = Path(target.name).expanduser()
    content = newest(run, device=torch.device("cpu"))
    (folder / "checkpoints").mkdir()
    save_checkpoint(folder / "checkpoints", {**content, "network": state}, finished=int(content["finished"]))
    write_atomically(folder / "config.yaml", (run / "config.yaml").read_text(encoding="utf-8"))


def _replace(fresh: Path, folder: Path) -> None:
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    try:
        fresh.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


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


def write_sparsity_study(study: SparsityStudy, folder: Path, *, command: Sequence[str]) -> Path:
    """Write ``sparsity.json``, tables (CSV, Markdown) and figures (SVG, PNG); returns the path of the JSON.

    Raises:
        RunFolderError: The folder cannot be written.
    """
    files: dict[str, str | bytes] = {}
    for table in sparsity_output.tables(study):
        files |= {f"{table.name}.csv": to_csv(table), f"{table.name}.md": to_markdown(table)}
    for picture in map(drawn, sparsity_output.pictures(study)):
        files |= {f"{picture.name}.svg": picture.svg, f"{picture.name}.png": picture.png}
    files["sparsity.json"] = sparsity_output.to_json(study, command=command, versions=versions())
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"--output: {folder} cannot be made ({error.strerror}); choose another") from None
    for name, content in files.items():
        write_atomically(folder / name, content)
    return folder / "sparsity.json"
