"""Checkpoint files: plain tensors and values, read without running any code.

``experience_NNN.ckpt`` is written after NNN experiences. It holds what cannot be derived: weights, component states,
counts. Order and randomness are functions of (seed, experience, epoch), and every experience has a fresh optimizer, so
neither is saved.

``inside_NNN_step_SSSSSS.ckpt`` is written inside experience NNN, counted from 1, after S of its steps. It needs the
checkpoint of the experience before; :mod:`clframe.training.inside` lists what it holds. Both are written to a temporary
name, synced and renamed; the CRC of every part is checked on reading.
"""

from __future__ import annotations

import io
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clframe.errors import RunFolderError
from clframe.files import write_atomically
from clframe.nn.frozen import restore
from clframe.nn.network import Network
from clframe.training.archives import load_archive

FORMAT = 3
READABLE = (2, 3)
"""Formats that this version reads. Format 3 added checkpoints inside an experience."""
_NETWORK, _PARAMETER = "__network__", "__parameter__"
_SEQUENCES = (list, tuple, torch.Size)
"""Sequences that reading restores without code: a named tuple needs its class."""
_NAME = re.compile(r"experience_(\d+)\.ckpt")
_INSIDE = re.compile(r"inside_(\d+)_step_(\d+)\.ckpt")
_log = logging.getLogger(__name__)


def save_checkpoint(folder: Path, content: Mapping[str, Any], *, finished: int, keep: int = 2) -> Path:
    """Write ``experience_NNN.ckpt`` after ``finished`` experiences and delete all but the last ``keep``."""
    path = folder / f"experience_{finished:03d}.ckpt"
    _write(path, {"format": FORMAT, "finished": finished, **encode(dict(content))})
    for old in checkpoint_files(folder)[:-keep]:
        old.unlink()
    return path


def save_inside(folder: Path, content: Mapping[str, Any], *, finished: int, step: int, keep: int = 2) -> Path:
    """Write a checkpoint inside the experience after ``finished`` ones and delete all but the last ``keep``.

    Args:
        folder: The folder of checkpoints.
        content: What :func:`encode` has returned.
        finished: Number of finished experiences.
        step: Steps of the experience so far.
        keep: Checkpoints of this experience to keep.
    """
    path = folder / f"inside_{finished + 1:03d}_step_{step:06d}.ckpt"
    _write(path, {"format": FORMAT, "finished": finished, **content})
    for old in inside_files(folder, finished=finished)[:-keep]:
        old.unlink()
    return path


def remove_inside(folder: Path, *, finished: int) -> None:
    """Delete the checkpoints inside experiences that are finished."""
    for path in folder.glob("*.ckpt"):
        found = _INSIDE.fullmatch(path.name)
        if found and int(found[1]) <= finished:
            path.unlink()


def inside_files(folder: Path, *, finished: int) -> list[Path]:
    """Return the checkpoints inside the experience after ``finished`` ones, oldest first."""
    named = [(found, path) for path in folder.glob("*.ckpt") if (found := _INSIDE.fullmatch(path.name))]
    own = [(int(found[2]), path) for found, path in named if int(found[1]) == finished + 1]
    return [path for _, path in sorted(own)]


def _write(path: Path, content: Mapping[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getbuffer())


def checkpoint_files(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder, oldest first: by number, since ``experience_1000`` sorts before ``998``."""
    numbered = [(int(found[1]), path) for path in folder.glob("*.ckpt") if (found := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(numbered)]


def load_latest(folder: Path, *, device: torch.device) -> dict[str, Any] | None:
    """Return the newest intact checkpoint of a folder, or None if there is none yet.

    Damaged ones are named in a warning and skipped. Tensors saved on an accelerator are moved to ``device``; those
    saved on the CPU stay there. ``file_bytes`` is the size of the file.

    Raises:
        RunFolderError: All are damaged, or the newest intact one has a format that this version cannot read.
    """
    found, damaged = _newest_intact(checkpoint_files(folder), device)
    if found is None:
        if not damaged:
            return None
        # One inside an experience needs that of the experience before, so that none of them can be used either.
        inside = sorted(path for path in folder.glob("*.ckpt") if _INSIDE.fullmatch(path.name))
        damaged += [path for path in inside if _read(path, device) is None]
        verb, which = ("is", "it") if len(damaged) == 1 else ("are", "one of an experience")
        raise RunFolderError(
            f"{folder / ', '.join(path.name for path in damaged)}: {verb} damaged or no checkpoint of clframe, and no "
            f"intact one is left; restore {which} from a copy, or start a new run"
        )
    path, content = found
    if content.get("finished") != int(path.stem.removeprefix("experience_")):
        raise RunFolderError(
            f"{path}: finished={content.get('finished')!r} contradicts the file's name; rename it, or restore the file"
        )
    return {**content, "file_bytes": path.stat().st_size}


def load_inside(folder: Path, *, finished: int, device: torch.device) -> dict[str, Any] | None:
    """Return the newest intact checkpoint inside the experience after ``finished`` ones, or None.

    Damaged ones are named in a warning and skipped: the one before, or the start of the experience, is used. ``file``
    is the path.

    Raises:
        RunFolderError: It has a format that this version cannot read, or contradicts its name.
    """
    found, damaged = _newest_intact(inside_files(folder, finished=finished), device)
    if found is None:
        for path in damaged:
            _log.warning(
                "%s: is damaged or no checkpoint of clframe; experience %d starts again", path, finished + 1
            )  # fmt: skip
        return None
    path, content = found
    if content.get("finished") != finished:
        raise RunFolderError(
            f"{path}: finished={content.get('finished')!r} contradicts the file's name; delete or rename it"
        )
    return {**content, "file": str(path)}


def _newest_intact(
    paths: Sequence[Path], device: torch.device
) -> tuple[tuple[Path, dict[str, Any]] | None, list[Path]]:
    """Return the newest intact checkpoint of ``paths``, oldest first, and the damaged ones after it.

    Raises:
        RunFolderError: The newest intact one has a format that this version cannot read.
    """
    damaged: list[Path] = []
    for path in reversed(paths):
        content = _read(path, device)
        if content is None:
            damaged.insert(0, path)
            continue
        for other in damaged:
            used = "the one before it" if other == damaged[0] else path.name
            _log.warning("%s: is damaged or no checkpoint of clframe; %s is used", other, used)
        if content.get("format") not in READABLE:
            raise RunFolderError(
                f"{path}: has format {content.get('format')}, this version reads {' and '.join(map(str, READABLE))}; "
                f"use the version that wrote it"
            )
        return (path, content), damaged
    return None, damaged


def _read(path: Path, device: torch.device) -> dict[str, Any] | None:
    """The content of a checkpoint file; None if it is damaged."""
    try:
        content = load_archive(path, device=device)
    except Exception:  # a damaged archive or pickle may raise anything
        return None
    return dict(content) if isinstance(content, dict) else None


def encode(value: Any, *, live: Mapping[int, str] | None = None) -> Any:
    """Return a state as nested plain values; frozen networks become their tensors.

    Args:
        value: The state.
        live: Names of the parameters of the trained network by ``id``. A state that refers to them, as that of ``si``
            does while it trains, refers to those of the restored network after :func:`decode`.

    Raises:
        RunFolderError: A value that a checkpoint could not hold without running code on loading.
    """
    if isinstance(value, Network):
        return {_NETWORK: {name: tensor.detach() for name, tensor in value.state_dict().items()}}
    # Equal texts become one object: pickle writes an object once, so that the size of the file, which is in the ledger,
    # does not depend on whether the run was resumed.
    if isinstance(value, Mapping):
        return {encode(key): encode(item, live=live) for key, item in value.items()}
    if type(value) is str:
        return sys.intern(value)
    if type(value) in _SEQUENCES:
        if _are_numbers(value):
            return type(value)([*value])  # never the same object: pickle would write a shared one once
        return type(value)(encode(item, live=live) for item in value)
    if live is not None and id(value) in live:
        return {_PARAMETER: live[id(value)]}
    if isinstance(value, Tensor) and value.layout == torch.strided:
        return value
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, np.generic) and type(item := value.item()) in (bool, int, float, str):
        return item
    kind = "sparse tensor" if isinstance(value, Tensor) else f"{type(value).__module__}.{type(value).__qualname__}"
    raise RunFolderError(
        f"checkpoint: component state holds a {kind.removeprefix('builtins.')}; keep dense tensors, numbers, text, "
        f"lists, tuples, mappings and frozen networks in it"
    )


def decode(value: Any, network: Network) -> Any:
    """Invert :func:`encode`; frozen networks get the architecture of ``network``, and references its parameters."""
    return _decode(value, network, dict(network.named_parameters()))


def _decode(value: Any, network: Network, parameters: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_NETWORK}:
            return restore(network, value[_NETWORK])
        if set(value) == {_PARAMETER}:
            return parameters[value[_PARAMETER]]
        return {key: _decode(item, network, parameters) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return value if _are_numbers(value) else type(value)(_decode(item, network, parameters) for item in value)
    return value


def _are_numbers(value: list[Any] | tuple[Any, ...]) -> bool:
    """Whether all entries are plain numbers, as in the records of a long stream, which have a million of them."""
    return set(map(type, value)) <= {int, float}


def nbytes(value: Any) -> int:
    """Return the bytes of all tensors in a state; sparse ones, which no checkpoint holds, count none."""
    if isinstance(value, Network):
        return sum(t.nbytes for t in value.state_dict().values())
    if isinstance(value, Mapping):
        return sum(nbytes(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(nbytes(item) for item in value)
    return value.nbytes if isinstance(value, Tensor) and value.layout == torch.strided else 0
