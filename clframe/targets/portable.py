"""A trained model in one safetensors file, without training data: what predictions need, and nothing else.

The file holds the weights and, of the components' states, those that change predictions (bias corrections, class means,
thresholds). Replay buffers and teachers are left out: they are training data and its by-products, and a model that is
passed on must not contain them. So a model read from such a file predicts, but cannot be resumed or extended.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clframe.config.schema import Config
from clframe.errors import RunFolderError, UnsupportedError, reason_of
from clframe.exits.curves import BudgetPoints
from clframe.files import parse_json, write_atomically
from clframe.moe.pipeline import Recipe
from clframe.nn.network import Network
from clframe.records import read_record, to_plain
from clframe.training.checkpoint import encode
from clframe.training.trained import TrainedModel, predicting_components

WEIGHTS = "model.safetensors"
FORMAT = 1
_KEY = "clframe"
_NETWORK = "network/"
_STATE = "state/"


def is_portable(folder: Path) -> bool:
    """Whether a folder holds such a file and no checkpoints."""
    return (folder / WEIGHTS).is_file() and not (folder / "checkpoints").is_dir()


def write_portable(model: TrainedModel, config: Config, folder: Path, *, recipe: Recipe | None = None) -> Path:
    """Write ``model.safetensors``.

    Args:
        model: The model.
        config: Its config, which is written next to the file by the caller.
        folder: An existing folder.
        recipe: Options of a conversion to experts after training.

    Raises:
        UnsupportedError: safetensors is not installed, or the strategy's state has values that the file cannot hold.
    """
    save = _library().save
    learner = model.learner
    tensors = {_NETWORK + name: value for name, value in learner.network.state_dict().items()}
    acting = sorted(predicting_components(learner.composition))
    components = {name: _pack(encode(_without_samples(learner.state[name])), tensors) for name in acting}
    header = {
        "format": FORMAT,
        "past": list(learner.past),
        "data": {
            "input_shape": list(model.network.input_shape),
            "class_order": list(model.class_order),
            "mean": list(model.mean),
            "std": list(model.std),
            "class_names": list(model.class_names),
            **({} if model.inputs is None else {"inputs": model.inputs.as_tree()}),
        },
        "components": components,
        "budgets": None if model.budgets is None else to_plain(model.budgets),
        "recipe": None if recipe is None else recipe.as_tree(),
    }
    # Copies: the format refuses tensors that share memory.
    plain = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    write_atomically(folder / WEIGHTS, save(plain, metadata={_KEY: json.dumps(header), "format": "pt"}))
    return folder / WEIGHTS


def read_portable(folder: Path) -> tuple[dict[str, Any], Recipe | None, BudgetPoints | None]:
    """Read the content of ``model.safetensors`` in the form of a checkpoint, its recipe and its thresholds for budgets.

    Raises:
        RunFolderError: A file that is damaged or not clframe's.
        UnsupportedError: safetensors is not installed.
    """
    library = _library()
    path = folder / WEIGHTS
    try:
        with library.safe_open(str(path), framework="pt") as file:
            header = parse_json((file.metadata() or {})[_KEY])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        if header["format"] != FORMAT:
            raise RunFolderError(
                f"{path}: has format {header['format']}, this version reads {FORMAT}; use the version that wrote it"
            )
        content = {
            "network": {
                name.removeprefix(_NETWORK): value for name, value in tensors.items() if name.startswith(_NETWORK)
            },
            "components": {name: _unpack(tree, tensors) for name, tree in header["components"].items()},
            "data": {**header["data"], "input_shape": tuple(header["data"]["input_shape"])},
            "past": tuple(header["past"]),
        }
        budgets = header["budgets"]
        return (
            content,
            None if header["recipe"] is None else Recipe.from_tree(header["recipe"]),
            None if budgets is None else read_record(BudgetPoints, budgets),
        )
    except RunFolderError:
        raise
    except Exception as error:  # a damaged file may raise anything
        reason = reason_of(error, most=120)
        raise RunFolderError(f"{path}: cannot be read as a model of clframe ({reason}); export it again") from None


def _library() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise UnsupportedError(
            "model.safetensors: found no usable package safetensors; pip install 'clframe[export]'"
        ) from error

    class Library:
        save = staticmethod(safetensors.torch.save)
        safe_open = safetensors.safe_open

    return Library


def _without_samples(state: Any) -> Any:
    """A state without replay buffers (mappings with ``x`` and ``y``) and teachers (networks)."""
    if isinstance(state, Network):
        return None
    if isinstance(state, Mapping):
        buffer = "x" in state and "y" in state
        return {
            key: None if buffer and isinstance(value, Tensor) and key in ("x", "y") else _without_samples(value)
            for key, value in state.items()
        }
    if isinstance(state, (list, tuple)):
        return type(state)(_without_samples(value) for value in state)
    return state


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Plain JSON for a state; its tensors are added to ``tensors``."""
    if isinstance(value, Tensor):
        name = f"{_STATE}{len(tensors)}"
        tensors[name] = value
        return {"$": "tensor", "name": name}
    if isinstance(value, Mapping):
        return {"$": "mapping", "items": [[_pack(k, tensors), _pack(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"$": "tuple", "items": [_pack(item, tensors) for item in value]}
    if isinstance(value, list):
        return [_pack(item, tensors) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"$": "float", "text": repr(value)}
    return value


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Invert :func:`_pack`."""
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value["$"]
    if kind == "tensor":
        return tensors[value["name"]]
    if kind == "float":
        return float(value["text"])
    items = value["items"]
    if kind == "tuple":
        return tuple(_unpack(item, tensors) for item in items)
    return {_unpack(k, tensors): _unpack(v, tensors) for k, v in items}
