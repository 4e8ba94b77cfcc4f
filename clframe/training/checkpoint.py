"""Checkpoints between experiences: plain tensors and values, read without running any code.

A checkpoint holds what cannot be derived: weights, component states, counts. Order and randomness are functions of
(seed, experience, epoch), and every experience has a fresh optimizer, so neither is saved.
"""

from __future__ import annotations

import io
import logging
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clframe.errors import RunFolderError
from clframe.files import write_atomically
from clframe.nn.frozen import restore
from clframe.nn.network import Network

FORMAT = 2
_NETWORK = "__network__"
_NAME = re.compile(r"experience_(\d+)\.ckpt")
_log = logging.getLogger(__name__)


def save_checkpoint(folder: Path, content: Mapping[str, Any], *, finished: int, keep: int = 2) -> Path:
    """Write ``experience_NNN.ckpt`` after ``finished`` experiences and delete all but the last ``keep``."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "finished": finished, **encode(dict(content))}, buffer)
    path = folder / f"experience_{finished:03d}.ckpt"
    write_atomically(path, buffer.getvalue())
    for old in checkpoint_files(folder)[:-keep]:
        old.unlink()
    return path


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
    damaged: Path | None = None
    for path in reversed(checkpoint_files(folder)):
        content = _read(path, device)
        if content is None:
            _log.warning("%s: is damaged or no checkpoint of clframe; the one before it is used", path)
            damaged = damaged or path
            continue
        if content.get("format") != FORMAT:
            raise RunFolderError(
                f"{path}: has format {content.get('format')}, this version reads {FORMAT}; use the version that "
                f"wrote it"
            )
        if content.get("finished") != int(path.stem.removeprefix("experience_")):
            raise RunFolderError(
                f"{path}: finished={content.get('finished')!r} contradicts the file's name; delete or rename it"
            )
        return {**content, "file_bytes": path.stat().st_size}
    if damaged is not None:
        raise RunFolderError(
            f"{damaged}: is damaged or no checkpoint of clframe, and no intact one is left; restore it from a copy, "
            f"or delete it to start over"
        )
    return None


def _read(path: Path, device: torch.device) -> dict[str, Any] | None:
    """The content of a checkpoint file; None if it is damaged."""
    accelerators = [*(f"cuda:{i}" for i in range(64)), "mps", "mps:0"]
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.load checks no CRC: without this, most flipped bits load as other weights.
            if archive.testzip() is not None:
                return None
        content = torch.load(path, map_location=dict.fromkeys(accelerators, str(device)), weights_only=True)
    except Exception:  # a damaged archive or pickle may raise anything
        return None
    return dict(content) if isinstance(content, dict) else None


def encode(value: Any) -> Any:
    """Return a state as nested plain values; frozen networks become their tensors.

    Raises:
        RunFolderError: A value that a checkpoint could not hold without running code on loading.
    """
    if isinstance(value, Network):
        return {_NETWORK: {name: tensor.detach() for name, tensor in value.state_dict().items()}}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(encode(item) for item in value)
    if value is None or isinstance(value, (Tensor, bool, int, float, str)):
        return value
    raise RunFolderError(
        f"checkpoint: component state holds a {type(value).__name__}; keep tensors, numbers, text, lists, "
        f"mappings and frozen networks in it"
    )


def decode(value: Any, network: Network) -> Any:
    """Invert :func:`encode`; frozen networks get the architecture of ``network``."""
    if isinstance(value, dict):
        if set(value) == {_NETWORK}:
            return restore(network, value[_NETWORK])
        return {key: decode(item, network) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(decode(item, network) for item in value)
    return value


def nbytes(value: Any) -> int:
    """Return the bytes of all tensors in a state."""
    if isinstance(value, Network):
        return sum(t.nbytes for t in value.state_dict().values())
    if isinstance(value, Mapping):
        return sum(nbytes(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(nbytes(item) for item in value)
    return value.nbytes if isinstance(value, Tensor) else 0
