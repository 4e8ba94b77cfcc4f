"""Registries: explicit, typed and strict.

A registry maps a name to a class or function. Packages add to it through an entry point, as clframe's own strategies
do; scripts call :meth:`Registry.add`. A second entry of the same name is an error, unless it is a newer definition of
the first, as after a second run of a notebook's cell; a miss offers the nearest name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from clframe.errors import ClframeError, ConfigError, UnknownNameError, reason_of, unknown_name
from clframe.own_code import is_dotted, load_own

T = TypeVar("T")


class Registry(Generic[T]):
    """Named entries of one kind.

    Args:
        kind: Kind of entry in error messages, such as "component".
        group: Entry-point group searched on first use; None for a closed registry.
        load: Turns a loaded entry point into ``(name, entry)`` pairs.
        problem: Returns what is wrong with an entry and what is expected, or an empty text. A script that registers
            such an entry gets a :class:`ConfigError`; a package that provides one is listed as not loaded.
        own: Whether :meth:`get` also takes dotted paths into packages that the user has allowed; see
            :mod:`clframe.own_code`.

    >>> shapes: Registry[type] = Registry("shape")
    >>> shapes.add("circle", int)
    >>> shapes.get("circle")
    <class 'int'>
    """

    def __init__(
        self,
        kind: str,
        *,
        group: str | None = None,
        load: Callable[[EntryPoint], Iterator[tuple[str, T]]] | None = None,
        problem: Callable[[T], str] | None = None,
        own: bool = False,
    ) -> None:
        self.kind = kind
        self._own = own
        self._group = group
        self._load = load
        self._problem = problem
        self._entries: dict[str, T] = {}
        self._broken: list[str] = []
        self._searched = group is None

    def add(self, name: str, entry: T) -> None:
        """Register ``entry``; a new definition of the entry of that name replaces it.

        A definition is new if its class, or all of its functions, have the module and the qualified names of the
        former ones.

        Raises:
            ConfigError: It cannot be used as an entry of this kind.
            ClframeError: The name is taken by another.
        """
        wrong = self._problem(entry) if self._problem is not None else ""
        if wrong:
            raise ConfigError(f"{self.kind} '{name}': {wrong}")
        self._add(name, entry)

    def _add(self, name: str, entry: T) -> None:
        known = self._entries.get(name)
        if known is not None and known is not entry and not _is_newer(entry, known):
            raise ClframeError(
                f"{self.kind} '{name}': registered twice, by {_origin(known)} and {_origin(entry)}; "
                f"rename one of them"
            )
        self._entries[name] = entry

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator form of :meth:`add`."""

        def decorate(entry: T) -> T:
            self.add(name, entry)
            return entry

        return decorate

    @property
    def not_loaded(self) -> tuple[str, ...]:
        """One line for each entry point that could not be loaded."""
        self._search()
        return tuple(self._broken)

    def get(self, name: str, *, where: str = "") -> T:
        """Return the entry called ``name``; raises :class:`UnknownNameError` with the nearest name."""
        self._search()
        try:
            return self._entries[name]
        except KeyError:
            if is_dotted(name) and self._own:
                return self._load_own(name, where or self.kind)
            message = unknown_name(self.kind, name, self._entries, where=where)
            if self._broken:
                message += f"; not loaded: {'; '.join(self._broken)}"
            raise UnknownNameError(message) from None

    def _load_own(self, name: str, where: str) -> T:
        """Return the entry with a dotted path, of a package that the user has allowed."""
        entry: T = load_own(name, where=where)
        wrong = self._problem(entry) if self._problem is not None else ""
        if wrong:
            raise ConfigError(f"{where}: {name}: {wrong}")
        return entry

    def names(self) -> tuple[str, ...]:
        """Return all names, sorted."""
        self._search()
        return tuple(sorted(self._entries))

    def items(self) -> tuple[tuple[str, T], ...]:
        """Return all ``(name, entry)`` pairs, sorted by name."""
        return tuple((name, self._entries[name]) for name in self.names())

    def __contains__(self, name: object) -> bool:
        self._search()
        return name in self._entries

    def _search(self) -> None:
        if self._searched:
            return
        self._searched = True
        assert self._group is not None and self._load is not None
        for point in sorted(entry_points(group=self._group), key=lambda p: (p.name, p.value)):
            try:
                for name, entry in self._load(point):
                    wrong = self._problem(entry) if self._problem is not None else ""
                    if wrong:
                        raise TypeError(wrong)
                    self._add(name, entry)
            except ClframeError:
                self._searched = False
                raise
            except KeyboardInterrupt:
                self._searched = False
                raise
            except BaseException as error:  # SystemExit too: a broken package must not take every command down
                reason = reason_of(error)
                if isinstance(error, SystemExit):
                    reason = f"exits with {error.code} when it is imported"
                self._broken.append(f"entry point {point.name} = {point.value} ({reason})")


def call_problem(entry: Callable[..., Any], arguments: tuple[str, ...], *, expected: str, options: bool = True) -> str:
    """Return why ``entry`` cannot be called with positional arguments and keyword options, or an empty text.

    Options are keyword-only parameters with annotations: config values are checked against these. A parameter without
    one would accept any value, and a positional one could not be set.

    Args:
        entry: A function or class.
        arguments: Names of the positional arguments that it is called with.
        expected: How it is to be written, for the message.
        options: Whether it may have options.

    >>> def net(input_shape, *, width): ...
    >>> call_problem(net, ("input_shape",), expected="(input_shape, *, options)")
    "option 'width' has no annotation; write its type, such as width: int = 8"
    """
    if not callable(entry):
        return f"found {entry!r}, which is not a function; expected {expected}"
    try:
        signature = inspect.signature(entry)
    except (TypeError, ValueError):  # of a built-in
        return ""
    kinds = inspect.Parameter
    by_keyword = [p for p in signature.parameters.values() if p.kind is kinds.KEYWORD_ONLY]
    try:
        signature.bind(*arguments, **{p.name: None for p in by_keyword if options})
        fits = len(_positional(signature)) <= len(arguments)
    except TypeError:
        fits = False
    if not fits:
        return f"found the signature {_named(entry)}{signature}; expected {expected}"
    for parameter in by_keyword:
        if options and parameter.annotation is kinds.empty:
            name = parameter.name
            return f"option '{name}' has no annotation; write its type, such as {name}: int = 8"
    return ""


def _positional(signature: inspect.Signature) -> list[inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter for parameter in signature.parameters.values() if parameter.kind in kinds]


def _named(entry: Any) -> str:
    return str(getattr(entry, "__name__", type(entry).__name__))


def _origin(entry: Any) -> str:
    return " and ".join(_definitions(entry)) or repr(entry)


def _is_newer(entry: Any, known: Any) -> bool:
    """Whether ``entry`` is another definition of what ``known`` is, made by running the same code again."""
    names = _definitions(entry)
    return bool(names) and names == _definitions(known)


def _definitions(entry: Any) -> tuple[str, ...]:
    """Return the module and qualified name of a class, a function, or every function in the fields of an object."""
    if is_dataclass(entry) and not isinstance(entry, type):
        parts = [getattr(entry, field.name) for field in fields(entry)]
    else:
        parts = [entry]
    parts = [part.func if isinstance(part, functools.partial) else part for part in parts]
    return tuple(f"{part.__module__}.{part.__qualname__}" for part in parts if hasattr(part, "__qualname__"))
