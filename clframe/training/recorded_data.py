"""Checks of what a checkpoint records of its data and components, before a model is made of it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from clframe.data.inputs import InputFormat

_MOST_INPUT = 2**28
"""Values of one input: more than those of an image of 9,000 x 9,000 pixels."""


def check_data(data: Mapping[str, Any]) -> None:
    """Refuse a record from which predictions would get wrong names or inputs.

    Args:
        data: The entry ``data`` of a checkpoint, as :func:`~clframe.training.trained.describe_data` returns it. Those
            of earlier versions have neither names nor a format.

    Raises:
        ValueError: An input shape that is none; an order of classes with something else than different ids; names that
            do not cover them; a mean and standard deviation with which inputs cannot be normalized; or a format of
            files that does not fit them.
        LookupError, TypeError, AttributeError: An entry that is missing or of another type.
    """
    shape = tuple(data["input_shape"])
    # A backbone of a larger shape would fill the memory.
    if not shape or any(type(side) is not int or side < 1 for side in shape) or math.prod(shape) > _MOST_INPUT:
        raise ValueError(f"inputs of shape {shape}")
    order, names = tuple(data["class_order"]), tuple(data.get("class_names", ()))
    # Development runs have the first classes of the order, and the names of all.
    if any(type(c) is not int or c < 0 for c in order) or len(set(order)) != len(order):
        raise ValueError(f"class_order {order}, expected different class ids from 0")
    if names and (len(names) <= max(order, default=-1) or any(type(name) is not str for name in names)):
        raise ValueError(f"class_names has {len(names)} entries, class_order ids up to {max(order)}")
    _check_normalization(tuple(data["mean"]), tuple(data["std"]), shape)
    if "inputs" in data:
        _check_format(InputFormat.of(data["inputs"]), shape, normalized=bool(tuple(data["std"])))


def check_classes(data: Mapping[str, Any], past: Sequence[int], *, outputs: int) -> None:
    """Refuse a record with fewer classes than the network has outputs, or learned classes that it lacks.

    Args:
        data: As for :func:`check_data`.
        past: Classes of finished experiences, in learning order.
        outputs: Outputs of the network.

    Raises:
        ValueError: One of these.
    """
    if len(data["class_order"]) < outputs:
        raise ValueError(f"class_order has {len(data['class_order'])} classes, the network {outputs} outputs")
    if any(type(c) is not int for c in past) or len(set(past)) != len(past) or not set(past) <= set(range(outputs)):
        raise ValueError(f"learned classes {tuple(past)} of a network with {outputs} outputs")


def check_states(states: Mapping[str, Any], *, needed: Collection[str]) -> None:
    """Refuse states of components that are none.

    Args:
        states: The entry ``components`` of a checkpoint.
        needed: Names of the components that have to have one, since predictions would otherwise be those of new ones.

    Raises:
        LookupError, TypeError: A component without a state, or a state that is not a mapping.
    """
    missing = sorted(set(needed) - set(states))
    if missing:
        raise LookupError(f"no state of {', '.join(missing)}")
    for name, state in states.items():
        if not isinstance(state, Mapping):
            raise TypeError(f"the state of {name} is not a mapping")


def _check_normalization(mean: Sequence[Any], std: Sequence[Any], shape: Sequence[int]) -> None:
    """Neither, for token ids; or one value for all channels, or one for each."""
    numbers = all(type(value) in (int, float) and math.isfinite(value) for value in (*mean, *std))
    if not numbers or any(value <= 0 for value in std):
        raise ValueError(f"mean {tuple(mean)} and std {tuple(std)}, expected finite numbers and a std above 0")
    if len(mean) != len(std) or len(mean) not in (0, 1, shape[0]):
        raise ValueError(f"{len(mean)} values of mean and {len(std)} of std for inputs of shape {tuple(shape)}")


def _check_format(form: InputFormat, shape: Sequence[int], *, normalized: bool) -> None:
    if form.kind == "image" and (len(shape) != 3 or not 1 <= form.largest <= 255):
        raise ValueError(f"images of shape {tuple(shape)} with values up to {form.largest}")
    if form.kind == "words" and shape != (form.n_features,):
        raise ValueError(f"vectors of {form.n_features} words for inputs of shape {tuple(shape)}")
    if normalized == (form.kind in ("tokens", "language")) and form.kind != "array":
        raise ValueError(f"inputs of kind '{form.kind}' {'with' if normalized else 'without'} mean and std")
