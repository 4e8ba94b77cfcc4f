"""Import Avalanche and Lightning without the packages that they import and hardly ever use.

Of a run's first seconds, these imports took a third: ``wandb`` and ``gdown`` for one logger and one data set of
Avalanche, and ``transformers`` for one text metric of torchmetrics. Nothing is replaced for good: the modules are
loaded when something in them is used, by Avalanche or by anybody else.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any, Final

_DEFERRED: Final = ("gdown", "wandb")
"""Packages that Avalanche 0.6 imports as a whole, and whose attributes it uses only inside functions."""
_TRANSFORMERS: Final = ("AutoModel", "AutoTokenizer")
"""Classes that ``torchmetrics.functional.text.bert`` imports and uses only inside functions."""


def import_avalanche() -> None:
    """Import Avalanche, and torchmetrics for Lightning, quickly and without the output and warnings of their import.

    GPUtil, qpsolvers and other dependencies warn about themselves, which does not concern users of clframe.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        # A torchmetrics that imports more of transformers than the stand-in has is imported below, as usual.
        with contextlib.suppress(ImportError), use_stand_in("transformers", _TRANSFORMERS):
            import torchmetrics  # noqa: F401
        with defer_imports(_DEFERRED):
            import avalanche.training  # noqa: F401


@contextlib.contextmanager
def defer_imports(names: Sequence[str]) -> Iterator[None]:
    """Have packages that are first imported in this block load when one of their attributes is first used.

    They are in ``sys.modules`` and are the modules that later imports return, as :class:`importlib.util.LazyLoader`
    describes. A package that is missing is missing as ever.
    """
    finder = _DeferringFinder(names)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _DeferringFinder(MetaPathFinder):
    """Finds top-level packages as usual, with loaders that load on first use."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._names:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = importlib.util.LazyLoader(spec.loader)
        return spec


@contextlib.contextmanager
def use_stand_in(name: str, attributes: Sequence[str]) -> Iterator[None]:
    """Have ``from NAME import ATTRIBUTE`` in this block give an object that imports the attribute on first use.

    The stand-in leaves ``sys.modules`` at the end, so later imports find the package itself. Another attribute of the
    package imports it; a submodule is an ImportError. Nothing happens if the package has been imported before or is
    missing.
    """
    if name in sys.modules or importlib.util.find_spec(name) is None:
        yield
        return
    stand_in = _StandIn(name, attributes)
    sys.modules[name] = stand_in
    try:
        yield
    finally:
        if sys.modules.get(name) is stand_in:
            del sys.modules[name]


class _StandIn(ModuleType):
    """A module that is imported when an attribute is used that it has no object for."""

    def __init__(self, name: str, attributes: Sequence[str]) -> None:
        super().__init__(name)
        for attribute in attributes:
            setattr(self, attribute, _Deferred(name, attribute))

    def __getattr__(self, name: str) -> Any:
        # Every ``from NAME import`` asks for __path__, and ``inspect.getmodule`` asks each module for __file__.
        if name in ("__path__", "__file__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


class _Deferred:
    """An attribute of a module that is imported when it is called or an attribute is read."""

    def __init__(self, module: str, name: str) -> None:
        self._module = module
        self._name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._load(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._load()(*args, **kwargs)

    def _load(self) -> Any:
        return getattr(importlib.import_module(self._module), self._name)
