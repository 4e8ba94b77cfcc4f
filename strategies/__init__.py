"""Components, one per file: ``from strategies import ER``.

Every module of this package is imported, and every :class:`~clframe.core.Component` defined in it is registered by
name through the entry-point group ``clframe.components``, the same one that other packages use.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from clframe.core.component import Component


def _discover() -> tuple[type[Component], ...]:
    found = []
    for module_info in sorted(pkgutil.iter_modules(__path__), key=lambda info: info.name):
        module = importlib.import_module(f"{__name__}.{module_info.name}")
        found += [
            entry
            for entry in vars(module).values()
            if isinstance(entry, type)
            and issubclass(entry, Component)
            and entry.__module__ == module.__name__
        ]
    return tuple(found)


COMPONENTS = _discover()
"""Every component class of this package."""

_BY_CLASS_NAME = {entry.__name__: entry for entry in COMPONENTS}


def __getattr__(name: str) -> Any:
    try:
        return _BY_CLASS_NAME[name]
    except KeyError:
        raise AttributeError(f"module 'strategies' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted([*globals(), *_BY_CLASS_NAME])
