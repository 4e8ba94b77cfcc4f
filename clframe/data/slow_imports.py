"""Import Avalanche and Lightning without the packages that they import and hardly ever use.

Of a run's first seconds, these imports took half: ``wandb`` and ``gdown`` for one logger and one data set of
Avalanche; all metrics of torchmetrics, with matplotlib and scipy.signal, of which Lightning needs one base class; and
torch's compiler, which torchvision and every optimizer import, for two functions that do nothing without it; and the
models and operations of torchvision, of which Avalanche needs transforms and data sets. Nothing is
replaced for good: the modules are loaded when something in them is used, by Avalanche or by anybody else.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import io
import logging
import sys
import warnings
from collections.abc import Iterator
from typing import Any, Final

from clframe.lazy_imports import Deferred, defer_package, use_stand_in, without_collection

_DEFERRED: Final = ("GPUtil", "gdown", "qpsolvers", "wandb")
"""Packages that Avalanche 0.6 imports as a whole, and whose attributes it uses only inside functions."""
_TORCHMETRICS: Final = {
    "Metric": "torchmetrics.metric",
    "MetricCollection": "torchmetrics.collections",
    "__version__": "torchmetrics.__about__",
}
"""Attributes of torchmetrics that Lightning and Avalanche read when they are imported, and where they are defined."""
_TORCHVISION: Final = ("torchvision.transforms", "torchvision.datasets", "torchvision.utils")
"""Subpackages of torchvision that Avalanche reads when it is imported."""
_STAND_INS: Final = (
    ("torchmetrics.functional", ("accuracy",), None),
    ("torchmetrics.utilities.plot", ("_AX_TYPE", "_PLOT_OUT_TYPE", "plot_single_or_multi_val"), "matplotlib"),
    ("matplotlib", ("transforms",), None),
    ("matplotlib.axes", ("Axes",), None),
    ("matplotlib.figure", ("Figure",), None),
    ("matplotlib.pyplot", ("Figure", "subplots"), "matplotlib"),
    ("torch._dynamo.utils", ("is_compile_supported",), None),
    ("torchvision.models", ("mobilenet_v2",), None),
    ("torchvision.models.feature_extraction", ("create_feature_extractor", "get_graph_node_names"), None),
    ("triton.runtime.jit", ("JITFunction",), "triton"),
)
"""Functions and types that Avalanche's metrics and loggers, torchmetrics, torchvision and torch's counter of operations
import, and only call, name in annotations or compare with, and the packages that define the types: importing these
takes longer than importing Avalanche."""


def import_avalanche() -> None:
    """Import Avalanche quickly and without the output and warnings of its import.

    GPUtil, qpsolvers and other dependencies warn about themselves, which does not concern users of clframe.
    """
    if "avalanche.training" in sys.modules:
        return
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            with quick_imports():
                import avalanche.training
        except ImportError:  # a version that needs more of these modules
            import avalanche.training  # noqa: F401


@contextlib.contextmanager
def quick_imports() -> Iterator[None]:
    """Have imports of Avalanche and Lightning in this block import only what they need of other packages."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_collection())
        for name in _DEFERRED:
            stack.enter_context(defer_package(name, {}))
        stack.enter_context(defer_package("torch._dynamo", {}, _COMPILER))
        logger = {"_logger": logging.getLogger("torchmetrics")}
        stack.enter_context(defer_package("torchmetrics", _TORCHMETRICS, logger))
        stack.enter_context(defer_package("torchvision", {}, within=_without_compiler))
        for module, attributes, home in _STAND_INS:
            stack.enter_context(use_stand_in(module, attributes, home=home))
        # Here, because Lightning, which needs these, may be imported later. The first module imports that of Metric,
        # which cannot be imported before it.
        for name in ("torchmetrics.utilities", *_TORCHMETRICS.values(), *_TORCHVISION):
            importlib.import_module(name)
        yield


def _without_compiler() -> contextlib.AbstractContextManager[None]:
    """Have an import of torchvision's operations not load the compiler."""
    return use_stand_in("torch._dynamo.utils", ("is_compile_supported",))


def _disable_compiler(function: Any = None, *args: Any, **options: Any) -> Any:
    """Return ``torch._dynamo.disable(function)``, for functions of some packages without loading the compiler.

    Optimizers and counters of operations disable the compiler in some of their methods. Before it is loaded nothing is
    compiled.
    """
    packages = ("torch", "lightning", "clframe")
    if not inspect.isfunction(function) or function.__module__.partition(".")[0] not in packages:
        return importlib.import_module("torch._dynamo.decorators").disable(function, *args, **options)
    called = function

    @functools.wraps(function)
    def call(*inputs: Any, **named: Any) -> Any:
        nonlocal called
        if called is function:
            disable = sys.modules["torch._dynamo"].disable
            called = function if disable is _disable_compiler else disable(function, *args, **options)
        return called(*inputs, **named)

    return call


def _break_graph(*args: Any, **options: Any) -> None:
    """Stand in for ``torch._dynamo.graph_break``, which does nothing in functions that are not being compiled."""


_COMPILER: Final = {
    "disable": _disable_compiler,
    "graph_break": _break_graph,
    "OptimizedModule": Deferred("torch._dynamo.eval_frame", "OptimizedModule", home="torch._dynamo"),
}
"""Names of torch's compiler that optimizers and Lightning use; importing all of it takes three seconds."""
