"""Optimizers of ``torch.optim`` by name, with the options that their constructors declare."""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, Final, Union, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.optim import Optimizer

from clframe.errors import ConfigError, Problems, UnknownNameError, nearest, reason_of, unknown_name
from clframe.options import convert, format_value
from clframe.own_code import is_dotted, load_class

REFUSED: Final = {
    "lbfgs": "it evaluates the loss several times per step",
    "sparseadam": "it needs sparse gradients, which no layer here has",
    "muon": "it updates matrices only, and networks have biases",
}
"""Optimizers of torch that cannot train a network here, and why."""

_NOT_OPTIONS: Final = ("params", "maximize", "differentiable", "capturable")
"""Arguments that a config cannot set: they do not minimize the loss, or clframe sets them."""
_OWN_KEYS: Final = ("lr", "momentum", "weight_decay", "betas", "fused")
"""Arguments that are keys of the block for every optimizer."""


@cache
def optimizers() -> dict[str, type[Optimizer]]:
    """Every optimizer class that can be used, by its name in lower case.

    >>> optimizers()["adamw"].__name__
    'AdamW'
    """
    found = {
        name.lower(): kind
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer
    }
    return {name: kind for name, kind in sorted(found.items()) if name not in REFUSED}


def optimizer_name(name: str) -> str:
    """The name in lower case; a dotted path as it is.

    Raises:
        ConfigError: An optimizer that cannot train a network here.
        UnknownNameError: No class of ``torch.optim``; the message has the nearest name.

    >>> optimizer_name("RMSprop")
    'rmsprop'
    """
    if is_dotted(name):
        return name
    lower = name.lower()
    if lower in REFUSED:
        raise ConfigError(f"optimizer.name: found '{name}', which cannot be used: {REFUSED[lower]}; use adamw or sgd")
    if lower not in optimizers():
        raise UnknownNameError(unknown_name("optimizer", name, optimizers(), where="optimizer.name"))
    return lower


def optimizer_class(name: str) -> type[Optimizer]:
    """The class of a name, or of a dotted path into a package that the user has allowed.

    Raises:
        ConfigError: A package that is not allowed, or no optimizer.
    """
    if not is_dotted(name):
        return optimizers()[name]
    found: type[Optimizer] = load_class(name, (Optimizer,), where="optimizer.name")
    return found


@cache
def optimizer_arguments(name: str) -> dict[str, Any]:
    """Annotation of each argument of an optimizer that a config may set, without ``Tensor``.

    >>> optimizer_arguments("sgd")["nesterov"], "betas" in optimizer_arguments("sgd")
    (<class 'bool'>, False)
    """
    kind = optimizer_class(name)
    hints = get_type_hints(kind.__init__)
    return {
        key: _without_tensors(hints.get(key, Any))
        for key in inspect.signature(kind).parameters
        if key not in _NOT_OPTIONS
    }


@cache
def optimizer_options() -> tuple[str, ...]:
    """Names of the arguments that are open keys of the block, of any optimizer."""
    found = {key for name in optimizers() for key in optimizer_arguments(name)}
    return tuple(sorted(found.difference(_OWN_KEYS)))


def check_arguments(name: str, given: Mapping[str, Any], *, where: str, base: Mapping[str, Any]) -> dict[str, Any]:
    """Convert arguments of an optimizer to their declared types, and check their values with the constructor.

    Args:
        name: The optimizer, in lower case.
        given: Arguments by name.
        where: Key prefix for messages.
        base: The other arguments that the optimizer will get, for checks of several together.

    Raises:
        ConfigError: An argument that the optimizer lacks, of another type, or out of its range.

    >>> check_arguments("sgd", {"nesterov": True}, where="optimizer", base={"momentum": 0.9})
    {'nesterov': True}
    """
    known = optimizer_arguments(name)
    checked: dict[str, Any] = {}
    problems = Problems()
    for key, value in given.items():
        with problems.attempt():
            if key not in known:
                close = nearest(str(key), known)
                advice = f"did you mean '{close}'?" if close else f"options of {name} are {', '.join(known)}"
                raise ConfigError(
                    f"{where}.{key}: found {format_value(value)}, but {name} has no such option; {advice}"
                )
            checked[str(key)] = convert(value, known[key], where=f"{where}.{key}")
    problems.raise_found()
    if not checked:  # constructing an optimizer imports torch's compiler, which takes seconds
        return checked
    try:
        optimizer_class(name)([torch.nn.Parameter(torch.zeros(1))], **{**base, **checked})
    except (ValueError, TypeError, RuntimeError) as error:
        reason = reason_of(error)
        raise ConfigError(f"{where}: {name} refuses its options ({reason}); change them") from None
    return checked


def _without_tensors(annotation: Any) -> Any:
    """The annotation without ``Tensor`` as a choice: a config has none."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        kept = tuple(_without_tensors(choice) for choice in args if choice is not Tensor)
        return kept[0] if len(kept) == 1 else Union[kept]  # noqa: UP007  # of a tuple
    if origin is tuple:
        return tuple[tuple(_without_tensors(item) for item in args)]  # type: ignore[misc]
    return annotation
