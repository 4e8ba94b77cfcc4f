"""clframe: continual learning with accounting of compute.

Train on a stream of experiences, compose strategies in one line, and report accuracy, forgetting and the cost of every
prediction. Public names are imported on first use, so that importing this package is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clframe.api import explain, run
    from clframe.avalanche_bridge.fabric import on_fabric
    from clframe.config.load import load_config
    from clframe.config.schema import Config
    from clframe.core import compose
    from clframe.core.component import Component, Composition
    from clframe.core.expression import parse, register
    from clframe.data.benchmark import Benchmark, class_incremental
    from clframe.errors import ClframeError
    from clframe.model import load
    from clframe.nn.network import Network
    from clframe.nn.types import Output
    from clframe.results import Result
    from clframe.training.module import ContinualModule
    from clframe.training.strategy import LightningStrategy

__version__ = "0.1.0"

_HOMES = {
    "Benchmark": "clframe.data",
    "ClframeError": "clframe.errors",
    "Component": "clframe.core",
    "Composition": "clframe.core",
    "Config": "clframe.config.schema",
    "ContinualModule": "clframe.training.module",
    "LightningStrategy": "clframe.training.strategy",
    "Network": "clframe.nn",
    "Output": "clframe.core",
    "Result": "clframe.results",
    "class_incremental": "clframe.data",
    "compose": "clframe.core",
    "explain": "clframe.api",
    "load": "clframe.model",
    "load_config": "clframe.config.load",
    "on_fabric": "clframe.avalanche_bridge.fabric",
    "parse": "clframe.core",
    "register": "clframe.core",
    "run": "clframe.api",
}

_MODULES = (
    "accounting", "api", "avalanche_bridge", "config", "core", "data", "errors", "exits", "functional", "metrics",
    "model", "moe", "nn", "own_code", "plotting", "regularization", "replay", "report", "results", "sparse_decode",
    "sparsity", "sweep", "targets", "testing", "training",
)  # fmt: skip
"""Modules for people who use clframe: attributes without an import statement, as in ``clframe.data.digits()``."""

__all__ = [
    "Benchmark", "ClframeError", "Component", "Composition", "Config", "ContinualModule",
    "LightningStrategy", "Network", "Output", "Result", "class_incremental", "compose", "explain",
    "load", "load_config", "on_fabric", "parse", "register", "run",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"clframe.{name}")
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'clframe' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES, "__version__"])
