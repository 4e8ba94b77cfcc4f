"""Output folders of conversions and sparsity studies; a conversion is written completely or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from clframe.data.target import Target
from clframe.environment import versions
from clframe.errors import RunFolderError, UnsupportedError, reason_of
from clframe.files import write_atomically
from clframe.moe import routed_layers
from clframe.moe.conversion.options import Options
from clframe.moe.conversion.output import curve_csv, markdown, pictures
from clframe.moe.conversion.study import Study, record
from clframe.moe.pipeline import Recipe
from clframe.plotting.style import render_picture
from clframe.sparsity import output as sparsity_output
from clframe.sparsity import plots as sparsity_plots
from clframe.sparsity.study import SparsityStudy
from clframe.tables import to_csv, to_markdown
from clframe.targets.language import write_architecture
from clframe.training.archives import load_archive
from clframe.training.checkpoint import save_checkpoint
from clframe.training.trained import CONVERTED, load_newest, read_recipe

WEIGHTS = "weights.pt"


def folder_for(target: Target, options: Options, *, output: str | Path | None) -> Path:
    """Output folder of a conversion: ``output``, or a folder in ``moefy`` named by method and options.

    ``moefy`` is in the folder of a run. For other models it is in the working directory, and the name identifies the
    model with its revision and the data as well.

    Raises:
        RunFolderError: A folder with other content.
    """
    if output is not None:
        folder = Path(output).expanduser()
    elif target.run is not None:
        folder = Path(target.name).expanduser() / "moefy" / f"{options.method}-{_digest(options)}"
    else:
        # Names alone are ambiguous: paths can end alike, and one model can be converted on several data sets.
        folder = Path("moefy") / _readable_name(target) / f"{options.method}-{_digest(options, target.origin)}"
    if folder.exists() and not (folder / CONVERTED).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunFolderError(f"--output: {folder} contains other files than those of a conversion; give another folder")
    return folder


def _digest(*identity: object) -> str:
    return hashlib.sha256("\n".join(map(repr, identity)).encode()).hexdigest()[:8]


def _readable_name(target: Target) -> str:
    """``MODEL-DATA`` of a target that is not a run, without the folders of a path."""
    name = target.folder.resolve().name if target.folder.is_dir() else target.name
    data = target.origin.get("data", {}).get("name", "")
    return re.sub(r"[^\w.-]+", "-", f"{name}-{data}").strip("-.") or "model"


def write_conversion(study: Study, folder: Path) -> Path:
    """Write ``moefy.json``, the model, ``curve.csv``, ``moefy.md`` and figures; replaces an earlier conversion.

    Raises:
        RunFolderError: The folder cannot be written; existing content is unchanged.
    """
    # Written next to the target and renamed, so that a crash leaves either the old or the new conversion.
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    new_parents = [parent for parent in folder.parents if not parent.exists()]
    try:
        (fresh / "figures").mkdir(parents=True)
        tree = record(study)
        _write_model(study, fresh)
        write_atomically(fresh / "curve.csv", curve_csv(tree))
        write_atomically(fresh / "moefy.md", markdown(tree))
        for picture in pictures(tree):
            files = render_picture(picture)
            write_atomically(fresh / "figures" / f"{picture.name}.png", files.png)
            write_atomically(fresh / "figures" / f"{picture.name}.svg", files.svg)
        write_atomically(fresh / CONVERTED, json.dumps(tree, indent=1) + "\n")
        _swap_folder(fresh, folder)
    except BaseException as error:
        shutil.rmtree(fresh, ignore_errors=True)
        for parent in new_parents:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        if isinstance(error, OSError):
            raise RunFolderError(f"{folder}: cannot be written ({error.strerror}); check its permissions") from None
        raise
    return folder


def restore_model(folder: str | Path, model: nn.Module) -> nn.Module:
    """Load the converted weights of a model that is not a run.

    Args:
        folder: Folder of the conversion; those of runs are read with ``clframe.load``.
        model: The dense model, freshly loaded with :func:`~clframe.targets.opening.open_target`; changed in place.

    Raises:
        RunFolderError: No such conversion, or weights that do not match.
        UnsupportedError: A converted model.
    """
    path = Path(folder).expanduser()
    recipe: Recipe = read_recipe(path)
    if not (path / WEIGHTS).is_file():
        raise RunFolderError(f"{path}: contains the conversion of a run; read it with clframe.load")
    if routed_layers(model):
        raise UnsupportedError(f"moefy: found {type(model).__name__} with experts; give the dense model")
    recipe.shape(model)
    try:
        state = load_archive(path / WEIGHTS, device=torch.device("cpu"))
        model.load_state_dict(state)
    except Exception as error:  # a damaged archive or pickle may raise anything
        reason = reason_of(error, most=160)
        raise RunFolderError(f"{path / WEIGHTS}: does not fit the model ({reason})") from None
    return model.eval().requires_grad_(False)


def _write_model(study: Study, folder: Path) -> None:
    """Write a checkpoint with the converted network of a run, or the weights of another model."""
    target = study.converted.target
    state = {name: value.detach().cpu() for name, value in target.model.state_dict().items()}
    if target.run is None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomically(folder / WEIGHTS, buffer.getvalue())
        if target.kind == "causal":
            write_architecture(target, folder)
        return
    run = Path(target.name).expanduser()
    content = load_newest(run, device=torch.device("cpu"))
    (folder / "checkpoints").mkdir()
    save_checkpoint(folder / "checkpoints", {**content, "network": state}, finished=int(content["finished"]))
    write_atomically(folder / "config.yaml", (run / "config.yaml").read_text(encoding="utf-8"))


def _swap_folder(fresh: Path, folder: Path) -> None:
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


def analysis_root(name: str) -> Path:
    """``RUN/sparsity`` for a run; ``sparsity`` in the working directory for other models."""
    folder = Path(name).expanduser()
    return folder / "sparsity" if (folder / "config.yaml").is_file() else Path("sparsity")


def default_folder(target: Target) -> Path:
    """Default output folder of an analysis: ``RUN/sparsity``, or ``sparsity/MODEL-DATA-ID`` for other models."""
    root = analysis_root(target.name)
    return root if target.run is not None else root / f"{_readable_name(target)}-{_digest(target.origin)}"


def write_sparsity_study(study: SparsityStudy, folder: Path, *, command: Sequence[str]) -> Path:
    """Write ``sparsity.json``, tables (CSV, Markdown) and figures (SVG, PNG); returns the path of the JSON file.

    Raises:
        RunFolderError: The folder cannot be written.
    """
    files: dict[str, str | bytes] = {}
    for table in sparsity_output.tables(study):
        files |= {f"{table.name}.csv": to_csv(table), f"{table.name}.md": to_markdown(table)}
    for picture in map(render_picture, sparsity_plots.pictures(study)):
        files |= {f"{picture.name}.svg": picture.svg, f"{picture.name}.png": picture.png}
    files["sparsity.json"] = sparsity_output.to_json(study, command=command, versions=versions())
    write_files(folder, files)
    return folder / "sparsity.json"


def write_files(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """Write files by name to a folder, in their order, and create the folder if needed.

    Raises:
        RunFolderError: The folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"--output: {folder} cannot be created ({error.strerror}); choose another") from None
    for name, content in files.items():
        write_atomically(folder / name, content)
