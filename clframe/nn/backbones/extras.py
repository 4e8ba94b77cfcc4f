"""Packages that only some backbones need, imported when one of those is built."""

from __future__ import annotations

import importlib
from typing import Any

from clframe.errors import UnsupportedError


def needed(package: str, *, where: str) -> Any:
    """The module ``package``, which the extra of the same name installs.

    Raises:
        UnsupportedError: It is not installed, or something that it needs itself is missing.

    >>> needed("no_such_package", where="mine")
    Traceback (most recent call last):
    clframe.errors.UnsupportedError: mine: found no package no_such_package; pip install clframe[no_such_package]
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        found = f"no package {package}" if error.name == package else f"a broken {package} ({error})"
        raise UnsupportedError(f"{where}: found {found}; pip install clframe[{package}]") from error
