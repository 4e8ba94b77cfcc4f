"""Imports that load a module when something in it is first used.

For packages that another one imports and hardly ever uses. No code of theirs is changed, and what is loaded later is
the package as it is.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """Suspend the garbage collector: imports create many objects that stay, and it would look at them time and again.

    >>> with without_collection():
    ...     gc.isenabled()
    False
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def defer_package(
    name: str,
    attributes: Mapping[str, str],
    values: Mapping[str, object] | None = None,
    *,
    within: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
) -> Iterator[None]:
    """Have a package that is first imported in this block run its ``__init__`` when that is first needed.

    Until then ``from NAME import ATTRIBUTE`` imports only the submodule that defines the attribute, and in this block
    other submodules are imported as they are. Another attribute, or an import of another submodule after the block,
    runs ``__init__``. The module in ``sys.modules`` stays the same. Nothing happens if the package has been imported
    before or is missing.

    Args:
        name: A package.
        attributes: The submodule that defines each attribute.
        values: Attributes that the package has from the start.
        within: Returns the context in which ``__init__`` runs.
    """
    spec = None if name in sys.modules else importlib.util.find_spec(name)
    if spec is None or spec.loader is None:
        yield
        return
    package = _DeferredPackage(spec)
    package.__dict__.update(values or {})
    state = package.__dict__[_STATE] = _Initialization(package, attributes, within)
    sys.modules[name] = package
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, package)
    try:
        yield
    finally:
        state.guard()


class _DeferredPackage(ModuleType):
    """A package whose ``__init__`` has not run."""

    def __init__(self, spec: ModuleSpec) -> None:
        super().__init__(spec.name)
        self.__spec__, self.__loader__, self.__package__ = spec, spec.loader, spec.name
        self.__file__, self.__path__ = spec.origin, list(spec.submodule_search_locations or [])

    def __getattr__(self, name: str) -> Any:
        state: _Initialization = self.__dict__[_STATE]
        return state.find(name)


_STATE = "__clframe_initialization__"


class _Initialization(MetaPathFinder, Loader):
    """Runs the ``__init__`` of a package before its attributes and submodules are used."""

    def __init__(
        self,
        package: ModuleType,
        attributes: Mapping[str, str],
        within: Callable[[], contextlib.AbstractContextManager[object]],
    ) -> None:
        self._package, self._attributes, self._within = package, attributes, within

    def guard(self) -> None:
        """Run ``__init__`` before any further submodule is imported."""
        if _STATE in self._package.__dict__:
            sys.meta_path.insert(0, self)

    def find(self, name: str) -> Any:
        """Return an attribute of the package, from the submodule that defines it or after ``__init__``."""
        submodule = self._attributes.get(name)
        if submodule is not None and (submodule in sys.modules or self not in sys.meta_path):
            with contextlib.suppress(ImportError, AttributeError):  # a version that defines it elsewhere
                value = getattr(importlib.import_module(submodule), name)
                setattr(self._package, name, value)
                return value
        self._run()
        return getattr(self._package, name)

    def _run(self) -> None:
        package, spec = self._package, self._package.__spec__
        if package.__dict__.pop(_STATE, None) is None:
            return
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        assert spec is not None and spec.loader is not None
        package.__class__ = ModuleType
        try:
            with self._within():
                spec.loader.exec_module(package)
        except BaseException:
            sys.modules.pop(spec.name, None)  # as after any import that fails
            raise

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a submodule, whose import runs ``__init__`` first."""
        if path is None or not fullname.startswith(f"{self._package.__name__}."):
            return None
        return None if PathFinder.find_spec(fullname, path) is None else ModuleSpec(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Run ``__init__``, which may import the submodule, and return it; a second import would run it twice."""
        self._run()
        module = importlib.import_module(spec.name)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to run."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


@contextlib.contextmanager
def use_stand_in(name: str, attributes: Sequence[str], *, home: str | None = None) -> Iterator[None]:
    """Have ``from NAME import ATTRIBUTE`` in this block give a :class:`Deferred`.

    The stand-in leaves ``sys.modules`` at the end, so later imports find the module itself. Another attribute of the
    module imports it; a submodule is an ImportError. Nothing happens if the module has been imported before or its
    package is missing.

    Args:
        name: A package, or a module of one; the package is not imported.
        attributes: Functions and classes.
        home: The package that defines the classes; None is ``name``.
    """
    if name in sys.modules or _find_top(name) is None:
        yield
        return
    stand_in = _StandIn(name)
    for attribute in attributes:
        setattr(stand_in, attribute, Deferred(name, attribute, home=home))
    parent_name, _, last = name.rpartition(".")
    parent = sys.modules.get(parent_name)
    if isinstance(parent, (_StandIn, _DeferredPackage)):
        setattr(parent, last, stand_in)  # ``import a.b as c`` reads the attribute of a
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]
        if parent is not None and not isinstance(parent, _StandIn) and parent.__dict__.get(last) is stand_in:
            delattr(parent, last)
            if _STATE not in parent.__dict__:  # its __init__ has run in this block and taken the stand-in
                importlib.import_module(name)


def _find_top(name: str) -> ModuleSpec | None:
    """The spec of the top-level package of a module."""
    top = name.partition(".")[0]
    return sys.modules[top].__spec__ if top in sys.modules else importlib.util.find_spec(top)


class _StandIn(ModuleType):
    """A module that is imported when an attribute is used that it has no object for."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)  # find_spec() refuses modules without one

    def __getattr__(self, name: str) -> Any:
        # Every ``from NAME import`` asks for __path__, and ``inspect.getmodule`` asks each module for __file__.
        if name in ("__path__", "__file__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


class Deferred:
    """A function or class that is imported when it is called, an attribute is read, or an instance may be one of it.

    Args:
        module: Its module.
        name: Its name there.
        home: The package that defines the class, if it is one; None is ``module``. An object of a class that neither
            is nor inherits from one of this package is not an instance, and nothing is imported.
    """

    def __init__(self, module: str, name: str, *, home: str | None = None) -> None:
        self._module = module
        self._name = name
        self._home = home or module

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._load(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it."""
        return self._load()(*args, **kwargs)

    def __instancecheck__(self, instance: Any) -> bool:
        modules = (f"{base.__module__}." for base in type(instance).__mro__)
        return any(name.startswith(f"{self._home}.") for name in modules) and isinstance(instance, self._load())

    def _load(self) -> Any:
        return getattr(importlib.import_module(self._module), self._name)
