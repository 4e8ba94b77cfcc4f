"""Code of the user's own packages by dotted path, such as ``my_package.nets.wide``: only from allowed packages.

A config names code to run, and configs come from strangers. So nothing is imported unless the user has allowed the
package, with ``clframe VERB --allow-imports my_package`` or :func:`allow_imports`. The names are kept in an environment
variable, which the processes that a command starts inherit.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from clframe.errors import ConfigError, UnknownNameError, nearest, reason_of

VARIABLE = "CLFRAME_ALLOW_IMPORTS"
"""Allowed packages, separated by commas."""
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", re.ASCII)


def is_dotted(name: object) -> bool:
    """Whether a name of a config is a dotted path.

    >>> is_dotted("my_package.nets.wide"), is_dotted("resnet18"), is_dotted("my.yaml/x")
    (True, False, False)
    """
    return isinstance(name, str) and _DOTTED.fullmatch(name) is not None


def allowed_packages() -> tuple[str, ...]:
    """Packages whose code configs may name."""
    return tuple(name for name in os.environ.get(VARIABLE, "").split(",") if name)


def import_options() -> list[str]:
    """Return the options of a command that allow the same packages again."""
    return [word for name in allowed_packages() for word in ("--allow-imports", name)]


@contextmanager
def allow_imports(packages: Sequence[str]) -> Iterator[None]:
    """Context in which configs may name code of these packages, in addition to those that are allowed.

    The current folder is searched for them after all others, as a command's own folder is not.

    Raises:
        ConfigError: A name that is not one of a package.
    """
    names = [name.strip() for text in packages for name in text.split(",")]
    for name in names:
        if not (name.isidentifier() or is_dotted(name)):
            raise ConfigError(f"--allow-imports: found '{name}'; give the name of a package, such as my_package")
    if not names:
        yield
        return
    before, path = os.environ.get(VARIABLE), os.getcwd()
    added = "" not in sys.path and path not in sys.path
    os.environ[VARIABLE] = ",".join(dict.fromkeys((*allowed_packages(), *names)))
    if added:
        sys.path.append(path)
    try:
        yield
    finally:
        if added:
            sys.path.remove(path)
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def is_allowed(name: str) -> bool:
    """Whether a dotted path belongs to an allowed package."""
    return any(name.startswith(f"{package}.") for package in allowed_packages())


def load_own(name: str, *, where: str) -> Any:
    """Import what a dotted path names.

    Args:
        name: A package and what it contains, such as ``my_package.nets.wide``.
        where: The key that names it.

    Raises:
        ConfigError: A package that is not allowed or cannot be imported.
        UnknownNameError: It contains nothing of this name.
    """
    if not is_allowed(name):
        allowed = ", ".join(allowed_packages())
        known = f" (allowed: {allowed})" if allowed else ""
        raise ConfigError(
            f"{where}: found '{name}', code that is not allowed to be imported{known}; if you trust it, add "
            f"--allow-imports {name.partition('.')[0]}"
        )
    outer, _, last = name.rpartition(".")
    try:
        module = importlib.import_module(outer)
    except Exception as error:  # importing runs the package's code, which raises anything
        reason = reason_of(error, most=200)
        raise ConfigError(f"{where}: {outer} cannot be imported ({reason}); install it, or fix it") from error
    if not hasattr(module, last):
        close = nearest(last, [known for known in vars(module) if not known.startswith("_")])
        advice = f"did you mean '{outer}.{close}'?" if close else "fix the name"
        raise UnknownNameError(f"{where}: {outer} has no '{last}'; {advice}")
    return getattr(module, last)


def load_class(name: str, bases: tuple[type, ...], *, where: str) -> Any:
    """Import a class by its dotted path.

    Raises:
        ConfigError: As :func:`load_own`, or something else than a subclass of one of ``bases``.
        UnknownNameError: As :func:`load_own`.
    """
    found = load_own(name, where=where)
    if not isinstance(found, type) or not issubclass(found, bases):
        wanted = " or ".join(base.__name__ for base in bases)
        raise ConfigError(f"{where}: found '{name}', which is not a subclass of {wanted}; name one")
    return found
