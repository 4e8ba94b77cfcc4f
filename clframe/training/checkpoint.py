"""Checkpoints between experiences: plain tensors and values, read without running any code.

A checkpoint holds what cannot be derived: weights, component states, counts. Order and randomness are
functions of (seed, experience, epoch), and every experience has a fresh optimizer, so neither is saved.
"""

from __future__ import annotations

import io
import pickle
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


def save_checkpoint(folder: Path, content: Mapping[str, Any], *, finished: int, keep: int = 2) -> Path:
    """Write ``experience_NNN.ckpt`` after ``finished`` experiences; the last ``keep`` stay."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "finished": finished, **encode(dict(content))}, buffer)
    path = folder / f"experience_{finished:03d}.ckpt"
    write_atomically(path, buffer.getvalue())
    for old in sorted(folder.glob("experience_*.ckpt"))[:-keep]:
        old.unlink()
    return path


def load_latest(folder: Path, *, device: torch.device) -> dict[str, Any] | None:
    """The newest checkpoint of a folder, or None where there is none yet.

    Tensors that were on an accelerator come to ``device``; those that were on the CPU stay there.

    Raises:
        RunFolderError: The newest one is damaged, or of a format this version does not know.
    """
    paths = sorted(folder.glob("experience_*.ckpt"))
    if not paths:
        return None
    try:
        accelerators = [*(f"cuda:{i}" for i in range(64)), "mps", "mps:0"]
        places = dict.fromkeys(accelerators, str(device))
        content = torch.load(paths[-1], map_location=places, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError):
        raise RunFolderError(
            f"{paths[-1]}: is damaged or no checkpoint of clframe; delete it to resume from the one before"
        ) from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise RunFolderError(
            f"{paths[-1]}: has format {found}, this version reads {FORMAT}; resume with the version that wrote it"
        )
    return dict(content)


def encode(value: Any) -> Any:
    """State as nested plain values: frozen networks become their tensors.

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
    """The inverse of :func:`encode`; frozen networks come back in the architecture of ``network``."""
    if isinstance(value, dict):
        if set(value) == {_NETWORK}:
            return restore(network, value[_NETWORK])
        return {key: decode(item, network) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(decode(item, network) for item in value)
    return value


def nbytes(value: Any) -> int:
    """Bytes of all tensors in a state."""
    if isinstance(value, Network):
        return sum(t.nbytes for t in value.state_dict().values())
    if isinstance(value, Mapping):
        return sum(nbytes(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return sum(nbytes(item) for item in value)
    return value.nbytes if isinstance(value, Tensor) else 0
