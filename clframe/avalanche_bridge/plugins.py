"""Avalanche's plugins by class name, with checked options, and a corrected MACs metric."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from avalanche.core import BaseSGDPlugin, SupervisedPlugin
from avalanche.evaluation import GenericPluginMetric, Metric
from avalanche.models import MultiTaskModule
from avalanche.training import plugins as avalanche_plugins
from torch import nn

from clframe.accounting import measure_cost
from clframe.avalanche_bridge.repairs import repair
from clframe.config.named import WHERE
from clframe.errors import ConfigError, UnknownNameError, UnsupportedError, nearest, reason_of, unknown_name
from clframe.options import check_options
from clframe.own_code import is_dotted, load_class


class Macs(Metric[int]):
    """MACs of one call of a model: those of the last :meth:`update`.

    >>> import torch
    >>> metric = Macs()
    >>> metric.update(nn.Linear(10, 5), torch.zeros(1, 10))
    >>> metric.result()
    50
    """

    def __init__(self) -> None:
        self._macs: int | None = None

    def update(self, model: nn.Module, example: Any) -> None:
        """Count one call of ``model``; see :func:`clframe.accounting.measure_cost`."""
        self._macs = measure_cost(model, example).macs

    def result(self) -> int | None:
        """MACs, or None before the first update."""
        return self._macs

    def reset(self) -> None:
        """Clear the count."""
        self._macs = None


class MacsPluginMetric(GenericPluginMetric[int, Macs]):
    """MACs of one sample, counted once per logged value.

    Args:
        every: ``"experience"`` logs after each evaluated experience, ``"epoch"`` after each training epoch.
    """

    def __init__(self, every: str = "experience") -> None:
        super().__init__(
            Macs(), reset_at=every, emit_at=every, mode="eval" if every == "experience" else "train"
        )
        self._name = "MACs_Exp" if every == "experience" else "MACs_Epoch"

    def update(self, strategy: Any) -> None:
        """Count the first sample of the first batch after a reset."""
        if self._metric.result() is not None:
            return
        x = strategy.mb_x[:1]
        takes_labels = isinstance(strategy.model, MultiTaskModule)
        self._metric.update(strategy.model, (x, strategy.mb_task_id[:1]) if takes_labels else x)

    def __str__(self) -> str:
        return self._name


def cost_metrics(*, epoch: bool = False, experience: bool = True) -> list[MacsPluginMetric]:
    """Return metrics for ``EvaluationPlugin(*cost_metrics(), ...)``.

    Args:
        epoch: Whether to log after every training epoch.
        experience: Whether to log after every evaluated experience.
    """
    return [MacsPluginMetric(every) for every, on in (("epoch", epoch), ("experience", experience)) if on]


Named = Sequence[tuple[str, Mapping[str, Any]]]
"""Class names of plugins with their options, as :func:`clframe.config.named.named_plugins` reads them."""

_PLAIN = "which a Network is not; from Python use it on a plain module with LightningStrategy(plugins=[...])"
_GENERATOR = "needs a second strategy that trains a generator; from Python pass it to LightningStrategy(plugins=[...])"
_EVALUATOR = "which a run from a config lacks; from Python pass them to LightningStrategy(evaluator=...)"
_REFUSED: dict[str, str] = {
    "CoPEPlugin": f"needs a criterion of its own and a model without a classifier, {_PLAIN}",
    "LFLPlugin": f"needs a model of Avalanche's with get_features, {_PLAIN}",
    "FeatureDistillationPlugin": f"needs a model of Avalanche's that keeps its features, {_PLAIN}",
    **{
        name: f"needs a model of Avalanche's with a classifier of class means, {_PLAIN}; here add the component 'ncm'"
        for name in ("CurrentDataNCMUpdate", "MemoryNCMUpdate", "NCMOracle")
    },
    **{
        name: f"needs a model of Avalanche's with a FeCAM classifier, {_PLAIN}"
        for name in ("CurrentDataFeCAMUpdate", "MemoryFeCAMUpdate", "FeCAMOracle")
    },
    "GenerativeReplayPlugin": _GENERATOR,
    "TrainGeneratorAfterExpPlugin": _GENERATOR,
    "LRSchedulerPlugin": "needs one optimizer, but each experience has a fresh one; set optimizer.schedule",
    "EarlyStoppingPlugin": f"needs metrics of Avalanche's, {_EVALUATOR}; here set trainer.callbacks.EarlyStopping",
    "EvaluationPlugin": f"holds metrics and loggers of Avalanche's, {_EVALUATOR}",
}
"""Plugins that cannot be combined with components in a run from a config, and why."""

_MISSING_TYPES: dict[str, dict[str, Any]] = {
    "CWRStarPlugin": {"cwr_layer_name": str | None, "freeze_remaining_model": bool},
    "EWCPlugin": {
        "ewc_lambda": float,
        "mode": Literal["separate", "online"],
        "decay_factor": float | None,
        "keep_importance_data": bool,
    },
    "GSS_greedyPlugin": {"mem_size": int, "mem_strength": int, "input_size": list[int]},
    "LwFPlugin": {"alpha": float | list[float], "temperature": float},
    "MASPlugin": {"verbose": bool},
    "RARPlugin": {"name_ext_layer": str},
    "SynapticIntelligencePlugin": {"si_lambda": float | list[float], "excluded_parameters": list[str] | None},
}
"""Types of options that Avalanche leaves without an annotation, or annotates wrongly."""
_REQUIRED = {"RARPlugin": ("name_ext_layer",), "GSS_greedyPlugin": ("input_size",)}
"""Options whose default cannot work."""
_OBJECTS = ("model", "device", "storage_policy")
"""Parameters that are not plain values; the model is passed to plugins that take one."""
_LAYERS = ("cwr_layer_name", "name_ext_layer")


def plugin_names() -> tuple[str, ...]:
    """Return the class names that ``components.avalanche.plugins`` accepts.

    >>> "EWCPlugin" in plugin_names(), "CoPEPlugin" in plugin_names()
    (True, False)
    """
    return tuple(sorted(name for name in _classes() if name not in _REFUSED))


def check_plugins(named: Named) -> None:
    """Refuse in advance what :func:`make_plugins` would refuse.

    Raises:
        UnknownNameError: No such plugin; the message has the nearest name.
        UnsupportedError: A plugin that cannot be combined with components.
        ConfigError: Options that it does not take.
    """
    make_plugins(named, model=nn.Linear(1, 1), layers=None)


def make_plugins(named: Named, *, model: nn.Module, layers: Sequence[str] | None) -> list[Any]:
    """Create the plugins, repaired where Avalanche breaks them on current torch.

    Args:
        named: Class names with options.
        model: Passed to plugins that take a model.
        layers: Names of its layers, to check options that name one; None skips the check.

    Raises:
        ClframeError: As :func:`check_plugins`, and an option that names no layer.
    """
    made = [_make(name, options, f"{WHERE}[{i}]", model, layers) for i, (name, options) in enumerate(named)]
    repair(made)
    return made


def _classes() -> dict[str, type[Any]]:
    bases = (BaseSGDPlugin, SupervisedPlugin)
    listed = vars(avalanche_plugins).items()
    found = {name: cls for name, cls in listed if isinstance(cls, type) and issubclass(cls, bases)}
    return {name: cls for name, cls in found.items() if cls not in bases}


def _make(name: str, options: Mapping[str, Any], place: str, model: nn.Module, layers: Sequence[str] | None) -> Any:
    classes, where = _classes(), f"{place}.{name}"
    if name in _REFUSED:
        raise UnsupportedError(f"{where}: {_REFUSED[name]}")
    if name not in classes and not is_dotted(name):
        raise UnknownNameError(unknown_name("plugin of Avalanche's", name, plugin_names(), where=place))
    bases = (BaseSGDPlugin, SupervisedPlugin)
    cls = load_class(name, bases, where=place) if is_dotted(name) else classes[name]
    checked = check_options(_signature_of(cls), options, where=where)
    for option in _LAYERS:
        if layers is not None and checked.get(option) is not None and checked[option] not in layers:
            _refuse_layer(f"{where}.{option}", checked[option], layers)
    given = {"model": model} if "model" in inspect.signature(cls).parameters else {}
    try:
        return cls(**given, **checked)
    except Exception as error:  # whatever a class of Avalanche's, or of the user's, raises on its options
        reason = reason_of(error)
        owner = "it" if is_dotted(name) else "Avalanche"
        raise ConfigError(f"{where}: {owner} refuses its options ({reason}); change them") from None


def _signature_of(cls: type[Any]) -> Callable[..., Any]:
    """A function with the plugin's plain-value parameters as typed keyword options, for :func:`check_options`."""
    missing_types, required = _MISSING_TYPES.get(cls.__name__, {}), _REQUIRED.get(cls.__name__, ())

    def options() -> None: ...

    parameters = []
    for name, parameter in inspect.signature(cls).parameters.items():
        if name in _OBJECTS:
            continue
        annotation = Any if parameter.annotation is inspect.Parameter.empty else parameter.annotation
        if annotation is Any and isinstance(parameter.default, bool):
            annotation = bool
        changes: dict[str, Any] = {"annotation": missing_types.get(name, annotation)}
        if name in required:
            changes["default"] = inspect.Parameter.empty
        parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, **changes))
    options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return options


def _refuse_layer(where: str, name: str, layers: Sequence[str]) -> None:
    close = nearest(name, layers)
    advice = f"did you mean '{close}'?" if close else f"layers are {', '.join(layers)}"
    raise ConfigError(f"{where}: no layer is called '{name}'; {advice}")
