"""Checks of the arguments of a strategy, before anything is built from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import nn
from torch.optim import Optimizer

from clframe.avalanche_bridge.imports import Fabric
from clframe.data.benchmark import Benchmark
from clframe.options import require_count
from clframe.training.argument_types import require_functions, require_objects, require_plugins, require_types
from clframe.training.budget import TrainingPlan
from clframe.training.capture import Capture
from clframe.training.distributed import Group
from clframe.training.epochs import EarlyStopping

EngineName = Literal["fabric", "trainer"]
EvalMode = Literal["experience", "epoch", "iteration"]
"""Avalanche's words for what ``eval_every`` counts."""

_WHERE = "LightningStrategy"
_ANNOTATIONS: Mapping[str, Any] = {
    "engine": EngineName, "capture": Capture, "peval_mode": EvalMode, "drop_last": bool, "channels_last": bool,
    "compile": bool | str, "trainer": dict[str, Any] | None,
}  # fmt: skip
_CLASSES: Mapping[str, type] = {
    "model": nn.Module, "optimizer": Optimizer, "benchmark": Benchmark, "fabric": Fabric,
    "early_stopping": EarlyStopping, "plugins": Sequence, "plan": TrainingPlan, "group": Group,
}  # fmt: skip
_LEAST: Mapping[str, int] = {
    "accumulate": 1, "limit_batches": 1, "train_mb_size": 1, "eval_mb_size": 1, "eval_every": -1, "train_epochs": 0,
}  # fmt: skip
_OPTIONAL = ("limit_batches", "eval_mb_size")


def check_strategy_arguments(given: Mapping[str, Any]) -> None:
    """Refuse arguments of another type or out of range.

    Args:
        given: Arguments of :class:`~clframe.training.strategy.LightningStrategy` by name.

    Raises:
        ConfigError: Such an argument.
    """
    require_types({name: (given[name], kind) for name, kind in _ANNOTATIONS.items()}, where=_WHERE)
    require_objects({name: (given[name], kind) for name, kind in _CLASSES.items()}, where=_WHERE)
    require_functions({"criterion": given["criterion"]}, where=_WHERE)
    require_plugins(given["plugins"] or (), where=_WHERE)
    for name, least in _LEAST.items():
        if given[name] is not None or name not in _OPTIONAL:
            require_count(given[name], least=least, where=f"{_WHERE}.{name}")
