"""Repairs of plugins that Avalanche 0.6 breaks on current torch, and refusals of those that cannot work here.

A repair changes the instance that a strategy uses: its class becomes a subclass with corrected methods. Avalanche's own
classes stay as they are, so that a plain strategy in the same process is not affected. Each repair can go when
Avalanche releases the fix.
"""

from __future__ import annotations

import copy
import functools
import logging
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from clframe.errors import UnsupportedError
from clframe.nn.network import Network

_log = logging.getLogger(__name__)


def repair(plugins: Iterable[Any]) -> None:
    """Repair the plugins that can be repaired and refuse those that cannot work here.

    Raises:
        UnsupportedError: GEM without the solver it names.
    """
    for plugin in plugins:
        for base in type(plugin).__mro__:
            action = _REPAIRS.get(f"{base.__module__}.{base.__name__}")
            if action is not None:
                action(plugin)


def refuse_schedulers(plugins: Iterable[Any]) -> None:
    """Refuse learning-rate schedulers where every experience gets a fresh optimizer: they would do nothing.

    Raises:
        UnsupportedError: An ``LRSchedulerPlugin`` among the plugins.
    """
    from avalanche.training.plugins import LRSchedulerPlugin

    if any(isinstance(plugin, LRSchedulerPlugin) for plugin in plugins):
        raise UnsupportedError(
            "LRSchedulerPlugin: its scheduler belongs to one optimizer but each experience gets a fresh one; "
            "pass optimizer= to the strategy, or scheduler= to the ContinualModule"
        )


def _repair_with(correct: Callable[..., type[Any]]) -> Callable[[Any], None]:
    """A repair that gives an instance the subclass ``correct`` of its class."""
    # Single inheritance: an instance can only change to a class of the same memory layout.

    def act(plugin: Any) -> None:
        if not getattr(plugin, "_is_repaired", False):
            corrected: Any = correct(type(plugin))
            # The name that a user prints or logs is that of the plugin that was passed in.
            corrected.__name__ = corrected.__qualname__ = type(plugin).__name__
            corrected.supports_distributed = type(plugin).supports_distributed  # which Avalanche resets in subclasses
            plugin.__class__ = corrected

    return act


@functools.cache
def _growing_importances(cls: Any) -> type[Any]:
    """``ParamData.expand`` indexes with a list of slices, which torch deprecates and is about to read as a tensor."""

    class Corrected(cls):
        _is_repaired = True

        def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> Any:
            # The model has just grown; importances of earlier experiences are expanded from here on.
            for data in _param_data(vars(self)):
                data.__class__ = _growing_data()
            return super().before_training_exp(strategy, *args, **kwargs)

    return Corrected


def _param_data(value: Any) -> Iterator[Any]:
    from avalanche.training.utils import ParamData

    if type(value) is ParamData:
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _param_data(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _param_data(item)


@functools.cache
def _growing_data() -> type[Any]:
    from avalanche.training.utils import ParamData

    class GrowingParamData(ParamData):
        def expand(self, new_shape: Any, padding_fn: Any = torch.zeros) -> Tensor:
            growing = [new > old for new, old in zip(new_shape, self.shape, strict=True)]
            assert all(new >= old for new, old in zip(new_shape, self.shape, strict=True)), "shapes only grow"
            assert sum(growing) <= 1, "one dimension grows at a time"
            data: Tensor = self._data
            if any(growing):
                self.reset_like(new_shape, init_function=padding_fn)
                self._data[tuple(slice(size) for size in data.shape)] = data
            expanded: Tensor = self._data
            return expanded

    return GrowingParamData


@functools.cache
def _rwalk(cls: Any) -> type[Any]:
    """It divides by the largest score of an experience, which it sets every ``delta_t`` steps.

    In an experience with fewer steps all scores are zero, so no penalty is a number. And torch finds no largest value
    of a parameter without elements: a head before it has grown, or the anchor of an exit with a head per experience.
    """
    parent: Any = _growing_importances(cls)

    class Corrected(parent):
        def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> Any:
            result = super().before_training_exp(strategy, *args, **kwargs)
            for name, parameter in strategy.model.named_parameters():
                if name in self.checkpoint_scores:
                    self.checkpoint_scores[name].expand(parameter.shape)
            return result

        def after_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> Any:
            for data in (self.checkpoint_scores, self.iter_importance):
                for name in [name for name, value in data.items() if not value.data.numel()]:
                    del data[name]
            result = super().after_training_exp(strategy, *args, **kwargs)
            if max(score.data.max() for score in self.exp_scores.values()) == 0:
                # As theirs, with the scores left out.
                largest = max(importance.data.max() for importance in self.exp_importance.values())
                for name, penalty in self.exp_penalties.items():
                    penalty.data = self.exp_importance[name].data / largest
            return result

    return Corrected


@functools.cache
def _synaptic_intelligence(cls: Any) -> type[Any]:
    """It stores ``param.detach().cpu().flatten()`` as old weights: on the CPU a view of the live ones.

    Old and new weights are then always equal, every importance is zero and the plugin does nothing.
    """
    parent: Any = _growing_importances(cls)

    class Corrected(parent):
        def before_training_exp(self, strategy: Any, *args: Any, **kwargs: Any) -> Any:
            result = super().before_training_exp(strategy, *args, **kwargs)
            _copy_data(self.ewc_data[0])
            return result

        def before_training_iteration(self, strategy: Any, **kwargs: Any) -> Any:
            result = super().before_training_iteration(strategy, **kwargs)
            _copy_data(self.syn_data["old_theta"])
            return result

        def after_training_exp(self, strategy: Any, **kwargs: Any) -> Any:
            with warnings.catch_warnings():
                # It squares tensors with numpy, which deprecates the way torch returns a tensor from that.
                warnings.filterwarnings("ignore", message="__array_wrap__ must accept")
                return super().after_training_exp(strategy, **kwargs)

    return Corrected


def _copy_data(data: Mapping[str, Any]) -> None:
    for value in data.values():
        value.data = value.data.clone()


@functools.cache
def _bic(cls: Any) -> type[Any]:
    """It passes ``verbose=`` to ``MultiStepLR``, which torch 2.7 removed, and sets ``experience.dataset``.

    Experiences of Avalanche's newer benchmarks do not allow to set it.
    """

    class Corrected(cls):
        _is_repaired = True

        def before_train_dataset_adaptation(self, strategy: Any, **kwargs: Any) -> Any:
            strategy.experience = _with_settable_dataset(strategy.experience)
            return super().before_train_dataset_adaptation(strategy, **kwargs)

        def bias_correction_step(self, *args: Any, **kwargs: Any) -> Any:
            function = super().bias_correction_step.__func__
            # The same code with another MultiStepLR among its globals, so that Avalanche's module is left alone.
            names = {**function.__globals__, "MultiStepLR": _multi_step}
            copied = types.FunctionType(
                function.__code__, names, function.__name__, function.__defaults__, function.__closure__
            )
            copied.__kwdefaults__ = function.__kwdefaults__
            return copied(self, *args, **kwargs)

    return Corrected


def _multi_step(optimizer: Any, milestones: Any, *, gamma: float, verbose: bool = False) -> Any:
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=gamma)


def _with_settable_dataset(experience: Any) -> Any:
    """``experience``, or a copy of it with a settable dataset if its own cannot be set."""
    dataset = getattr(type(experience), "dataset", None)
    if not isinstance(dataset, property) or dataset.fset is not None:
        return experience
    settable = copy.copy(experience)

    def set_dataset(self: Any, data: Any) -> None:
        self._dataset = data

    original = type(experience)
    settable.__class__ = type(original.__name__, (original,), {"dataset": dataset.setter(set_dataset)})
    return settable


@functools.cache
def _cwr_star(cls: Any) -> type[Any]:
    """It takes the last ``nn.Linear`` for the classifier: in a ``Network`` a hidden layer, which it sets to 0."""

    class Corrected(cls):
        _is_repaired = True

        def get_cwr_layer(self) -> Any:
            network = getattr(self.model, "network", None)
            if self.cwr_layer_name is None and isinstance(network, Network):
                return network.final
            return super().get_cwr_layer()

    return Corrected


def _check_gem(plugin: Any) -> None:
    """GEM solves with quadprog, which Avalanche does not install everywhere."""
    import qpsolvers

    if "quadprog" not in qpsolvers.available_solvers:
        raise UnsupportedError(
            "GEMPlugin: needs the quadratic-programming solver quadprog, which is not installed; "
            "run pip install quadprog"
        )


def _warn_of_macs(evaluator: Any) -> None:
    """Avalanche's MAC metric knows layers by the names of their classes, and counts a kernel for one input channel."""
    from avalanche.evaluation.metrics.mac import MACPluginMetric

    if any(isinstance(metric, MACPluginMetric) for metric in evaluator.metrics):
        _log.warning(
            "MAC_metrics: count layers of classes named Linear and Conv2d only, and convolutions without their input "
            "channels; clframe.avalanche_bridge.plugins.cost_metrics counts every product"
        )


_PLUGINS = "avalanche.training.plugins"
_REPAIRS: dict[str, Callable[[Any], None]] = {
    f"{_PLUGINS}.ewc.EWCPlugin": _repair_with(_growing_importances),
    f"{_PLUGINS}.rwalk.RWalkPlugin": _repair_with(_rwalk),
    f"{_PLUGINS}.mas.MASPlugin": _repair_with(_growing_importances),
    f"{_PLUGINS}.synaptic_intelligence.SynapticIntelligencePlugin": _repair_with(_synaptic_intelligence),
    f"{_PLUGINS}.bic.BiCPlugin": _repair_with(_bic),
    f"{_PLUGINS}.cwr_star.CWRStarPlugin": _repair_with(_cwr_star),
    f"{_PLUGINS}.gem.GEMPlugin": _check_gem,
    f"{_PLUGINS}.evaluation.EvaluationPlugin": _warn_of_macs,
}
