"""Errors that a user can act on.

Every error is one line: ``<where>: <what was found>; <what to do>``. The command line prints it and
leaves with exit code 2; from Python they are ordinary :class:`ValueError` subclasses.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ClframeError(ValueError):
    """Bad input. The message names the key or file, what was found and what to do."""


class ConfigError(ClframeError):
    """A configuration key, override or option is unknown, mistyped or out of range."""


class UnknownNameError(ClframeError):
    """A name that no registry entry, file or option answers to."""


class ComposeError(ClframeError):
    """Components that cannot stand in one strategy."""


class DataError(ClframeError):
    """Data that is missing, damaged or unfit for the protocol asked for."""


class RunFolderError(ClframeError):
    """A run folder that cannot be written, read or resumed."""


class UnsupportedError(ClframeError):
    """Something that cannot work with this engine, version or machine; the message says why."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to ``name``, or None where nothing is close.

    >>> nearest("lwff", ["er", "lwf"])
    'lwf'
    >>> nearest("zzz", ["er", "lwf"]) is None
    True
    """
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown_name(kind: str, name: str, known: Iterable[str], *, where: str = "") -> str:
    """One line for an unknown name: what was found, the nearest valid name, the whole list.

    >>> unknown_name("component", "lwff", ["er", "lwf"])
    "unknown component 'lwff'; did you mean 'lwf'? (known: er, lwf)"
    """
    names = sorted(known)
    close = nearest(name, names)
    advice = f"did you mean '{close}'?" if close else "nothing is close to it"
    prefix = f"{where}: " if where else ""
    return f"{prefix}unknown {kind} '{name}'; {advice} (known: {', '.join(names) or 'none'})"
